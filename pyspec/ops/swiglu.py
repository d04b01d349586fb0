"""swiglu: activation(gate) * up, in fp32, rounded once; with GELU some call it GeGLU."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating, check_tensors
from pyspec.ops._library import Op

#: Numbered as in kernels/params/swiglu.h.
ACTIVATIONS = ("silu", "gelu_tanh", "clamped", "sigmoid", "relu", "none", "gelu")


def swiglu_reference(gate_up: Tensor, out_dtype: torch.dtype, activation: int = 0, up: Tensor | None = None) -> Tensor:
    """Plain PyTorch. The specification of the kernels."""
    gate, up = gate_up.chunk(2, dim=-1) if up is None else (gate_up, up)
    if ACTIVATIONS[activation] == "clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (gate * torch.sigmoid(1.702 * gate) * (up + 1)).to(out_dtype)
    activate = {"silu": F.silu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh"), "sigmoid": torch.sigmoid}
    activate |= {"relu": F.relu, "none": lambda gate: gate}
    activate["gelu"] = lambda gate: gate / 2 * torch.erfc(gate * -(0.5**0.5))  # 1 + erf would cancel
    return (activate[ACTIVATIONS[activation]](gate) * up).to(out_dtype)


def _fake(gate_up, out_dtype, activation=0, up=None) -> Tensor:
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // (2 if up is None else 1)), dtype=out_dtype)


def _triton():
    from pyspec.kernels.swiglu import swiglu as launch

    return launch


_OP = Op(
    "swiglu",
    "(Tensor gate_up, ScalarType out_dtype, int activation=0, Tensor? up=None) -> Tensor",
    swiglu_reference,
    _fake,
    _triton,
)


def swiglu(
    gate_up: Tensor,
    *,
    activation: str = "silu",
    out_dtype: torch.dtype = torch.float32,
    up: Tensor | None = None,
) -> Tensor:
    """Multiplies an activation of the first half of the columns by the second half, or of all of them by `up`.

    Args:
        gate_up: [R, 2 * size] fp32: gates, then ups, as one projection gives them; beside `up`, [R, size]: gates.
        activation: "silu"; "gelu", x / 2 (1 + erf(x / sqrt 2)); "gelu_tanh", x / 2 (1 + tanh(sqrt(2 / pi) (x +
            0.044715 x^3))); "sigmoid"; "relu",
            which gives its square where ups are the gates; "none", a product; or "clamped", as gpt-oss has it:
            gate / (1 + e^(-1.702 gate)) (up + 1), with gates of at most 7 and ups from -7 to 7.
        out_dtype: fp32, fp16 or bf16.
        up: [R, size] fp32, fp16 or bf16, where ups are apart.

    Returns:
        [R, size] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument.
    """
    check_are_tensors(gate_up=gate_up, up=up, optional=("up",))
    if gate_up.dtype != torch.float32:
        raise TypeError(f"gate_up must be float32, got {gate_up.dtype}")
    if gate_up.dim() != 2 or (up is None and gate_up.shape[1] % 2):
        raise ValueError(f"gate_up must be [rows, 2 * size], got shape {tuple(gate_up.shape)}")
    if up is not None:
        check_floating("up", up.dtype)
        check_tensors("gate_up", gate_up, ("up", up, up.dtype, gate_up.shape))
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be {' or '.join(ACTIVATIONS)}, got {activation!r}")
    check_floating("out_dtype", out_dtype)
    return _OP(gate_up, out_dtype, ACTIVATIONS.index(activation), up)
