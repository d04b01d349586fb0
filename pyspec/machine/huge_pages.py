"""Memory in large pages, for what every step reads whole: a page table of small pages costs some 5% of the step."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

ALIGNMENT = 4096  # bytes


class HugePages:
    """A buffer of zeros that tensors are taken from one after another, each at the start of a page.

    Its pages become memory when they are written to. Where the system has no large pages it is plain memory.

    Args:
        sizes: bytes of each tensor that will be taken.
    """

    def __init__(self, sizes: list[int]):
        size = sum(map(_aligned, sizes))
        if hasattr(mmap, "MADV_HUGEPAGE") and size:
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(pages, dtype=torch.uint8)
        else:
            self._free = torch.zeros(size, dtype=torch.uint8, device="cpu")

    def take(self, size: int) -> Tensor:
        """The next bytes, uint8 [size]."""
        taken, self._free = self._free.tensor_split([_aligned(size)])
        return taken[:size]

    def move(self, tensor: Tensor) -> Tensor:
        """A copy of a CPU tensor in the buffer."""
        return self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
