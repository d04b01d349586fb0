"""The checks that ops share: each names the argument, what came and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.arguments import described

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class BadData(ValueError, RuntimeError):
    """Arguments that an op cannot read, such as lengths or indices that point outside of a tensor.

    A RuntimeError too, which is what torch's own ops raise, and the overloads of torch.ops.pyspec.
    """


def check_are_tensors(*, optional: tuple[str, ...] = (), **values) -> None:
    """Raises TypeError unless each value is a tensor, or None where its name is among the optional ones."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            raise TypeError(f"{name} must be a tensor{' or None' * (name in optional)}, got {described(value)}")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError unless every tensor, where there is one, is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_places(name: str, places: Tensor, end: int, where: str) -> None:
    """Raises BadData unless all places are in [0, end); the message says that `where` has `end` of them."""
    outside = ((places < 0) | (places >= end)).nonzero()
    if len(outside):
        index = outside[0].tolist()
        at = "".join(f"[{i}]" for i in index)
        raise BadData(f"{name}{at} is {int(places[tuple(index)])}, {where.format(end)}")


def check_floating(name: str, dtype: torch.dtype) -> None:
    """Raises TypeError unless dtype is one that ops take and give."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {dtype}")


def check_tensors(beside: str, at: Tensor, *expected: tuple[str, Tensor | None, torch.dtype, tuple[int, ...]]) -> None:
    """Raises unless each name's tensor, where there is one, has its dtype and shape and lies where `at` does."""
    device = at.device
    for name, tensor, dtype, shape in expected:
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {str(dtype)[6:]}, got {tensor.dtype}")
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device} like {beside}, got {tensor.device}")
