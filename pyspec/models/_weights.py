"""What the weights of all native runners share: matrices that are packed in their place, and one buffer for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyspec.models.huge_pages import HugePages
from pyspec.ops.linear import PackedWeight, pack_weight

__all__ = ["Matrix", "dense", "move_together", "packed"]

Matrix = Tensor | PackedWeight


def packed(matrix: Matrix, dtype: torch.dtype) -> PackedWeight:
    return matrix if isinstance(matrix, PackedWeight) else pack_weight(matrix, dtype)


def dense(matrix: Matrix) -> Tensor:
    return matrix.unpack() if isinstance(matrix, PackedWeight) else matrix


def move_together(places: list[tuple[object, str]]) -> None:
    """Moves packed matrices, attributes of objects, into one buffer, in the order in which a step reads them."""
    buffer = HugePages([getattr(owner, name).data for owner, name in places])
    for owner, name in places:  # one by one, so that there is never a second copy of all
        weight = getattr(owner, name)
        setattr(owner, name, replace(weight, data=buffer.move(weight.data)))
