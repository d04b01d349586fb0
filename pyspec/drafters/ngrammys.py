"""The N-Grammys: what the target says after one token alone, and what the text said before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pyspec.drafters.growing import GrowingDrafter, Part, best_tokens
from pyspec.drafters.lookup import Lookup
from pyspec.host import engine
from pyspec.machine import store
from pyspec.ops.row_statistics import TOP
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.tree import DraftTree

__all__ = ["NgrammysDrafter", "NgrammysRows", "model_bigrams"]

BATCH = 256  # tokens that are run side by side


def model_bigrams(model: Runner, progress: Callable[[int, int], None] | None = None) -> np.ndarray:
    """[V, 8] int32: the model's best tokens after each token alone, best first, -1 behind the last.

    Every token is run once, as a prompt of its own, and the result is kept in the user's cache folder. The model's
    batch is lost then. progress is called with (tokens done, tokens).
    """
    key = store.key(model, vocab_size=model.vocab_size, top=TOP)
    kept = store.read("bigrams", key)
    if _is_table(kept, model.vocab_size):
        return np.array(kept, np.int32)
    rows = []
    with exclusive_use(model):
        for first in range(0, model.vocab_size, BATCH):
            prompts = [[token] for token in range(first, min(first + BATCH, model.vocab_size))]
            rows.append(best_tokens(torch.stack(model.prefill(prompts, capacity=1)))[0])
            if progress is not None:
                progress(first + len(prompts), model.vocab_size)
    successors = np.concatenate(rows).astype(np.int32)
    store.keep("bigrams", key, successors.tolist())
    return successors


def _is_table(kept: object, vocab_size: int) -> bool:
    try:
        table = np.array(kept)
    except ValueError:  # rows of several lengths
        return False
    fits = table.dtype.kind == "i" and table.shape == (vocab_size, TOP)
    return fits and -1 <= table.min() <= table.max() < vocab_size


class Bigrams(Part):
    """The model's bigrams, and the tokens that follow most tokens."""

    name = "bigrams_"

    def __init__(self, successors: np.ndarray):
        self.sources = [engine().Bigrams(successors, common_tokens(successors))]


def common_tokens(successors: np.ndarray) -> list[int]:
    """The unigram: tokens by how many others they are among the best after, a better rank counting more."""
    counts = np.zeros(len(successors))
    for rank, column in enumerate(successors.T):
        np.add.at(counts, column[column >= 0], 1 / (1 + rank))
    return [token for token in np.argsort(-counts, kind="stable")[:TOP].tolist() if counts[token] > 0]


class NgrammysDrafter(GrowingDrafter):
    """Model bigrams, chained as far as the tree goes, the model's unigram, and the n-grams of the text, as one tree.

    After Stewart et al., "The N-Grammys: Accelerating Autoregressive Inference with Learning-Free Batched Speculation",
    arXiv 2411.03786. Their unigram ranks by embeddings; this one by the bigrams.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
        bigrams: from model_bigrams.

    Raises:
        ValueError: if bigrams are of another vocabulary.
    """

    def __init__(self, vocab_size: int, fingerprint: str, bigrams: np.ndarray):
        _check(bigrams, vocab_size)
        super().__init__(vocab_size, [Lookup(), Bigrams(bigrams)], fingerprint)


class NgrammysRows:
    """The paper's own allocation: `rows` continuations of up to `width` tokens, merged by what they begin with.

    First come the continuations of earlier occurrences of the last token, by how often they occurred and then the
    latest; the rows that are left are the bigrams of the last token, each chained greedily.
    """

    proposal = "deterministic"

    def __init__(self, vocab_size: int, bigrams: np.ndarray, *, rows: int = 10, width: int = 10):
        _check(bigrams, vocab_size)
        for name, value in (("rows", rows), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.vocab_size, self._bigrams, self._rows, self._width = vocab_size, bigrams, rows, width

    def start(self, prompt: Sequence[int]) -> NgrammysRows:
        """The same: nothing is kept."""
        return self

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes: the rows in their order, until it is full."""
        tokens, parents, places = [int(context[-1])], [-1], {}
        for row in self._continuations(context):
            at = 0
            for token in row:
                if (at, token) not in places:
                    if len(tokens) == budget:
                        return DraftTree(tokens, parents)
                    places[at, token] = len(tokens)
                    tokens.append(token)
                    parents.append(at)
                at = places[at, token]
        return DraftTree(tokens, parents)

    def observe(self, tree: DraftTree, logits: torch.Tensor, path: Sequence[int]) -> None:
        """Nothing is learned."""

    def _continuations(self, context: Sequence[int]) -> list[tuple[int, ...]]:
        text = np.asarray(context, np.int64)
        starts = np.flatnonzero(text[: -self._width] == text[-1]) + 1 if len(text) > self._width else []
        windows = [tuple(text[start : start + self._width].tolist()) for start in starts]
        counts, latest = Counter(windows), {window: place for place, window in enumerate(windows)}
        found = sorted(counts, key=lambda window: (-counts[window], -latest[window]))[: self._rows]
        for token in self._bigrams[text[-1]].tolist()[: self._rows - len(found)]:
            row = []
            while token >= 0 and len(row) < self._width:
                row.append(token)
                token = int(self._bigrams[token, 0])
            found.append(tuple(row))
        return found


def _check(bigrams: np.ndarray, vocab_size: int) -> None:
    if bigrams.shape != (vocab_size, TOP) or bigrams.min() < -1 or bigrams.max() >= vocab_size:
        raise ValueError(
            f"bigrams must be [{vocab_size}, {TOP}] tokens of this vocabulary, got {list(bigrams.shape)} "
            f"from {bigrams.min()} to {bigrams.max()}"
        )
