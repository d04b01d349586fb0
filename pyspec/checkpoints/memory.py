"""What a model will take of memory, said before any is taken, and a refusal where it cannot fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from pyspec.machine.memory import available_memory

__all__ = ["TOKENS", "MemoryNeed", "cache_bytes", "check_memory"]

TOKENS = 4096  # of a cache that a model is expected to have room for, if its context is as long
ROWS = 64  # of a largest tree


@dataclass(frozen=True)
class MemoryNeed:
    """What a model takes, in bytes.

    Attributes:
        weights: as they will lie.
        kept: what they are kept in, for people: "bfloat16", or the formats of a file.
        cache: of `tokens` tokens, and what a step computes beside it.
        tokens: see cache.
        available: what there is, None where the system does not say.
    """

    weights: int
    kept: str
    cache: int
    tokens: int
    available: int | None

    @property
    def total(self) -> int:
        return self.weights + self.cache

    def __str__(self) -> str:
        cache = f" and {_gigabytes(self.cache)} GB for {self.tokens} tokens" if self.cache else ""
        there = "" if self.available is None else f", {_gigabytes(self.available)} GB are available"
        return f"{_gigabytes(self.weights)} GB for weights in {self.kept}{cache}{there}"


def check_memory(
    path: Path | str,
    device: torch.device,
    need: Callable[[torch.dtype | str | None], tuple[int, str, int, int]],
    dtype: torch.dtype | str | None,
    smaller: Mapping[str, torch.dtype | str],
    announce: Callable[[MemoryNeed], None] | None,
) -> None:
    """Says what a model needs, and refuses one that cannot fit.

    Args:
        path: what errors name.
        device: where it will be.
        need: the fields of MemoryNeed but the last, for a dtype.
        dtype: that was chosen.
        smaller: dtypes by name, to be proposed where they would fit.
        announce: called with what the model needs.

    Raises:
        MemoryError: the memory that there is does not suffice.
    """
    available = available_memory(device)
    found = MemoryNeed(*need(dtype), available)
    if available is not None and found.total > available:
        fit = []
        for name, other in smaller.items():
            total = MemoryNeed(*need(other), available).total
            if total <= available:
                fit.append(f"{name} would take {_gigabytes(total)} GB")
        proposed = f": dtype {', '.join(fit)}" if fit else ", and no smaller dtype would fit"
        raise MemoryError(f"{path} needs {_gigabytes(found.total)} GB of memory ({found}){proposed}")
    if announce is not None:
        announce(found)


def cache_bytes(config, dtype: torch.dtype, rows: int = ROWS) -> tuple[int, int]:
    """Bytes of a dense cache of keys and values and of what a step computes, and the tokens that it is for."""
    attention = getattr(config, "attention", config)  # a hybrid has a configuration for each kind of layer
    tokens = min(TOKENS, getattr(attention, "context_length", TOKENS))
    heads = attention.layers * getattr(attention, "kv_heads", 0) * getattr(attention, "head_dim", 0)
    if getattr(attention, "layer_heads", None):
        heads = sum(math.prod(attention.layer_heads[layer]) for layer in set(attention.key_layers))
    step = rows * (config.vocab_size + 16 * config.hidden_size) * 4
    return 2 * heads * dtype.itemsize * tokens + step, tokens


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f}" if size < 10e9 else f"{size / 1e9:.1f}"
