"""Chunk drafts: what followed a token in other texts where the model was in a state like this one."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyspec.arguments import read_number
from pyspec.runners import Runner
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

ARRAYS = {"tokens": "i", "keys": "f", "chunks": "i", "starts": "i", "fingerprint": "U"}  # of the file, and their kinds


class ChunkStore(NamedTuple):
    """Chunks by the token that they follow, and by the model's hidden state before that token.

    Attributes:
        tokens: [N] integers, ascending: what each chunk follows.
        keys: [N, H] float16, of length 1: what the last norm gave where that token was predicted.
        chunks: [C] integers: all chunks, one after another.
        starts: [N + 1] integers: where each begins.
        fingerprint: of the model that the keys are of.
    """

    tokens: np.ndarray
    keys: np.ndarray
    chunks: np.ndarray
    starts: np.ndarray
    fingerprint: str

    @classmethod
    def load(cls, path: str | os.PathLike) -> ChunkStore:
        """What `python -m training.chunks` wrote. Raises FileNotFoundError, or ValueError for another file."""
        try:
            with np.load(Path(path)) as found:
                arrays = {name: found[name] for name in ARRAYS}
        except (ValueError, EOFError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is no file of python -m training.chunks") from None
        store = cls(**arrays | {"fingerprint": str(arrays["fingerprint"])})
        store.check(str(path))
        return store

    def save(self, path: str | os.PathLike) -> None:
        with open(path, "wb") as file:
            np.savez(file, **self._asdict())

    def check(self, name: str) -> None:
        """Raises ValueError unless the arrays fit each other."""
        kinds = {array: np.asarray(getattr(self, array)).dtype.kind for array in ARRAYS}
        count = len(self.tokens)
        fits = kinds == ARRAYS and self.keys.ndim == 2 and len(self.keys) == count == len(self.starts) - 1
        fits = fits and bool((np.diff(self.tokens) >= 0).all() and (np.diff(self.starts) > 0).all())
        if not fits or self.starts[0] != 0 or self.starts[-1] != len(self.chunks):
            raise ValueError(f"{name} must hold chunks of at least one token by ascending tokens, got other arrays")


class ChunkDrafter:
    """Drafts the chunks whose hidden state is nearest (CD-LM, Li et al., arXiv 2501.00343).

    Of the chunks that follow the newest token, those whose key is like the state in which the model predicted that
    token are drafted, the likest first, as one tree. `acceptance="exact"` verifies them, so the text is the model's.
    `acceptance="unverified"` takes the likest as it is, as the paper does: then the text is not the model's.

    Args:
        store: a ChunkStore, or the file of one.
        target: the runner to draft for, whose hidden states the keys are; one with taps.
        threshold: the least cosine of state and key, in [-1, 1]. The authors take 0.5 to 0.89.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or its chunks are another model's.
    """

    proposal = "deterministic"

    def __init__(self, store: ChunkStore | str | os.PathLike, target: Runner, *, threshold: float = 0.6):
        self._store = store if isinstance(store, ChunkStore) else ChunkStore.load(store)
        self.threshold = read_number("threshold", threshold)
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [-1, 1], got {threshold}")
        if not hasattr(target, "layers"):
            raise ValueError(f"target must be a runner with taps, got {type(target).__name__}")
        if self._store.fingerprint != target.fingerprint:
            raise ValueError(
                f"store must be of the target, {target.fingerprint}, but its keys are of {self._store.fingerprint}"
            )
        self._store.check("store")
        self.taps = (target.layers + 1,)
        self._state: np.ndarray | None = None

    def start(self, prompt: Sequence[int]) -> ChunkDrafter:
        """A drafter for one new sequence; the store is shared."""
        drafter = copy.copy(self)
        drafter._state = None
        return drafter

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of the chunks that fit, of at most budget nodes; the root alone where none does."""
        tokens, parents, chances = [context[-1]], [-1], [1.0]
        children: dict[tuple[int, int], int] = {}
        for likeness, chunk in self._found(context[-1]):
            node = 0
            for token in chunk:
                if (node, token) not in children:
                    if len(tokens) >= budget:
                        return DraftTree(tokens, parents, chances=np.array(chances))
                    children[node, token] = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    # what is likest comes first where a controller cuts
                    chances.append(min(chances[node], max(likeness, 1e-3)))
                node = children[node, token]
        return DraftTree(tokens, parents, chances=np.array(chances))

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Keeps the state in which the model predicted what comes after the accepted path."""
        state = verified.taps[path[-1], 0].float().cpu().numpy()
        self._state = state / max(float(np.linalg.norm(state)), 1e-12)

    def _found(self, token: int) -> list[tuple[float, list[int]]]:
        """The chunks that follow a token in a state like this one, the likest first."""
        if self._state is None:
            return []
        store = self._store
        first, end = np.searchsorted(store.tokens, [token, token + 1])
        if first == end:
            return []
        likeness = store.keys[first:end].astype(np.float32) @ self._state
        order = np.argsort(-likeness, kind="stable")
        return [
            (float(likeness[place]), store.chunks[slice(*store.starts[first + place : first + place + 2])].tolist())
            for place in order
            if likeness[place] >= self.threshold
        ]


def store_of(found: Mapping[int, Sequence[tuple[np.ndarray, Sequence[int]]]], fingerprint: str) -> ChunkStore:
    """A store of (hidden state [H], chunk) by the token before the chunk; chunks have at least one token."""
    entries = [(token, state, chunk) for token in sorted(found) for state, chunk in found[token]]
    if not entries:
        raise ValueError("found must hold at least one chunk, got none")
    keys = np.stack([state for _, state, _ in entries]).astype(np.float32)
    keys /= np.maximum(np.linalg.norm(keys, axis=1, keepdims=True), 1e-12)
    return ChunkStore(
        np.array([token for token, _, _ in entries], np.int64),
        keys.astype(np.float16),
        np.concatenate([np.asarray(chunk, np.int32) for _, _, chunk in entries]),
        np.cumsum([0, *(len(chunk) for _, _, chunk in entries)]),
        fingerprint,
    )
