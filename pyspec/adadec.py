"""adadec: greedy text that looks ahead where the model is unsure of the next token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from pyspec.arguments import read_integer, read_number
from pyspec.branches import Branches, trunk_of
from pyspec.generate import Generation, check_limits, check_stream, stop_strings
from pyspec.ops.row_statistics import TOP
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import Sequence, TextStream
from pyspec.stats import Stats, clock_of
from pyspec.tree import Accepted, DraftTree


def adadec(
    model: Runner,
    tokens,
    *,
    threshold: float = 1.0,
    choices: int = 3,
    depth: int = 5,
    max_new_tokens: int = 256,
    stop: str | Iterable[str] = (),
    stream: Callable[[str], None] | None = None,
) -> Generation:
    """Continues a prompt greedily, looking ahead where the next token is unsure (AdaDec, arXiv 2506.08980).

    Where the entropy of the law is below a threshold, the likeliest token is taken. Elsewhere each of the few likeliest
    is continued greedily, and the one whose tokens have the highest mean log probability is taken, itself included. The
    look-aheads are branches of one tree, verified level by level; what they have computed of the text is used. The text
    is no longer the model's greedy text: the rule is a heuristic.

    Args:
        model: a runner, from pyspec.load.
        tokens: the token ids of one prompt, at least two of them.
        threshold: nats, at least 0: the dial. 0 looks ahead at every token, inf at none. The authors learn it for each
            model: 0.6 to 1.3 for models of 0.6B to 8B.
        choices: likeliest tokens that are looked ahead from, in [1, 8].
        depth: tokens of a look-ahead, at least 1; it ends with an end token. The authors' also ends with a code block.
        max_new_tokens, stop, stream: as for generate.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any work.
    """
    prompt = trunk_of(tokens, model)
    stop = stop_strings(stop, model)
    if stream is not None:
        check_stream(stream, model)
    _, max_new_tokens = check_limits("auto", max_new_tokens)
    threshold, choices, depth = check_adadec(threshold, choices, depth)
    text = Sequence(
        model=model,
        context=list(prompt),
        prompt_length=len(prompt),
        limit=min(len(prompt) + max_new_tokens, model.context_length),
        drafter=None,
        sampler=Sampler(seed=0),
        text=None if model.tokenizer is None else TextStream(model.tokenizer, stop),
        stream=stream,
    )
    stats = Stats(seed=0)
    stats.clock = clock_of(model)
    with exclusive_use(model), stats.timed("total"):
        _write(_Walk(text, threshold, choices, depth, stats), text, stats)
    stats.new_tokens = len(text.new_tokens)
    said = None if text.text is None else text.text.text
    return Generation(text.new_tokens, said, text.finish_reason, text.error, stats)


def check_adadec(threshold: float, choices: int, depth: int) -> tuple[float, int, int]:
    """Checks the settings of adadec; raises TypeError or ValueError for any others."""
    threshold = read_number("threshold", threshold)
    choices, depth = read_integer("choices", choices), read_integer("depth", depth)
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not 1 <= choices <= TOP:
        raise ValueError(f"choices must be in [1, {TOP}], got {choices}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return threshold, choices, depth


def _write(walk: _Walk, text: Sequence, stats: Stats) -> None:
    tokens = 0
    try:
        while text.going:
            token = walk.choose()
            if token is None:
                text.error = f"the logits at position {len(text.context) - 1} are no law"
                text.finish("error")
                break
            text.extend(DraftTree.chain(text.context[-1:]), Accepted([0], token))
            tokens += 1
            stats.accepted_lengths = [0, tokens]
            if text.going:
                walk.take(token)
    except KeyboardInterrupt:
        text.finish("interrupted")


class _Row(NamedTuple):
    """The likeliest tokens after a node and their log probabilities, best first; and the entropy, in nats."""

    tokens: list[int]
    logprobs: list[float]
    entropy: float


class _Walk:
    """The text as a node of a tree, and what was looked at below it."""

    def __init__(self, text: Sequence, threshold: float, choices: int, depth: int, stats: Stats):
        self._model, self._text, self._stats = text.model, text, stats
        self._threshold, self._choices, self._depth = threshold, choices, depth
        with stats.timed("prefill"):
            living = text.limit - len(text.context) + choices * depth
            self._branches = Branches.after(self._model, text.context, living)
        self._node = 0
        self._rows: dict[int, _Row] = {}
        self._children: dict[tuple[int, int], int] = {}  # by node and token
        self._read([0])

    def choose(self) -> int | None:
        """The token that comes next; None where the logits are no law."""
        row = self._rows[self._node]
        if not math.isfinite(row.logprobs[0]):
            return None
        if row.entropy < self._threshold or self._choices == 1:
            return row.tokens[0]
        return self._look_ahead(row)

    def take(self, token: int) -> None:
        """Goes on to a token."""
        (node,) = self._below([(self._node, token)])
        row = self._rows[node]
        with self._stats.timed("commit"):
            (self._node,) = self._branches.prune([node])
        if self._node != node:  # all numbers are new, and the look-aheads are forgotten
            self._rows, self._children = {self._node: row}, {}

    def _look_ahead(self, row: _Row) -> int:
        candidates = [
            (token, logprob)
            for token, logprob in zip(row.tokens[: self._choices], row.logprobs, strict=False)
            if logprob > -math.inf
        ]
        paths = [[token] for token, _ in candidates]
        totals = [logprob for _, logprob in candidates]
        ends = [self._node] * len(paths)
        ahead = min(self._depth, self._model.context_length - len(self._text.context) - 1)
        for _ in range(ahead):
            going = [place for place, path in enumerate(paths) if path[-1] not in self._model.eos_tokens]
            found = self._below([(ends[place], paths[place][-1]) for place in going])
            for place, node in zip(going, found, strict=True):
                ends[place] = node
                paths[place].append(self._rows[node].tokens[0])
                totals[place] += self._rows[node].logprobs[0]
        scores = [total / len(path) for total, path in zip(totals, paths, strict=True)]
        return paths[int(np.argmax(scores))][0]  # of equals the likelier token

    def _below(self, asked: list[tuple[int, int]]) -> list[int]:
        """The nodes of tokens below nodes; those that are new are verified together."""
        new = [edge for edge in asked if edge not in self._children]
        if new:
            nodes = self._branches.add([node for node, _ in new], [token for _, token in new])
            self._children |= zip(new, nodes, strict=True)
            self._read(nodes)
        return [self._children[edge] for edge in asked]

    def _read(self, nodes: list[int]) -> None:
        with self._stats.timed("verify"):
            verified = self._branches.rows()
            found = verified.statistics
        self._stats.rounds, self._stats.nodes = self._stats.rounds + 1, self._stats.nodes + len(nodes)
        best = found.top_logits.astype(np.float64) - found.log_sum_exp[:, None]
        for place, node in enumerate(nodes):
            tokens = found.top_tokens[place].tolist()
            self._rows[node] = _Row(tokens, best[place].tolist(), float(found.entropy[place]))
