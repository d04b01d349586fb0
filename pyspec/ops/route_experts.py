"""route_experts: which experts a row goes to, with what gates; mix_experts: the sum of what they gave.

    score[r, e] = softmax over e of logits[r, e], or sigmoid(logits[r, e])
    ids[r] = the choices best of score[r, e] + bias[e], the best first, of equals the lower number
    gates[r, c] = scale * score[r, ids[r, c]], divided by the sum over c where they are renormalised,
                  and times scales[ids[r, c]] where experts have scales of their own
    out[r] = sum over c of gates[r, c] values[r * choices + c] + shared_gates[r] shared[r]

A renormalised softmax is that over the chosen alone. Sums are in fp32, in the order of a row's own ranking, so that
a row has the same bits in any company.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_tensors
from pyspec.ops._library import Op

__all__ = ["MOST_EXPERTS", "mix_experts", "mix_experts_reference", "route_experts", "route_experts_reference"]

MOST_EXPERTS = 1024  # as in kernels/params/route_experts.h


def route_experts_reference(
    logits: Tensor,
    bias: Tensor | None,
    choices: int,
    sigmoid: bool,
    renormalise: bool,
    scale: float,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch. The specification of the kernels."""
    scores = logits.sigmoid() if sigmoid else logits.softmax(-1)
    keys = logits if bias is None else scores + bias
    ids = keys.sort(dim=-1, descending=True, stable=True).indices[:, :choices].contiguous()
    gates = scores.gather(1, ids)
    if renormalise:
        gates = gates / gates.sum(-1, keepdim=True)
    return gates * (scale if scales is None else scale * scales[ids]), ids.int()


def mix_experts_reference(values: Tensor, gates: Tensor, shared: Tensor | None, shared_gates: Tensor | None) -> Tensor:
    """Plain PyTorch. The specification of the kernels."""
    out = (values.unflatten(0, gates.shape) * gates[..., None]).sum(1)
    if shared is not None:
        out = out + (shared if shared_gates is None else shared * shared_gates)
    return out


def _fake_route(logits, bias, choices, *rest) -> tuple[Tensor, Tensor]:
    gates = logits.new_empty((len(logits), choices))
    return gates, gates.new_empty(gates.shape, dtype=torch.int32)


def _triton_route():
    from pyspec.kernels.route_experts import route_experts as launch

    return launch


def _triton_mix():
    from pyspec.kernels.route_experts import mix_experts as launch

    return launch


_ROUTE = Op(
    "route_experts",
    "(Tensor logits, Tensor? bias, int choices, bool sigmoid, bool renormalise, float scale, Tensor? scales=None) "
    "-> (Tensor, Tensor)",
    route_experts_reference,
    _fake_route,
    _triton_route,
)
_MIX = Op(
    "mix_experts",
    "(Tensor values, Tensor gates, Tensor? shared, Tensor? shared_gates) -> Tensor",
    mix_experts_reference,
    lambda values, gates, shared, shared_gates: values.new_empty((len(gates), values.shape[1])),
    _triton_mix,
)


def route_experts(
    logits: Tensor,
    choices: int,
    *,
    bias: Tensor | None = None,
    sigmoid: bool = False,
    renormalise: bool = False,
    scale: float = 1.0,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best experts of each row, and how much each of them counts.

    Args:
        logits: [R, E] fp32, contiguous, E at most 1024.
        choices: experts of a row, at most E.
        bias: [E] fp32, contiguous: added to scores where experts are chosen; gates are made of scores without it.
        sigmoid: scores are sigmoids of logits instead of a softmax over all.
        renormalise: the gates of a row sum to `scale`.
        scale: of the gates.
        scales: [E] fp32, contiguous: of each expert's gate, beside scale and after renormalising; None for 1.

    Returns:
        Gates [R, choices] fp32, and ids [R, choices] int32, the best expert first, of equals the lower number. ids are
        in [0, E) whatever the logits are.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument.
    """
    check_are_tensors(logits=logits, bias=bias, scales=scales, optional=("bias", "scales"))
    _check_matrix("logits", logits)
    experts = logits.shape[1]
    if not 0 < experts <= MOST_EXPERTS:
        raise ValueError(f"logits must be of 1 to {MOST_EXPERTS} experts, got {experts}")
    if not 0 < choices <= experts:
        raise ValueError(f"choices must be in [1, {experts}], got {choices}")
    of_experts = ((name, tensor, torch.float32, (experts,)) for name, tensor in (("bias", bias), ("scales", scales)))
    check_tensors("logits", logits, *of_experts)
    check_contiguous(logits=logits, bias=bias, scales=scales)
    return _ROUTE(logits, bias, choices, sigmoid, renormalise, float(scale), scales)


def mix_experts(
    values: Tensor, gates: Tensor, shared: Tensor | None = None, shared_gates: Tensor | None = None
) -> Tensor:
    """Sums what the experts of each row gave, times their gates.

    Args:
        values: [R * choices, N] fp32, contiguous, as `expert_linear` gives them.
        gates: [R, choices] fp32, contiguous.
        shared: [R, N] fp32, contiguous, or None: what an expert of all rows gave; added last.
        shared_gates: [R, 1] fp32, contiguous: what shared is multiplied by; 1 by default.

    Returns:
        [R, N] fp32, added in the order of a row's choices.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument.
    """
    optional = ("shared", "shared_gates")
    check_are_tensors(values=values, gates=gates, shared=shared, shared_gates=shared_gates, optional=optional)
    _check_matrix("values", values)
    _check_matrix("gates", gates)
    rows, choices = gates.shape
    if not choices or rows * choices != len(values):
        raise ValueError(f"gates must be [rows, choices] of {len(values)} values, got shape {tuple(gates.shape)}")
    if shared_gates is not None and shared is None:
        raise ValueError("shared_gates must come with shared")
    others = (("gates", gates, (rows, choices)), ("shared", shared, (rows, values.shape[1])))
    others += (("shared_gates", shared_gates, (rows, 1)),)
    check_tensors("values", values, *((name, tensor, torch.float32, shape) for name, tensor, shape in others))
    check_contiguous(values=values, gates=gates, shared=shared, shared_gates=shared_gates)
    return _MIX(values, gates, shared, shared_gates)


def _check_matrix(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be a matrix, got shape {tuple(tensor.shape)}")
