"""grammar: the text keeps to a JSON schema, a regular expression or a grammar in Lark's form, by llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from weakref import WeakKeyDictionary

import numpy as np

from pyspec.arguments import described
from pyspec.sampling.warpers import WARPERS, Warped

_KINDS = ("json_schema", "regex", "lark")
#: llguidance's form of a tokenizer takes a second to make.
_MADE: WeakKeyDictionary = WeakKeyDictionary()


class Grammar:
    """Forbids the tokens that a grammar does not allow next; when it is complete, the model's end token alone is left.

    Each node of a draft tree has a state of the parser of its own, so a rejected draft leaves none. Runs of tokens that
    the grammar forces become drafts.

    Args:
        grammar: {"json_schema": a mapping or its JSON text}, {"regex": text} or {"lark": text}; see llguidance
            (https://github.com/guidance-ai/llguidance) for what it takes of each.

    Raises:
        ValueError: at once for another mapping; for a grammar that llguidance refuses, when a text starts.
        ImportError: llguidance is not installed.
    """

    place = -10

    def __init__(self, grammar: Mapping):
        if not isinstance(grammar, Mapping) or len(grammar) != 1 or next(iter(grammar)) not in _KINDS:
            raise ValueError(f"grammar must be a mapping with one of {', '.join(_KINDS)}, got {described(grammar)}")
        ((kind, source),) = grammar.items()
        if not isinstance(source, (str, Mapping) if kind == "json_schema" else str):
            raise ValueError(f"grammar's {kind} must be text, got {described(source)}")
        try:
            import llguidance
        except ImportError:
            raise ImportError("grammar needs llguidance: pip install 'pyspec-kernels[grammar]'") from None
        if kind == "json_schema" and isinstance(source, str):
            try:
                source = json.loads(source)
            except ValueError as error:
                raise ValueError(f"grammar's json_schema is no JSON: {error}") from error
        self._grammar = getattr(llguidance.LLMatcher, f"grammar_from_{kind}")(source)

    def start(self, prompt: Sequence[int], model):
        """The parser before the first token."""
        from llguidance import LLMatcher

        if model.tokenizer is None or not model.eos_tokens:
            raise ValueError("grammar needs a model with a tokenizer and an end token")
        matcher = LLMatcher(_tokenizer(model), self._grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(f"grammar is refused by llguidance: {' '.join(matcher.get_error().split())[:200]}")
        return matcher

    def warp(self, state, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        if state is None:  # below a draft that the grammar does not allow, where nothing is ever emitted
            return Warped(tokens, scores)
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        mask = allocate_token_bitmask(1, len(scores))
        if not state.is_error():
            fill_next_token_bitmask(state, mask, 0)
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(scores)]
        if state.is_error():  # too large for the parser's limits, which leaves nothing to say
            allowed[:] = 0
        return Warped(tokens, np.where(allowed, scores, -np.inf), lambda token: _after(state, token))

    def forced(self, state) -> list[int]:
        """The tokens that must come next."""
        return [] if state is None else state.deep_copy().compute_ff_tokens()


def _after(state, token: int):
    following = state.deep_copy()
    return following if following.try_consume_tokens([token]) == 1 else None


def _tokenizer(model):
    """llguidance's form of a runner's tokenizer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    key, tokenizer = (model.vocab_size, model.eos_tokens), model.tokenizer
    made = _MADE.setdefault(tokenizer, {})
    if key not in made:
        named = getattr(tokenizer, "vocab_size", model.vocab_size)
        before = len(tokenizer.encode(""))

        class Wrapped:
            eos_token_id, bos_token_id = min(model.eos_tokens), None
            tokens = [tokenizer.token_bytes(token) if token < named else b"" for token in range(model.vocab_size)]
            special_token_ids = sorted(model.eos_tokens)

            def __call__(self, text: str | bytes) -> list[int]:
                return tokenizer.encode(text if isinstance(text, str) else text.decode())[before:]

        made[key] = LLTokenizer(
            TokenizerWrapper(Wrapped()), n_vocab=model.vocab_size, eos_token=sorted(model.eos_tokens)
        )
    return made[key]


WARPERS.register("grammar", Grammar, "a JSON schema, a regex or a Lark grammar that the text keeps to, as a mapping")
