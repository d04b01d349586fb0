"""The loop: propose, verify, accept, commit, observe."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from pyspec.acceptance import AcceptanceRule, acceptance_from_name, check_laws
from pyspec.acceptance.sampling import InvalidLogits, Sampler
from pyspec.caches import GearCache, cache_from_name
from pyspec.costs import LARGEST, AutoBudget, DrawnBudget, costs_of
from pyspec.drafting import Drafter, drafter_from_name
from pyspec.models import Runner
from pyspec.text import TextStream
from pyspec.trees import DraftTree

__all__ = ["Generation", "Stats", "check_limits", "generate"]

LARGEST_BUDGET = 4096
MOST_NEW_TOKENS = 2**24


@dataclass
class Stats:
    """What a call of generate did, and where the time went.

    A batch counts a round once; its accepted lengths are counted for each sequence that took part.
    """

    seed: int
    new_tokens: int = 0
    rounds: int = 0
    nodes: int = 0  # tree nodes verified, roots included
    accepted_lengths: list[int] = field(default_factory=list)  # [k]: how often one sequence's round gave k tokens
    prefill_seconds: float = 0.0  # with the drafter's reading of the prompt
    draft_seconds: float = 0.0  # propose and observe
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    commit_seconds: float = 0.0
    total_seconds: float = 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a round gave a sequence; 1 is plain decoding, 0 means that there was no round."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / max(1, sum(self.accepted_lengths))

    @property
    def acceptance_by_depth(self) -> list[float]:
        """[d - 1]: the share of rounds that accepted a draft at depth d. They add up to the mean length - 1."""
        rounds = max(1, sum(self.accepted_lengths))
        return [sum(self.accepted_lengths[length:]) / rounds for length in range(2, len(self.accepted_lengths))]

    @property
    def decode_seconds(self) -> float:
        """All time but the prefill."""
        return self.total_seconds - self.prefill_seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens of the rounds over the decode time: the tokens that the prefill gave are not counted."""
        tokens = sum(length * count for length, count in enumerate(self.accepted_lengths))
        return tokens / self.decode_seconds if tokens else 0.0

    @property
    def tokens_per_second_with_prefill(self) -> float:
        """All new tokens over all time."""
        return self.new_tokens / self.total_seconds if self.new_tokens else 0.0

    def to_dict(self) -> dict:
        """All figures, the derived ones included, ready for JSON."""
        derived = (
            "mean_accepted_length",
            "acceptance_by_depth",
            "decode_seconds",
            "tokens_per_second",
            "tokens_per_second_with_prefill",
        )
        return asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass
class Generation:
    """What generate gives back; for a batch, every field but stats is a list with an entry per prompt.

    tokens: new tokens, the prompt not included; the end token and the tokens of a stop string are.
    text: of these tokens, without end token and stop string; None where the model has no tokenizer.
    finish_reason: "eos", "stop" (a stop string), "length", "interrupted" (Ctrl-C) or "error".
    error: what went wrong where finish_reason is "error", else None.
    """

    tokens: list
    text: str | list[str] | None
    finish_reason: str | list[str]
    error: str | None | list[str | None]
    stats: Stats


def generate(
    model: Runner,
    tokens: Sequence[int] | Sequence[Sequence[int]],
    *,
    drafter: str | Drafter | None = "merged",
    budget: int | str = "auto",
    acceptance: str | AcceptanceRule = "exact",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    cache: str | GearCache = "dense",
    stream: Callable | None = None,
) -> Generation:
    """Continues one prompt, or a batch of them, with tree speculation.

    The text is what the model alone would say, over the same cache: with one seed (or greedily) it is the same for
    any drafter, budget and batch, unless another acceptance rule is asked for. Ctrl-C ends it early and keeps what
    there is.

    Args:
        model: a runner, from pyspec.load.
        tokens: the token ids of one prompt, or a list of such lists; their lengths may differ.
        drafter: "merged", "lookup", "recycling", "suffix", "stand", "aded", "ngrammys", "layer_skip"
            (docs/drafting.md), a drafter, or None for plain decoding.
        budget: tree nodes a round, in [1, 4096], the last committed token being one of them; or "auto", the number
            that gives most tokens a second by the measured costs of this model on this machine (pyspec/costs.py).
        acceptance: "exact", or another rule or its name (docs/acceptance.md). "with_replacement", "recursive", "k_seq",
            "block" and "traversal" are for drafters that draw, keep more of their drafts, and keep the law of the
            text, not the text of a seed. "typical" is lossy.
        max_new_tokens: new tokens for each prompt; the model's context ends a text too.
        temperature, top_p, top_k: see Sampler; temperature 0 is greedy.
        seed: None takes one from the operating system; stats.seed tells which.
        stop: strings that end the text before they begin.
        cache: how keys and values are kept (docs/gear.md): "dense", "int8", "int4", "gear-4bit", "gear-2bit",
            "gear-l-2bit", "kivi-2bit", or a GearCache.
        stream: called with each new piece of text; for a batch with (index, piece). The pieces make up the text.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any work.
    """
    batched, prompts = _prompts(tokens, model)
    stop = _stop_strings(stop, model)
    if stream is not None and model.tokenizer is None:
        raise ValueError("stream needs text, and this model has no tokenizer")
    check_limits(budget, max_new_tokens)
    packed = _packed_cache(cache, model, budget)
    sampler = Sampler(temperature, top_k, top_p, seed)
    rule = acceptance_from_name(acceptance)
    shared_drafter = drafter_from_name(drafter, model)
    check_laws(shared_drafter, rule)
    if packed is not None and getattr(shared_drafter, "wants_dense_cache", False):
        raise ValueError(f"cache must be dense for a {type(shared_drafter).__name__}, got {cache!r}")
    if rule.siblings is None and rule.law == "exact" and hasattr(shared_drafter, "coupled_to"):
        shared_drafter = shared_drafter.coupled_to(sampler)
    auto = None
    if budget == "auto" and shared_drafter is not None:
        auto_budget = DrawnBudget if shared_drafter.proposal == "sampled" else AutoBudget
        auto = auto_budget(costs_of(model, packed))
    largest = LARGEST if budget == "auto" else budget
    if packed is not None:
        largest = min(largest, packed.largest_tree)

    stats = Stats(seed=sampler.seed)
    sequences = [
        _Sequence(
            model=model,
            context=list(prompt),
            prompt_length=len(prompt),
            limit=min(len(prompt) + max_new_tokens, model.context_length),
            drafter=None if shared_drafter is None else shared_drafter.start(prompt),
            text=None if model.tokenizer is None else TextStream(model.tokenizer, stop),
            stream=None if stream is None else _stream_of(stream, index if batched else None),
        )
        for index, prompt in enumerate(prompts)
    ]
    with _timed(stats, "total"):
        try:
            _prefill(model, sequences, rule, sampler, largest, packed, stats)
            while any(sequence.going for sequence in sequences):
                _round(model, sequences, rule, sampler, largest, auto, stats)
        except KeyboardInterrupt:
            for sequence in sequences:
                if sequence.going:
                    with suppress(KeyboardInterrupt):  # an impatient second Ctrl-C while the last text is shown
                        sequence.finish("interrupted")
    stats.new_tokens = sum(len(sequence.new_tokens) for sequence in sequences)
    return _generation(sequences, stats, batched)


def _prefill(model, sequences, rule, sampler, largest, packed, stats) -> None:
    """Reads the prompts and draws the first token of each."""

    def observe(index: int, chain: DraftTree, logits: torch.Tensor) -> None:
        sequences[index].drafter.observe(chain, logits, range(len(chain)))

    with _timed(stats, "prefill"):
        after_prompts = model.prefill(
            [sequence.context for sequence in sequences],
            capacity=max(sequence.limit for sequence in sequences) + largest,
            observe=None if sequences[0].drafter is None else observe,
            **({} if packed is None else {"cache": packed}),  # an argument that only some runners have
        )
    for sequence, logits in zip(sequences, after_prompts, strict=True):
        with _timed(stats, "accept"):
            tree = DraftTree.chain(sequence.context[-1:])
            said = sequence.accept(tree, logits[None], rule, sampler)
        sequence.emit(said)


def _round(model, sequences, rule, sampler, largest, auto, stats) -> None:
    """One round of every sequence that is still going."""
    active = [index for index, sequence in enumerate(sequences) if sequence.going]
    trees: list = [None] * len(sequences)
    paths: list = [None] * len(sequences)

    with _timed(stats, "draft"):
        nodes = largest if auto is None else min(auto.nodes, largest)
        proposed = [sequences[index].propose(nodes) for index in active]
        if auto is not None:
            proposed = auto.cut(proposed)
        for index, tree in zip(active, proposed, strict=True):
            trees[index] = tree
    with _timed(stats, "verify"):
        logits = model.verify(trees)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)  # or the kernels' time would show as acceptance
    stats.rounds += 1
    for index in active:
        sequence = sequences[index]
        with _timed(stats, "accept"):
            said = sequence.accept(trees[index], logits[index], rule, sampler)
        kept = sequence.emit(said)
        paths[index] = said.path
        if auto is not None:
            auto.learn(trees[index], said.path)
        stats.nodes += len(trees[index])
        stats.accepted_lengths += [0] * (kept + 1 - len(stats.accepted_lengths))
        stats.accepted_lengths[kept] += 1
    with _timed(stats, "commit"):
        model.commit([path if sequence.going else None for sequence, path in zip(sequences, paths, strict=True)])
    with _timed(stats, "draft"):
        for index in active:
            sequence = sequences[index]
            if sequence.drafter is not None and sequence.error is None:
                sequence.drafter.observe(trees[index], logits[index], paths[index])


class _Said(NamedTuple):
    """One round of one sequence."""

    tokens: list[int]
    path: list[int]  # accepted nodes, root included
    error: str | None = None


@dataclass
class _Sequence:
    """One prompt and what became of it."""

    model: Runner
    context: list[int]  # prompt and new tokens; the last one's key is not cached yet
    prompt_length: int
    limit: int  # tokens of the context at which it ends
    drafter: Drafter | None
    text: TextStream | None
    stream: Callable[[str], None] | None
    finish_reason: str | None = None
    error: str | None = None

    @property
    def going(self) -> bool:
        return self.finish_reason is None

    @property
    def new_tokens(self) -> list[int]:
        return self.context[self.prompt_length :]

    def propose(self, budget: int) -> DraftTree:
        # a tree of as many nodes as tokens are left is never too deep for the limit or the context
        budget = min(budget, self.limit - len(self.context))
        if self.drafter is None or budget == 1:
            return DraftTree.chain(self.context[-1:])
        tree = self.drafter.propose(self.context, budget)
        tokens = tree.tokens.tolist()
        if len(tokens) > budget or tokens[0] != self.context[-1]:
            raise ValueError(
                f"drafter must propose at most {budget} nodes below token {self.context[-1]}, "
                f"got {len(tokens)} below token {tokens[0]}"
            )
        if min(tokens) < 0 or max(tokens) >= self.model.vocab_size:
            raise ValueError(f"drafter proposed tokens outside of [0, {self.model.vocab_size}): {tokens}")
        return tree

    def accept(self, tree: DraftTree, logits: torch.Tensor, rule: AcceptanceRule, sampler: Sampler) -> _Said:
        tokens = tree.tokens.tolist()
        try:
            path, next_token = rule.accept(tree, logits, sampler, len(self.context))
        except InvalidLogits as invalid:
            # the drafts up to that node were accepted, as plain decoding would have said them before it failed
            return _Said([tokens[node] for node in invalid.path[1:]], invalid.path, self._describe(invalid, tree))
        return _Said([*(tokens[node] for node in path[1:]), next_token], path)

    def emit(self, said: _Said) -> int:
        """Adds tokens up to the one that ends the text, and streams; returns how many were added."""
        before = len(self.context)
        for token in said.tokens:
            self.context.append(token)
            if token in self.model.eos_tokens:
                self.finish("eos")
            elif self.text is not None:
                self.text.push(token)
                if self.text.stopped:
                    self.finish("stop")
            if self.going and len(self.context) >= self.limit:
                self.finish("length")
            if not self.going:
                break
        if self.going and said.error is not None:
            self.error = said.error
            self.finish("error")
        if self.going:
            self._show()
        return len(self.context) - before

    def finish(self, reason: str) -> None:
        self.finish_reason = reason
        if self.text is not None:
            self.text.finish()
            self._show()

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


def _generation(sequences: list[_Sequence], stats: Stats, batched: bool) -> Generation:
    fields = (
        [sequence.new_tokens for sequence in sequences],
        [None if sequence.text is None else sequence.text.text for sequence in sequences],
        [sequence.finish_reason for sequence in sequences],
        [sequence.error for sequence in sequences],
    )
    if not batched:
        fields = tuple(values[0] for values in fields)
    elif sequences[0].text is None:
        fields = (fields[0], None, *fields[2:])
    return Generation(*fields, stats=stats)


@contextmanager
def _timed(stats: Stats, phase: str) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        name = f"{phase}_seconds"
        setattr(stats, name, getattr(stats, name) + time.perf_counter() - start)


def _stream_of(stream: Callable, index: int | None) -> Callable[[str], None]:
    return stream if index is None else lambda piece: stream(index, piece)


def _prompts(tokens, model: Runner) -> tuple[bool, list[list[int]]]:
    """Whether tokens is a batch, and its prompts."""
    if hasattr(tokens, "tolist"):  # a tensor or an array
        tokens = tokens.tolist()
    batched = len(tokens) > 0 and not isinstance(tokens, str) and isinstance(tokens[0], Sequence)
    try:
        prompts = [[operator.index(token) for token in prompt] for prompt in (tokens if batched else [tokens])]
    except TypeError:
        raise TypeError(
            f"tokens must be token ids, or lists of them for a batch (tokenizer.encode makes them), got {tokens!r:.80}"
        ) from None
    for number, prompt in enumerate(prompts):
        name = f"tokens[{number}]" if batched else "tokens"
        if not prompt:
            raise ValueError(f"{name} must not be empty: the prompt gives the model the position to speak from")
        if len(prompt) >= model.context_length:
            raise ValueError(
                f"{name} must leave room in the model's context of {model.context_length} tokens, got {len(prompt)}"
            )
        if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
            raise ValueError(
                f"{name} must hold tokens of the model's vocabulary, in [0, {model.vocab_size}), "
                f"got {min(prompt)} to {max(prompt)}"
            )
    return batched, prompts


def _stop_strings(stop: str | Sequence[str], model: Runner) -> tuple[str, ...]:
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    for string in stop:
        if not isinstance(string, str) or not string:
            raise ValueError(f"stop must be strings that are not empty, got {string!r}")
    if stop and model.tokenizer is None:
        raise ValueError("stop needs text, and this model has no tokenizer")
    return stop


def _packed_cache(cache: str | GearCache, model: Runner, budget: int | str) -> GearCache | None:
    """How keys and values are packed, None for a dense cache; raises ValueError where model or budget do not fit."""
    packed = cache_from_name(cache)
    if packed is None:
        return None
    if not getattr(model, "takes_packed_cache", False):
        raise ValueError(f"cache must be dense for a {type(model).__name__}, got {cache!r}")
    if budget != "auto" and budget > packed.largest_tree:
        raise ValueError(f"budget must be at most {packed.largest_tree} nodes with cache {cache!r}, got {budget}")
    return packed


def check_limits(budget: int | str, max_new_tokens: int) -> None:
    """Raises TypeError or ValueError for a budget or a number of new tokens that generate does not take."""
    if budget == "auto":
        budget = LARGEST
    for name, value, largest in (
        ("budget", budget, LARGEST_BUDGET),
        ("max_new_tokens", max_new_tokens, MOST_NEW_TOKENS),
    ):
        if isinstance(value, bool) or not isinstance(value, int):
            or_auto = ' or "auto"' if name == "budget" else ""
            raise TypeError(f"{name} must be an integer{or_auto}, got {value!r}")
        if not 1 <= value <= largest:
            raise ValueError(f"{name} must be in [1, {largest}], got {value}")
