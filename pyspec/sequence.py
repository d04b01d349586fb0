"""One prompt and what became of it: the tokens, and the text as it comes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pyspec.acceptance import AcceptanceRule
from pyspec.drafters import Drafter
from pyspec.runners import Runner
from pyspec.runners.verified import Verified
from pyspec.sampling.logprobs import TokenLogprobs, token_logprobs
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.tree import Accepted, DraftTree


@dataclass
class Sequence:
    """One prompt and its continuation.

    Attributes:
        model: the runner, for its tokenizer, vocabulary and end tokens; nothing is computed here.
        context: prompt and new tokens; the last one's key is not cached yet.
        prompt_length: tokens of the prompt.
        limit: tokens of the context at which the sequence ends.
        drafter: shared by all sequences until start_drafting; None for plain decoding.
        sampler: draws the tokens of this text.
        text: the text of the new tokens; None where the model has no tokenizer.
        stream: called with each new piece of text, or None.
        top_logprobs: how many of the likeliest tokens are told beside each new one; None keeps no log probabilities.
        logprobs: of the new tokens, where they are kept.
        finish_reason: see pyspec.Generation; None while the sequence is going.
        error: what went wrong where finish_reason is "error".
        keeps_errors: whether what its drafter, sampler or stream raises ends this text alone, as an error of its own.
    """

    model: Runner
    context: list[int]
    prompt_length: int
    limit: int
    drafter: Drafter | None
    sampler: Sampler
    text: TextStream | None = None
    stream: Callable[[str], None] | None = None
    top_logprobs: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    keeps_errors: bool = False

    @property
    def going(self) -> bool:
        return self.finish_reason is None

    @property
    def new_tokens(self) -> list[int]:
        return self.context[self.prompt_length :]

    def start_drafting(self) -> None:
        """Takes a drafter of its own."""
        if self.drafter is not None:
            self.drafter = self.drafter.start(self.context)

    def check(self, tree: DraftTree, budget: int) -> None:
        """Raises ValueError where a proposed tree is too large, or has tokens that the text or the target has not."""
        if len(tree) > budget or tree.tokens[0] != self.context[-1]:
            raise ValueError(
                f"drafter must propose at most {budget} nodes below token {self.context[-1]}, "
                f"got {len(tree)} below token {tree.tokens[0]}"
            )
        lowest, highest = tree.token_range
        if lowest < 0 or highest >= self.model.vocab_size:
            raise ValueError(f"drafter proposed tokens outside of [0, {self.model.vocab_size}): {tree.tokens.tolist()}")

    def accept(self, tree: DraftTree, verified: Verified, rule: AcceptanceRule) -> Accepted:
        """What a rule accepts of a verified tree. Where it comes to logits that are no law, there is no next token."""
        try:
            accepted = rule.accept(tree, verified, self.sampler, len(self.context))
            self.sampler.extend(accepted)
        except InvalidLogits as invalid:
            self._invalid = self._describe(invalid, tree)
            # the drafts up to that node were accepted, as plain decoding would have emitted them before it failed
            accepted = Accepted(invalid.path, None)
        if self.top_logprobs is not None:
            self._accepted_logprobs = [
                token_logprobs(verified.logits[node], token, self.top_logprobs)
                for node, token in zip(accepted.path, accepted.tokens(tree), strict=False)
            ]
        return accepted

    def extend(self, tree: DraftTree, accepted: Accepted) -> int:
        """Adds what was accepted, up to the token that ends the text, and streams it; returns the number of tokens."""
        before = len(self.context)
        for token in accepted.tokens(tree):
            self.context.append(token)
            self._read(token)
            if self.going and len(self.context) >= self.limit:
                self.finish("length")
            if not self.going:
                break
        if self.top_logprobs is not None:
            self.logprobs += self._accepted_logprobs[: len(self.context) - before]
        if self.going and accepted.next_token is None:
            self.error = self._invalid
            self.finish("error")
        if self.going:
            self._show()
        return len(self.context) - before

    def finish(self, reason: str) -> None:
        """Ends the sequence, and streams what was held back."""
        self.finish_reason = reason
        if self.text is not None:
            self.text.finish()
            self._show()

    def trying(self) -> _Trying:
        """A context of work for this text alone: see keeps_errors."""
        return _Trying(self)

    def fail(self, error: Exception) -> None:
        """Ends the sequence, if it is going, with an error."""
        if self.going:
            self.error, self.stream = f"{type(error).__name__}: {error}", None  # which may be what failed
            self.finish("error")

    def _read(self, token: int) -> None:
        """Takes a new token into the text; finishes if the text ends with it."""
        if token in self.model.eos_tokens:
            self.finish("eos")
        elif self.text is not None:
            self.text.push(token)
            if self.text.stopped:
                self.finish("stop")

    def _show(self) -> None:
        if self.stream is not None and (piece := self.text.take()):
            self.stream(piece)

    def _describe(self, invalid: InvalidLogits, tree: DraftTree) -> str:
        node = invalid.path[-1]
        token, depth = int(tree.tokens[node]), int(tree.depths[node])
        spelled = "" if self.model.tokenizer is None else f" {self.model.tokenizer.token_bytes(token)!r}"
        return (
            f"the logits of node {node} (depth {depth}, position {len(self.context) - 1 + depth}, "
            f"token {token}{spelled}) are {invalid}"
        )


def propose(sequences: list[Sequence], budgets: list[int]) -> list[DraftTree]:
    """The next tree of each sequence, of at most so many nodes; the root alone in plain decoding.

    Where a grammar leaves the text no choice, what must come is the draft, and the drafter is not asked.

    Raises:
        ValueError: a drafter proposed a larger tree, one below another token, or one with tokens outside of the
            vocabulary.
    """
    trees: list[DraftTree] = [DraftTree.chain(sequence.context[-1:]) for sequence in sequences]
    # a tree of as many nodes as tokens are left is never too deep for the limit or the context
    budgets = [
        min(budget, sequence.limit - len(sequence.context)) for budget, sequence in zip(budgets, sequences, strict=True)
    ]
    asked = [place for place, each in enumerate(sequences) if each.drafter is not None and budgets[place] > 1]
    for place in asked:
        sequence = sequences[place]  # a rule that trusts laws takes no draft without one
        if sequence.drafter.proposal == "deterministic" and (forced := sequence.sampler.forced(budgets[place] - 1)):
            trees[place] = DraftTree.chain([sequence.context[-1], *forced])
    asked = [place for place in asked if len(trees[place]) == 1]
    if not asked:
        return trees
    drafters, contexts = ([getattr(sequences[place], name) for place in asked] for name in ("drafter", "context"))
    together, found = getattr(drafters[0], "propose_together", None), None
    if together is not None:
        try:
            found = together(drafters, contexts, [budgets[place] for place in asked])
        except Exception:
            if not sequences[0].keeps_errors:
                raise  # else each is asked alone, which tells whose fault it is
    for number, place in enumerate(asked):
        sequence = sequences[place]
        with sequence.trying():
            tree = drafters[number].propose(contexts[number], budgets[place]) if found is None else found[number]
            sequence.check(tree, budgets[place])
            trees[place] = tree
    return trees


class _Trying:
    """A context that ends a sequence where an exception is to be its own."""

    __slots__ = ("_sequence",)

    def __init__(self, sequence: Sequence):
        self._sequence = sequence

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> bool:
        if not (self._sequence.keeps_errors and isinstance(error, Exception)):
            return False
        self._sequence.fail(error)
        return True


class TextStream:
    """Turns tokens into text: only whole characters, cut before the first stop string.

    A stop string may begin inside a token and span several. `take` never gives out text that a later token
    may turn into a stop string, so what was shown is always a beginning of the final text. Where the tokenizer has
    `channel_marks` (gpt-oss) and the tokens use them, the text is that of the channel `final` alone, without headers.

    Args:
        tokenizer: has `token_bytes(token) -> bytes`, and perhaps channel_marks, names by token.
        stop: strings, none empty.
    """

    def __init__(self, tokenizer, stop: Iterable[str] = ()):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest_stop = max(map(len, self._stop), default=0)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._taken = 0
        self._marks = getattr(tokenizer, "channel_marks", {})
        self._header: bytes | None = None  # of a message, while it is read
        self._names_channel, self._is_shown = False, True

    def push(self, token: int) -> None:
        """Adds a token; sets `stopped` and cuts the text if it completes a stop string."""
        if mark := self._marks.get(token):
            if mark == "<|message|>":
                named = (self._header or b"").split()
                self._is_shown = not self._names_channel or named[:1] == [b"final"]
            self._header = None if mark == "<|message|>" else b""
            self._names_channel = mark == "<|channel|>"
        elif self._header is not None:
            self._header += self._tokenizer.token_bytes(token)
        elif self._is_shown:
            self._extend(self._decoder.decode(self._tokenizer.token_bytes(token)))

    def finish(self) -> None:
        """No more tokens: an unfinished character becomes U+FFFD, and nothing is held back any longer."""
        if not self.stopped:
            self._extend(self._decoder.decode(b"", final=True))
        self._longest_stop = 0

    def take(self) -> str:
        """The text that is certain by now and was not taken before."""
        certain = len(self.text) - self._held_back()
        piece = self.text[self._taken : certain]
        self._taken = certain
        return piece

    def _extend(self, piece: str) -> None:
        first_new = max(0, len(self.text) - self._longest_stop + 1)
        self.text += piece
        starts = [start for stop in self._stop if (start := self.text.find(stop, first_new)) >= 0]
        if starts:
            self.text = self.text[: min(starts)]
            self.stopped = True

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stopped:
            return 0
        for length in range(min(len(self.text), self._longest_stop - 1), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return length
        return 0
