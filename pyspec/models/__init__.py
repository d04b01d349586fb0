"""Runners: a model with its state, behind three calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pyspec.trees import DraftTree

__all__ = ["Runner", "from_transformers", "load"]


class Runner(Protocol):
    """A target model with its committed state, for a batch of sequences that each have their own length.

    The three calls are all that the generation loop needs, and mean the same for a KV cache and for a
    recurrent state: `prefill` starts a batch, `verify` reads the committed state, `commit` extends it.
    """

    vocab_size: int
    context_length: int  # positions the model was made for
    device: torch.device
    dtype: torch.dtype
    fingerprint: str  # names model and vocabulary; saved drafter state carries it
    tokenizer: object | None  # pyspec.models.tokenizer.Tokenizer, or None where the source has none
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
        A runner with takes_packed_cache = True also takes cache, a GearCache or None for a dense one.
        """
        ...

    def verify(self, trees: Sequence[DraftTree | None]) -> list[torch.Tensor | None]:
        """[T, V] fp32 logits of every node of each sequence's tree; None marks a sequence that sits out.

        The committed state is read, not changed: calling it twice gives the same logits.
        """
        ...

    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        """Makes a path of the last verified tree (node indices from the root, root included) state."""
        ...

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        ...


def load(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Runner:
    """Loads a model: "demo", a GGUF file, a local Hugging Face folder or a hub id. See models/loading.py."""
    from pyspec.models.loading import load as load_source

    return load_source(source, dtype=dtype, device=device, progress=progress)


def from_transformers(model, tokenizer=None, *, dtype: torch.dtype | None = None) -> Runner:
    """A runner for a live model of transformers. See models/loading.py."""
    from pyspec.models.loading import from_transformers as runner_of

    return runner_of(model, tokenizer, dtype=dtype)
