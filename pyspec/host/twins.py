"""Host twins: the structures of pyspec._host in plain Python, which run without it and which it is tested against."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

import numpy as np

from pyspec.host.twin_tables import (  # noqa: F401  (host() takes all structures from here)
    PRIORS,
    SHARES,
    Bigrams,
    Cursor,
    Draw,
    GuessedTree,
    NgramMemory,
    SamplerNoise,
    SuffixLookup,
    Trigrams,
    hashed,
    level_of,
    ranked,
)
from pyspec.ops.row_statistics import TOP


class NgramIndex:
    """Prompt lookup: what followed earlier occurrences of the newest tokens; see csrc/host/ngram_index.h."""

    MAX_ORDER = 6
    MAX_COUNT = 3
    MAX_OFFERS = 16
    MAX_FOLLOWERS = 64
    TRUST = (0.08, 0.4, 0.66, 0.78, 0.82, 0.88, 0.97)  # by order

    def __init__(self):
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], dict[int, tuple[int, int]]] = {}  # token: (count, last position)
        self._totals: dict[tuple[int, ...], tuple[int, int]] = {}  # count of all, and the latest follower

    def __len__(self) -> int:
        return len(self._tokens)

    def priors(self) -> list[float]:
        counts, others = range(1, self.MAX_COUNT + 1), range(self.MAX_COUNT + 1)
        return [0.0] + [
            trust * count / (count + other + 0.3)
            for trust, count, other, _ in itertools.product(self.TRUST, counts, others, (False, True))
        ]

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            position = len(self._tokens)
            for order in range(min(self.MAX_ORDER, position) + 1):
                ngram = tuple(self._tokens[position - order :])
                followers = self._followers.setdefault(ngram, {})
                if token not in followers and len(followers) == self.MAX_FOLLOWERS:
                    del followers[min(followers, key=followers.__getitem__)]
                followers[token] = (followers.get(token, (0, 0))[0] + 1, position)
                self._totals[ngram] = (self._totals.get(ngram, (0, 0))[0] + 1, token)
            self._tokens.append(token)

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        offers: dict[int, int] = {}
        for order in range(min(self.MAX_ORDER, len(recent)), -1, -1):
            ngram = tuple(recent[len(recent) - order :])
            if ngram not in self._followers:
                continue
            total, latest = self._totals[ngram]
            ranked = sorted(self._followers[ngram].items(), key=lambda item: item[1], reverse=True)
            for token, (count, _) in ranked[: self.MAX_OFFERS]:
                kind = order * self.MAX_COUNT + min(count, self.MAX_COUNT) - 1
                kind = kind * (self.MAX_COUNT + 1) + min(total - count, self.MAX_COUNT)
                offers.setdefault(token, 1 + kind * 2 + (token == latest))
        return list(offers.items())


class Adjacency:
    """Token Recycling: what the target last thought could follow a token, or two; see csrc/host/adjacency.h."""

    RANKS = 3
    PAIR_BITS = 16
    level_count = len(PRIORS)

    def __init__(self, vocab_size: int, context: int):
        self.vocab_size = vocab_size
        self.context = context
        rows = vocab_size if context == 1 else 1 << self.PAIR_BITS
        self.keys = np.full(rows, -1, np.int64)
        self.successors = np.full((rows, TOP), -1, np.int32)
        self.levels = np.zeros((rows, TOP), np.uint8)

    def priors(self) -> list[float]:
        return [0.0, *PRIORS * self.RANKS]

    def update(
        self,
        tokens: np.ndarray,
        parents: np.ndarray,
        previous: int,
        top_tokens: np.ndarray,
        top_logits: np.ndarray,
    ) -> None:
        tokens = tokens.tolist()
        for node, token in enumerate(tokens):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"tokens[{node}] is outside the vocabulary")
        for node, (parent, logits) in enumerate(zip(parents.tolist(), top_logits.tolist(), strict=True)):
            key = self._key(tokens[parent] if node else previous, tokens[node])
            if key < 0:
                continue
            row = self._row(key)
            weights = [math.exp(logit - logits[0]) for logit in logits]
            total = sum(weights)
            self.keys[row] = key
            self.successors[row] = top_tokens[node]
            self.levels[row] = [level_of(weight / total) for weight in weights]

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        key = self._key(recent[-2] if len(recent) > 1 else -1, recent[-1])
        if key < 0 or self.keys[self._row(key)] != key:
            return []
        tokens, levels = self.successors[self._row(key)].tolist(), self.levels[self._row(key)].tolist()
        tokens = [token for token in tokens if token >= 0]
        order, weights = ranked(draw, tokens, [SHARES[level] for level in levels[: len(tokens)]])
        offers = []
        for rank, place in enumerate(order):
            level = levels[rank] if draw.noise is None else level_of(weights[place])
            offers.append((tokens[place], 1 + min(rank, self.RANKS - 1) * self.level_count + level))
        return offers

    def _key(self, previous: int, token: int) -> int:
        if self.context == 1:
            return token
        return -1 if previous < 0 else previous * self.vocab_size + token

    def _row(self, key: int) -> int:
        if self.context == 1:
            return key
        return hashed(key, self.PAIR_BITS)


class Estimates:
    """How often offers of each kind turned out to be what the target emitted; see csrc/host/growth.h."""

    CELL_BITS = 16

    def __init__(self, priors: Sequence[Sequence[float]], smoothing: float):
        self.priors = priors
        self.smoothing = smoothing
        sizes = [len(prior) for prior in priors]
        self.strides = [math.prod(sizes[:source]) for source in range(len(sizes))]
        self._firsts = [sum(sizes[:source]) for source in range(len(sizes))]
        self._together = sum(sizes)
        self._keys = np.full(1 << self.CELL_BITS, -1, np.int64)
        self.hits = np.zeros(sum(sizes) + len(self._keys))
        self.trials = np.zeros_like(self.hits)

    def rate(self, cell: int) -> float:
        offering = self._offering(cell)
        rates = sorted(
            self._smoothed(self._firsts[source] + feature, self.priors[source][feature]) for source, feature in offering
        )
        if len(offering) == 1:
            return rates[0]
        either = 1 - (1 - rates[-1]) * (1 - rates[-2])
        slot = hashed(cell, self.CELL_BITS)
        return either if self._keys[slot] != cell else self._smoothed(self._together + slot, either)

    def learn(self, tokens: np.ndarray, parents: np.ndarray, cells: np.ndarray, top_tokens: np.ndarray) -> None:
        for token, parent, cell in list(zip(tokens.tolist(), parents.tolist(), cells.tolist(), strict=True))[1:]:
            if parent < len(top_tokens):
                self._count(cell, int(top_tokens[parent, 0]) == token)

    def learn_emitted(self, tokens: np.ndarray, parents: np.ndarray, cells: np.ndarray, emitted: Sequence[int]) -> None:
        node = 0
        for token in emitted:
            children = np.flatnonzero(parents == node).tolist()
            for child in children:
                self._count(int(cells[child]), int(tokens[child]) == token)
            node = next((child for child in children if int(tokens[child]) == token), None)
            if node is None:
                break

    def _count(self, cell: int, hit: bool) -> None:
        offering = self._offering(cell)
        places = [self._firsts[source] + feature for source, feature in offering]
        if len(offering) > 1:
            slot = hashed(cell, self.CELL_BITS)
            places.append(self._together + slot)
            if self._keys[slot] != cell:
                self._keys[slot] = cell
                self.hits[places[-1]] = self.trials[places[-1]] = 0
        for place in places:
            self.hits[place] += hit
            self.trials[place] += 1

    def _offering(self, cell: int) -> list[tuple[int, int]]:
        features = [cell // stride % len(prior) for stride, prior in zip(self.strides, self.priors, strict=True)]
        return [(source, feature) for source, feature in enumerate(features) if feature]

    def _smoothed(self, place: int, prior: float) -> float:
        return (float(self.hits[place]) + self.smoothing * prior) / (float(self.trials[place]) + self.smoothing)


def grow(
    sources: Sequence,
    estimates: Estimates,
    recent: Sequence[int],
    budget: int,
    noise: SamplerNoise | None = None,
    position: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A tree below recent[-1], best node first: tokens int64, parents int32, each edge's cell int64, chances fp32."""
    tokens: list[int] = []
    parents: list[int] = []
    cells: list[int] = []
    chances: list[float] = []
    paths: list[list[int]] = []
    candidates = [(-1.0, 0, recent[-1], -1, 0)]
    discovered = 1
    while candidates and len(tokens) < budget:
        negated, _, token, parent, cell = heapq.heappop(candidates)
        node = len(tokens)
        tokens.append(token)
        parents.append(parent)
        cells.append(cell)
        chances.append(-negated)
        paths.append(paths[parent] + [token] if node else [])
        children: dict[int, int] = {}
        for source, stride in zip(sources, estimates.strides, strict=True):
            draw = Draw(noise, position + len(paths[node]))
            for child, feature in source.offer([*recent, *paths[node]], draw):
                children[child] = children.get(child, 0) + feature * stride
        for child, cell in children.items():
            heapq.heappush(candidates, (negated * estimates.rate(cell), discovered, child, node, cell))
            discovered += 1
    return (
        np.array(tokens, np.int64),
        np.array(parents, np.int32),
        np.array(cells, np.int64),
        np.array(chances, np.float32),
    )


def tree_layout(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """depths [T] and ancestor_bits [T, ceil(T / 32)], both int32, of parents [T] int32; see pyspec.tree.DraftTree."""
    if parents[0] != -1:
        raise ValueError(f"parents[0] must be -1 (the root), got {parents[0]}")
    depths, rows = [0], [1]
    for node, parent in enumerate(parents[1:].tolist(), start=1):
        if not 0 <= parent < node:
            raise ValueError(f"parents[{node}] must be in [0, {node}), parents before children, got {parent}")
        depths.append(depths[parent] + 1)
        rows.append(rows[parent] | 1 << node)
    words = (len(rows) + 31) // 32
    joined = b"".join(row.to_bytes(4 * words, "little") for row in rows)
    bits = np.frombuffer(bytearray(joined), dtype="<i4").reshape(len(rows), words)
    return np.array(depths, np.int32), bits
