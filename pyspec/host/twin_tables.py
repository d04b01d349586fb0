"""The tables of STAND, ADED, N-Grammys and suffix lookup in plain Python, and what they share; see twins.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pyspec.ops.row_statistics import TOP

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
# levels of shares: above which, how often such a guess is right, and about which share it stands for
ABOVE = (0.95, 0.85, 0.7, 0.5, 0.35, 0.22, 0.13, 0.07, 0.03)
PRIORS = (0.68, 0.53, 0.45, 0.38, 0.3, 0.22, 0.16, 0.13, 0.1, 0.09)
SHARES = (0.98, 0.9, 0.78, 0.6, 0.42, 0.28, 0.17, 0.1, 0.05, 0.015)


def level_of(share: float) -> int:
    return next((level for level, above in enumerate(ABOVE) if share > above), len(ABOVE))


def hashed(key: int, bits: int) -> int:
    return (key * GOLDEN & WORD) >> (64 - bits)


def ngram_key(newest_first: Sequence[int]) -> int:
    """The key of an n-gram; see csrc/host/generations.h."""
    key = 0
    for token in newest_first:
        key = (key ^ (token + 1)) * GOLDEN & WORD
        key ^= key >> 29
    return key


class SamplerNoise:
    """The noise of pyspec.sampling.sampler.Sampler, number by number; see csrc/host/coupling.h."""

    def __init__(self, seed: int, temperature: float):
        self._seed, self._temperature = seed, temperature

    def gumbel(self, position: int, token: int) -> float:
        bits = np.random.Philox(key=self._seed, counter=[token // 4, 0, position, 0])
        word = int(bits.random_raw(4)[token % 4])
        return -math.log(-math.log(((word >> 12) + 0.5) * 2.0**-52))

    def couple(self, position: int, tokens: Sequence[int], shares: Sequence[float]) -> list[float]:
        scores = [
            math.log(max(share, 1e-9)) / self._temperature + self.gumbel(position, token)
            for token, share in zip(tokens, shares, strict=True)
        ]
        weights = [math.exp(score - max(scores)) for score in scores]
        total = sum(weights)
        return [weight / total for weight in weights]


class Draw(NamedTuple):
    """The draw that decides a token: without noise it is greedy."""

    noise: SamplerNoise | None
    position: int


def ranked(draw: Draw, tokens: Sequence[int], shares: Sequence[float]) -> tuple[list[int], Sequence[float]]:
    """Places of tokens, the likeliest to be drawn first, and what they were ordered by."""
    weights = shares if draw.noise is None or not tokens else draw.noise.couple(draw.position, tokens, shares)
    return sorted(range(len(tokens)), key=lambda place: -weights[place]), weights


class GuessedTree:
    """A tree that somebody else has guessed below the text; see csrc/host/guessed_tree.h."""

    RANKS = 3

    def __init__(self):
        self._children: list[list[tuple[int, int, float]]] = []  # of each node: node, token, share
        self._length = 0

    def priors(self) -> list[float]:
        return [0.0, *SHARES * (2 * self.RANKS)]

    def hold(self, tokens: np.ndarray, parents: np.ndarray, chances: np.ndarray, length: int) -> None:
        if not len(tokens) == len(parents) == len(chances):
            raise ValueError("tokens, parents and chances must be equally many")
        self._children, self._length = [[] for _ in tokens], length
        chances = chances.tolist()
        for node, (token, parent) in enumerate(zip(tokens.tolist(), parents.tolist(), strict=True)):
            if node:
                self._children[parent].append((node, token, chances[node] / chances[parent]))

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        node = 0
        for wanted in recent[self._length :]:
            node = next((child for child, token, _ in self._of(node) if token == wanted), -1)
        tokens, shares = [token for _, token, _ in self._of(node)], [share for *_, share in self._of(node)]
        order, weights = ranked(draw, tokens, shares)
        kinds = [min(rank, self.RANKS - 1) + (self.RANKS if node else 0) for rank in range(len(order))]
        return [
            (tokens[place], 1 + kind * len(SHARES) + level_of(weights[place]))
            for place, kind in zip(order, kinds, strict=True)
        ]

    def _of(self, node: int) -> list[tuple[int, int, float]]:
        return self._children[node] if 0 <= node < len(self._children) else []


class Generations:
    """At most `capacity` rows by key, in two halves, the older of which is forgotten as a whole."""

    def __init__(self, capacity: int, empty):
        self._half, self._empty = max(1, capacity // 2), empty
        self.newer: dict[int, object] = {}
        self.older: dict[int, object] = {}

    def __len__(self) -> int:
        return len(self.newer) + len(self.older)

    def find(self, key: int):
        return self.newer.get(key, self.older.get(key))

    def row(self, key: int):
        """The row to write to, made if it is not there."""
        if key not in self.newer:
            row = self.older.pop(key) if key in self.older else self._empty()
            if len(self.newer) == self._half:
                self.older, self.newer = self.newer, {}
            self.newer[key] = row
        return self.newer[key]

    def items(self) -> list:
        """(key, row) of all, the older half first."""
        return [*self.older.items(), *self.newer.items()]


class NgramMemory:
    """STAND's table; see csrc/host/ngram_memory.h. A row is [count, [(token, share), ...]]."""

    MAX_ORDER = 4
    RANKS = 3
    SHORTER = 0.5

    def __init__(self, capacity: int):
        self._rows = Generations(capacity, lambda: [0, []])

    def __len__(self) -> int:
        return len(self._rows)

    def priors(self) -> list[float]:
        return [0.0, *PRIORS * (self.MAX_ORDER * self.RANKS)]

    def update(self, tokens, parents, before: Sequence[int], top_tokens, top_logits) -> None:
        tokens, parents = tokens.tolist(), parents.tolist()
        for node, logits in enumerate(top_logits.tolist()):
            weights = [math.exp(logit - logits[0]) for logit in logits]
            total = sum(weights)
            if not math.isfinite(total):
                continue
            emitted = {
                token: weight / total
                for token, weight in zip(top_tokens[node].tolist(), weights, strict=True)
                if token >= 0
            }
            path, at = [], node
            while at >= 0:
                path.append(tokens[at])
                at = parents[at]
            path += reversed(before)
            for order in range(1, min(self.MAX_ORDER, len(path)) + 1):
                self._merge(self._rows.row(ngram_key(path[:order])), emitted)

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        law: dict[int, float] = {}
        orders = 0
        while orders < min(self.MAX_ORDER, len(recent)):
            row = self._rows.find(ngram_key(recent[: -orders - 2 : -1]))
            if row is None:
                break
            count, known = row
            weight = count / (count + self.SHORTER) if orders else 1.0
            law = {token: share * (1 - weight) for token, share in law.items()}
            for token, share in known:
                law[token] = law.get(token, 0.0) + weight * float(share)
            orders += 1
        tokens = list(law)
        places, weights = ranked(draw, tokens, list(law.values()))
        offers = []
        for rank, place in enumerate(places):
            kind = (orders - 1) * self.RANKS + min(rank, self.RANKS - 1)
            offers.append((tokens[place], 1 + kind * len(PRIORS) + level_of(weights[place])))
        return offers

    def saved(self) -> tuple[np.ndarray, ...]:
        items = self._rows.items()
        tokens, shares = np.full((len(items), TOP), -1, np.int32), np.zeros((len(items), TOP), np.float32)
        for place, (_, (_, known)) in enumerate(items):
            for rank, (token, share) in enumerate(known):
                tokens[place, rank], shares[place, rank] = token, share
        keys = np.array([key for key, _ in items], np.uint64)
        return keys, np.array([row[0] for _, row in items], np.int32), tokens, shares

    def load(self, keys, counts, tokens, shares) -> None:
        for key, count, row, of_row in zip(keys.tolist(), counts.tolist(), tokens.tolist(), shares, strict=True):
            known = [(token, share) for token, share in zip(row, of_row, strict=True) if token >= 0]
            self._rows.row(key)[:] = [count, known]

    @staticmethod
    def _merge(row: list, emitted: dict[int, float]) -> None:
        count, known = row
        entries = [
            (token, np.float32((count * float(share) + emitted.get(token, 0.0)) / (count + 1)))
            for token, share in known
        ]
        old = {token for token, _ in known}
        entries += [(token, np.float32(share / (count + 1))) for token, share in emitted.items() if token not in old]
        row[:] = [count + 1, sorted(entries, key=lambda entry: -entry[1])[:TOP]]


class Trigrams:
    """The table of ADED; see csrc/host/trigrams.h. A row is [total, {token: [count, bonus]}]."""

    FOLLOWERS = 12
    WINDOW = 16
    BONUS, MOST_BONUS = np.float32(0.04), np.float32(3)
    BONUSES = 4

    def __init__(self, capacity: int):
        self._rows = Generations(capacity, lambda: [0, {}])

    def __len__(self) -> int:
        return len(self._rows)

    def priors(self) -> list[float]:
        return [0.0, *PRIORS * self.BONUSES]

    def extend(self, tokens: Sequence[int], first: int) -> None:
        for at in range(max(first, 2), len(tokens)):
            row = self._rows.row(ngram_key((tokens[at - 1], tokens[at - 2])))
            row[0] += 1
            self._follower(row, tokens[at])[0] += 1

    def reward(self, tokens: Sequence[int]) -> None:
        for at in range(max(0, len(tokens) - self.WINDOW) + 2, len(tokens)):
            follower = self._follower(self._rows.row(ngram_key((tokens[at - 1], tokens[at - 2]))), tokens[at])
            follower[1] = min(follower[1] + self.BONUS, self.MOST_BONUS)

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        row = None if len(recent) < 2 else self._rows.find(ngram_key((recent[-1], recent[-2])))
        offers = []
        for token, (count, bonus) in [] if row is None else row[1].items():
            kind = 0 if bonus == 0 else 1 if bonus < np.float32(0.5) else 2 if bonus < np.float32(1.5) else 3
            offers.append((token, 1 + kind * len(PRIORS) + level_of(count / max(row[0], 1))))
        return offers

    def saved(self) -> tuple[np.ndarray, ...]:
        items = self._rows.items()
        tokens = np.full((len(items), self.FOLLOWERS), -1, np.int32)
        counts, bonuses = np.zeros_like(tokens), np.zeros(tokens.shape, np.float32)
        for place, (_, (_, followers)) in enumerate(items):
            for rank, (token, (count, bonus)) in enumerate(followers.items()):
                tokens[place, rank], counts[place, rank], bonuses[place, rank] = token, count, bonus
        keys = np.array([key for key, _ in items], np.uint64)
        return keys, np.array([row[0] for _, row in items], np.int32), tokens, counts, bonuses

    def load(self, keys, totals, tokens, counts, bonuses) -> None:
        for place, (key, total) in enumerate(zip(keys.tolist(), totals.tolist(), strict=True)):
            columns = zip(tokens[place].tolist(), counts[place].tolist(), bonuses[place], strict=True)
            self._rows.row(key)[:] = [total, {token: [count, bonus] for token, count, bonus in columns if token >= 0}]

    def _follower(self, row: list, token: int) -> list:
        total, followers = row
        if token not in followers and len(followers) == self.FOLLOWERS:
            scores = [count / max(total, 1) + float(bonus) for count, bonus in followers.values()]
            place = scores.index(min(scores))
            entries = [*followers.items()]
            entries[place] = (token, [0, np.float32(0)])
            followers.clear()
            followers.update(entries)
        return followers.setdefault(token, [0, np.float32(0)])


class Bigrams:
    """N-Grammys' tables; see csrc/host/bigrams.h."""

    def __init__(self, successors: np.ndarray, common: Sequence[int]):
        self._successors, self._common = successors, list(common)[:TOP]

    def priors(self) -> list[float]:
        return [0.0, *(scale / (1 + rank) for scale in (0.25, 0.04) for rank in range(TOP))]

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        row = [token for token in self._successors[recent[-1]].tolist() if token >= 0]
        offers = [(token, 1 + rank) for rank, token in enumerate(row)]
        return offers + [(token, 1 + TOP + rank) for rank, token in enumerate(self._common) if token not in row]


class Cursor:
    """Where a text of SuffixLookup goes on."""

    def __init__(self):
        self.generation, self.piece = -1, []


class SuffixLookup:
    """What csrc/host/suffix_automaton.h finds, from the followers of every n-gram of up to 32 tokens."""

    LONGEST_MATCH = 32
    UP_TO = (1, 2, 3, 4, 6, 9, 16)
    TRUST = (0.3, 0.5, 0.66, 0.75, 0.82, 0.88, 0.93, 0.97)
    MAX_COUNT = 3
    MAX_OFFERS = 16
    MAX_MATCHES = 4
    MAX_FOLLOWERS = 32
    PIECE = 1024

    def __init__(self, capacity: int):
        self._half = max(1, capacity // 2)
        # by n-gram: how often it came, and how often each token followed it
        self._newer: dict[tuple[int, ...], tuple[list[int], dict[int, int]]] = {}
        self._older: dict[tuple[int, ...], tuple[list[int], dict[int, int]]] = {}
        self._sizes = [0, 0]  # tokens of newer and older
        self._generation = 0

    def __len__(self) -> int:
        return sum(self._sizes)

    def priors(self) -> list[float]:
        counts, others = range(1, self.MAX_COUNT + 1), range(self.MAX_COUNT + 1)
        return [0.0] + [
            trust * count / (count + other + 0.3)
            for trust, count, other in itertools.product(self.TRUST, counts, others)
        ]

    def extend(self, cursor: Cursor, tokens: Sequence[int]) -> Cursor:
        for token in tokens:
            if self._sizes[0] == self._half:
                self._older, self._newer = self._newer, {}
                self._sizes = [0, self._sizes[0]]
                self._generation += 1
            if cursor.generation != self._generation or len(cursor.piece) == self.PIECE:
                cursor = Cursor()
                cursor.generation = self._generation
            for order in range(1, min(self.LONGEST_MATCH, len(cursor.piece)) + 1):
                _, followers = self._newer[tuple(cursor.piece[-order:])]
                followers[token] = followers.get(token, 0) + 1
            cursor.piece.append(token)
            for order in range(1, min(self.LONGEST_MATCH, len(cursor.piece)) + 1):
                self._newer.setdefault(tuple(cursor.piece[-order:]), ([0], {}))[0][0] += 1
            self._sizes[0] += 1
        return cursor

    def offer(self, recent: Sequence[int], draw: Draw) -> list[tuple[int, int]]:
        offers: dict[int, int] = {}
        matches = [match for table in (self._newer, self._older) for match in self._matches(table, recent)]
        with_followers = [match for match in sorted(matches, key=lambda match: -match[0]) if match[1]]
        for order, followers in with_followers[: self.MAX_MATCHES]:
            first = list(followers.items())[: self.MAX_FOLLOWERS]
            total = sum(count for _, count in first)
            for token, count in sorted(first, key=lambda follower: -follower[1]):
                if len(offers) == self.MAX_OFFERS:
                    return list(offers.items())
                kind = sum(order > length for length in self.UP_TO) * self.MAX_COUNT
                kind = (kind + min(count, self.MAX_COUNT) - 1) * (self.MAX_COUNT + 1)
                offers.setdefault(token, 1 + kind + min(total - count, self.MAX_COUNT))
        return list(offers.items())

    def _matches(self, table: dict, recent: Sequence[int]) -> list[tuple[int, dict[int, int]]]:
        """(length, followers) of the newest tokens, longest first, where a shorter n-gram came more often."""
        found, before = [], 0
        for order in range(min(self.LONGEST_MATCH, len(recent)), 0, -1):
            (count,), followers = table.get(tuple(recent[-order:]), ((0,), {}))
            if count > before:
                found.append((order, followers))
                before = count
        return found
