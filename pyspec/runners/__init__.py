"""Runners: a model with its state, behind three calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pyspec.tree import DraftTree

__all__ = ["Runner"]


class Runner(Protocol):
    """A target model with its committed state, for a batch of sequences that each have their own length.

    The three calls are all that the generation loop needs, and mean the same for a KV cache and for a
    recurrent state: `prefill` starts a batch, `verify` reads the committed state, `commit` extends it.
    Runners on our own kernels also have `warm(capacity, sequences)`, which compiles and captures what a GPU needs. A
    simulated runner may have a `clock` of its own, seconds like those of time.perf_counter, by which calls are timed.
    """

    vocab_size: int
    context_length: int  #: positions the model was made for
    device: torch.device
    dtype: torch.dtype
    fingerprint: str  #: names shape, vocabulary and a sample of the weights; saved caches and tables carry it
    tokenizer: object | None  #: pyspec.checkpoints.tokenizer.Tokenizer, or None where the source has none
    eos_tokens: frozenset[int]

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, torch.Tensor], None] | None = None,
    ) -> list[torch.Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        capacity is the number of cache slots a sequence will need (prompt, new tokens and one tree).
        observe is called with (sequence, chain of prompt tokens, their [n, V] logits) as chunks are read.
        A runner with takes_quantised_cache = True also takes cache, a GearSettings or None for a dense one.
        """
        ...

    def verify(self, trees: Sequence[DraftTree | None]) -> list[torch.Tensor | None]:
        """Logits [T, V] fp32 of every node of each sequence's tree; None marks a sequence that sits out.

        The committed state is read, not changed: calling it twice gives the same logits.
        """
        ...

    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        """Makes a path of the last verified tree (node indices from the root, root included) state."""
        ...

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        ...

    def fork(self) -> Runner:
        """A runner on the same weights with a batch of its own, for another thread or for a callback."""
        ...
