"""take_columns: the columns of x in another order, for weights whose inputs are laid out in it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_floating, check_places, check_tensors
from pyspec.ops._library import Op

__all__ = ["take_columns"]


def take_columns_reference(x: Tensor, order: Tensor) -> Tensor:
    """Plain PyTorch. The specification of the kernels."""
    return x.index_select(1, order)


def _triton():
    from pyspec.kernels.take_columns import take_columns as launch

    return launch


_OP = Op(
    "take_columns",
    "(Tensor x, Tensor order) -> Tensor",
    take_columns_reference,
    lambda x, order: x.new_empty(x.shape),
    _triton,
    check=lambda x, order: check_places("order", order, x.shape[1], "x has {} columns"),
)


def take_columns(x: Tensor, order: Tensor) -> Tensor:
    """The columns of x in another order: out[r, j] = x[r, order[j]].

    Args:
        x: [R, K] fp32, fp16 or bf16 with a contiguous last dimension.
        order: [K] int32, contiguous, each in [0, K).

    Returns:
        [R, K] of x's dtype, contiguous.

    Raises:
        TypeError, ValueError: a dtype, shape or stride does not fit; the message names the argument.
        RuntimeError: on a CPU, an entry of order is not in [0, K); on a GPU that is undefined.
    """
    check_are_tensors(x=x, order=order)
    check_floating("x", x.dtype)
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"x must be [rows, columns] with contiguous rows, got {tuple(x.shape)} {x.stride()}")
    check_tensors("x", x, ("order", order, torch.int32, (x.shape[1],)))
    check_contiguous(order=order)
    return _OP(x, order)
