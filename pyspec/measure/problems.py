"""Problem: a call that `pyspec bench kernels` times, and what problems are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["TREE", "Problem", "Random", "nbytes"]

TREE = 16  # nodes of a round


@dataclass
class Problem:
    """One call, ready to be timed; its result is that of the same call under backend("reference")."""

    call: Callable[[], Tensor]
    bytes: int  # read and written at least once
    operations: int  # multiplications and additions at least done
    tolerance: float = 1e-4  # of the result against the reference, relative to its largest value
    peers: dict[str, Callable] = field(default_factory=dict)
    fresh: Callable[[], None] = lambda: None  # puts back what the call changes in place, before it is checked
    dtype: torch.dtype = torch.float32  # whose multiply rate the floor takes


class Random:
    """Normal numbers, the same for the same case."""

    def __init__(self, device: str):
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, dtype=torch.float32, device=self._generator.device)
        return (drawn * scale).to(dtype)


def nbytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)
