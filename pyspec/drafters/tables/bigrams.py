"""What the model says after one token alone: N-Grammys' bigrams and unigram."""

from __future__ import annotations

import numpy as np

from pyspec.drafters.table_drafter import Table
from pyspec.host import host
from pyspec.ops.row_statistics import TOP


class Bigrams(Table):
    """The model's bigrams, chained as far as a tree goes, and the tokens that follow most tokens.

    With Lookup, after Stewart et al., "The N-Grammys: Accelerating Autoregressive Inference with Learning-Free Batched
    Speculation", arXiv 2411.03786. Their unigram ranks by embeddings; this one by the bigrams.

    Args:
        vocab_size: tokens of the target.
        successors: [vocab_size, 8] int32, from pyspec.drafters.ngrammys.model_bigrams.

    Raises:
        ValueError: if successors are of another vocabulary.
    """

    name = "bigrams_"

    def __init__(self, vocab_size: int, successors: np.ndarray):
        super().__init__(vocab_size)
        check_bigrams(successors, vocab_size)
        self.sources = [host().Bigrams(successors, common_tokens(successors))]


def common_tokens(successors: np.ndarray) -> list[int]:
    """The unigram: tokens by how many others they are among the best after, a better rank counting more."""
    counts = np.zeros(len(successors))
    for rank, column in enumerate(successors.T):
        np.add.at(counts, column[column >= 0], 1 / (1 + rank))
    return [token for token in np.argsort(-counts, kind="stable")[:TOP].tolist() if counts[token] > 0]


def check_bigrams(bigrams: np.ndarray, vocab_size: int) -> None:
    """Raises ValueError unless bigrams are [vocab_size, 8] tokens of the vocabulary, or -1."""
    if bigrams.shape != (vocab_size, TOP) or bigrams.min() < -1 or bigrams.max() >= vocab_size:
        raise ValueError(
            f"bigrams must be [{vocab_size}, {TOP}] tokens of this vocabulary, got {list(bigrams.shape)} "
            f"from {bigrams.min()} to {bigrams.max()}"
        )
