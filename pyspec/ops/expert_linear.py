"""expert_linear: linear where each row has the weights of the experts that it chose.

    out[r * choices + c, n] = sum over k of x[r, k] weight[ids[r, c], n, k] + bias[ids[r, c], n]

Rows are sorted by expert inside the op, so that each expert's weight is read once for all rows that chose it, and those
of the others not at all: verifying a tree reads the union of its nodes' experts. A row has the bits that it has
alone, whatever the others chose; on a CPU those that `linear` gives it with its expert's weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_floating, check_places, check_tensors
from pyspec.ops._library import Op
from pyspec.ops.linear import JoinedWeight, LinearWeight, lay_out_weight, linear_reference
from pyspec.ops.linear_codes import codes_shape, linear_codes_reference
from pyspec.ops.weight_formats import FORMATS, Codes

__all__ = ["ExpertWeight", "JoinedExperts", "expert_linear", "expert_linear_reference", "lay_out_experts"]


@dataclass(frozen=True)
class ExpertWeight(LinearWeight):
    """The weights [experts, outputs, inputs] of experts in the layout that `expert_linear` reads.

    Attributes:
        data: what `lay_out_weight` makes of each expert's weight, one after another.
        outputs: of one expert.
        experts: how many there are.
    """

    experts: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts, self.outputs, self.inputs

    def unpack(self) -> Tensor:
        """The weights as they were, [experts, outputs, inputs] fp32."""
        parts = self.data.unflatten(0, (self.experts, -1)).unbind()
        return torch.stack([LinearWeight(part, self.outputs, self.inputs, self.format).unpack() for part in parts])


@dataclass(frozen=True)
class JoinedExperts(JoinedWeight):
    """The weights of experts whose outputs are in several formats, the same in all experts.

    `expert_linear` reads one of `split` at a time.

    Attributes:
        data: uint8, flat: the first part of all experts, then the second.
        outputs: of one expert.
        parts: format and outputs of each part of an expert.
        experts: how many there are.
    """

    experts: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.experts, self.outputs, self.inputs

    def split(self) -> list[ExpertWeight]:
        """The parts, where they are."""
        shapes = [codes_shape(format, outputs, self.inputs, self.data.device) for format, outputs in self.parts]
        shapes = [(self.experts * panels, *block) for panels, *block in shapes]
        pieces = self.data.split([math.prod(shape) for shape in shapes])
        return [
            ExpertWeight(
                piece.view(shape), outputs, self.inputs, None if format.name == "q8_0" else format, experts=self.experts
            )
            for piece, shape, (format, outputs) in zip(pieces, shapes, self.parts, strict=True)
        ]

    def unpack(self) -> Tensor:
        """The weights as they were, [experts, outputs, inputs] fp32."""
        return torch.cat([part.unpack() for part in self.split()], 1)


def lay_out_experts(weight: Tensor | Sequence[Codes], dtype: torch.dtype | str | None = None) -> ExpertWeight:
    """Lays out the weights of experts for `expert_linear`, once, at load.

    Args:
        weight: [experts, outputs, inputs] fp32, fp16 or bf16; or the experts' weights taken apart into codes of one
            format, which keep their values.
        dtype: as in `lay_out_weight`.

    Raises:
        TypeError, ValueError, RuntimeError: as `lay_out_weight` does for the weight of an expert.
        ValueError: codes have their columns in an order.
    """
    if isinstance(weight, Tensor) and (weight.dim() != 3 or not weight.numel()):
        raise ValueError(f"weight must be [experts, outputs, inputs] and not empty, got shape {tuple(weight.shape)}")
    first = lay_out_weight(weight[0], dtype)
    if first.order is not None:
        raise ValueError("weight must be codes whose columns are in no order of their own, for experts")
    data = first.data.new_empty((len(weight), *first.data.shape))
    for place, part in zip(data, weight, strict=True):
        place.copy_(lay_out_weight(part, dtype).data)
    return ExpertWeight(data.flatten(0, 1), first.outputs, first.inputs, first.format, experts=len(weight))


def expert_linear_reference(
    x: Tensor,
    ids: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    outputs: int,
    experts: int,
    format: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch: x [R, K], ids [R, C], laid out weights, bias [E, N] fp32. The specification of the kernels."""
    rows, chosen = x.repeat_interleave(ids.shape[1], 0), ids.flatten()
    out = x.new_zeros((len(rows), outputs), dtype=out_dtype)
    for expert in chosen.unique().tolist():
        own = (
            rows[chosen == expert],
            weight.unflatten(0, (experts, -1))[expert],
            None if bias is None else bias[expert],
        )
        if format < 0:
            out[chosen == expert] = linear_reference(*own, outputs, out_dtype)
        else:
            out[chosen == expert] = linear_codes_reference(*own, outputs, format, out_dtype)
    return out


def _check_ids(x, ids, weight, bias, outputs, experts, format, out_dtype) -> None:
    check_places("ids", ids, experts, "there are {} experts")


def _triton():
    from pyspec.kernels.expert_linear import expert_linear as launch

    formats = list(FORMATS.values())
    return lambda *args: launch(*args[:6], None if args[6] < 0 else formats[args[6]], args[7])


_OP = Op(
    "expert_linear",
    "(Tensor x, Tensor ids, Tensor weight, Tensor? bias, int outputs, int experts, int format, ScalarType out_dtype)"
    " -> Tensor",
    expert_linear_reference,
    lambda x, ids, weight, bias, outputs, experts, format, out_dtype: x.new_empty(
        (ids.numel(), outputs), dtype=out_dtype
    ),
    _triton,
    check=_check_ids,
)


def expert_linear(
    x: Tensor,
    ids: Tensor,
    weight: ExpertWeight,
    bias: Tensor | None = None,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """x times the weights that its rows chose, transposed, plus their biases; each row has the bits it has alone.

    Args:
        x: [R, K] fp32, fp16 or bf16 with a contiguous last dimension.
        ids: [R, C] int32, contiguous: the experts of each row, in [0, E). On a GPU, and in a recording, a number that
            is none of these leaves its row of the result undefined.
        weight: from `lay_out_experts`, of E experts.
        bias: [E, N] fp32, contiguous.
        out_dtype: of the result: fp32, fp16 or bf16; x's own by default.

    Returns:
        [R * C, N]: for each row of x one for each expert that it chose.

    Raises:
        TypeError: a dtype is not supported, or a weight of fp16 or bf16 is not of x's dtype.
        ValueError: a shape, stride or device does not fit; the message names the argument.
        RuntimeError: on a CPU, an entry of ids is not in [0, E).
    """
    check_are_tensors(x=x, ids=ids, bias=bias, optional=("bias",))
    out_dtype = out_dtype or x.dtype
    check_floating("x", x.dtype)
    check_floating("out_dtype", out_dtype)
    if not isinstance(weight, ExpertWeight):
        raise TypeError(f"weight must come from lay_out_experts, got {type(weight).__name__}")
    if isinstance(weight.dtype, torch.dtype) and weight.dtype not in (torch.int8, torch.float32, x.dtype):
        raise TypeError(f"weight must be int8, in fewer bits, float32, or {x.dtype} like x, got {weight.dtype}")
    if x.dim() != 2 or x.shape[1] != weight.inputs:
        raise ValueError(f"x must be [rows, {weight.inputs}] for this weight, got shape {tuple(x.shape)}")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x must have a contiguous last dimension, got strides {x.stride()}")
    if ids.dim() != 2 or not ids.shape[1]:
        raise ValueError(f"ids must be [{len(x)}, choices], got shape {tuple(ids.shape)}")
    if weight.data.device != x.device:
        raise ValueError(f"weight must be on {x.device} like x, got {weight.data.device}")
    of_ids = ("ids", ids, torch.int32, (len(x), ids.shape[1]))
    check_tensors("x", x, of_ids, ("bias", bias, torch.float32, (weight.experts, weight.outputs)))
    check_contiguous(ids=ids, bias=bias)
    format = -1 if weight.format is None else list(FORMATS).index(weight.format.name)
    return _OP(x, ids, weight.data, bias, weight.outputs, weight.experts, format, out_dtype)
