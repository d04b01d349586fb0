"""Memory in large pages, for what every step reads whole: a page table of small pages costs some 5% of the step."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

ALIGNMENT = 4096  # bytes


class HugePages:
    """A buffer for tensors that are moved into it one after another; plain memory where the system has no large pages.

    Args:
        tensors: CPU tensors that will be moved, to know the size.
    """

    def __init__(self, tensors: list[Tensor]):
        size = sum(_aligned(tensor.nbytes) for tensor in tensors)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(pages, dtype=torch.uint8)
        else:
            self._free = torch.empty(size, dtype=torch.uint8, device="cpu")

    def move(self, tensor: Tensor) -> Tensor:
        """A copy in the buffer."""
        taken, self._free = self._free.tensor_split([_aligned(tensor.nbytes)])
        return taken[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
