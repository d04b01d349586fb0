"""mamba_layers: all layers of a Mamba or Mamba-2 model for the nodes of some trees.

A layer takes the last one's output into the residual stream, norms, projects to a gate z and to what a short
convolution and the recurrence work on, and projects back:

    Mamba-2   z, x|B|C, dt = in_proj(norm);  x|B|C = conv(x|B|C)
              out_proj(group norm(recurrence(x, dt, B, C) silu(z)))
    Mamba     x, z = in_proj(norm);  x = conv(x);  low, B, C = x_proj(x);  dt = dt_proj(low)
              out_proj(recurrence(x, dt, B, C) silu(z))

The reference does it op by op. On the CPU the same kernels run as one program on all threads at once
(csrc/cpu/mamba_layers.cpp), which gives the same bits without 150 dispatches a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors
from pyspec.ops._library import Op
from pyspec.ops.causal_conv import causal_conv
from pyspec.ops.linear import PackedWeight, linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.selective_state import LANES, Round, check_is_round, selective_state

__all__ = ["WEIGHTS", "mamba2_mixer", "mamba_layers", "mamba_layers_reference"]

# Of a layer, in the order that the program counts on. gate_norm is Mamba-2's, x_proj and dt_proj are Mamba's; what a
# model lacks is empty.
WEIGHTS = (
    "norm",  # [H] fp32
    "in_proj",  # matrices are the data of `pack_weight`
    "in_bias",  # biases are fp32
    "conv_weight",  # [taps, conv channels] fp32
    "conv_bias",
    "x_proj",
    "dt_proj",
    "A",  # as selective_state takes it: one dimension in Mamba-2, three in Mamba
    "D",  # [channels] fp32
    "dt_bias",  # [heads] fp32
    "gate_norm",  # [groups, channels / groups] fp32
    "out_proj",
    "out_bias",
)


def mamba_layers_reference(
    hidden: Tensor,
    weights: Sequence[Tensor],
    last_norm: Tensor,
    states: Tensor,
    windows: Tensor,
    records: Tensor,
    conv_records: Tensor,
    sequences: Tensor,
    starts: Tensor,
    parents: Tensor,
    paths: Tensor,
    halves: Tensor,
    advances: Tensor,
    dt_rank: int,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """The layers, op by op; hidden and the state are changed in place. The specification of the program."""
    round = Round(sequences, starts, parents, paths, halves, advances)
    delta = None
    for layer in range(len(states)):
        own = weights[len(WEIGHTS) * layer :][: len(WEIGHTS)]
        own = dict(zip(WEIGHTS, own, strict=True))
        x = rms_norm(hidden, own["norm"], epsilon, delta=delta, out_dtype=dtype)
        state = (states[layer], windows[layer], records[layer], conv_records[layer])
        if own["A"].dim() == 1:
            delta = mamba2_mixer(x, own, *state, round, epsilon)
        else:
            delta = _mamba_mixer(x, own, *state, round, dt_rank)
    return rms_norm(hidden, last_norm, epsilon, delta=delta, out_dtype=dtype)


def mamba2_mixer(
    x: Tensor,
    weights: dict[str, Tensor],
    state: Tensor,
    window: Tensor,
    record: Tensor,
    conv_record: Tensor,
    round: Round,
    epsilon: float,
) -> Tensor:
    """[R, H] fp32: what a layer of Mamba-2 adds to normed rows x [R, H]; its state is changed in place.

    weights are those of WEIGHTS; state, window, record and conv_record are one layer's of mamba_layers.
    """
    channels, conv_channels, dtype = state.shape[1] * LANES, window.shape[2], x.dtype
    parts = [channels, conv_channels, len(weights["A"])]
    z, inner, dt = _project(x, weights["in_proj"], sum(parts), weights["in_bias"]).split(parts, 1)
    inner = causal_conv(window, conv_record, inner, weights["conv_weight"], _present(weights["conv_bias"]), round)
    inner, B, C = inner.split([channels, *[(conv_channels - channels) // 2] * 2], 1)
    settings = {"D": weights["D"], "dt_bias": weights["dt_bias"]}
    y = selective_state(state, record, inner, dt, weights["A"], B, C, round, z=z, **settings)
    group = weights["gate_norm"].shape[1]
    y = rms_norm(y.view(-1, group), weights["gate_norm"], epsilon, out_dtype=dtype).view(-1, channels)
    return _project(y, weights["out_proj"], x.shape[1], weights["out_bias"])


def _mamba_mixer(
    x: Tensor,
    weights: dict[str, Tensor],
    state: Tensor,
    window: Tensor,
    record: Tensor,
    conv_record: Tensor,
    round: Round,
    dt_rank: int,
) -> Tensor:
    """The same for Mamba."""
    channels, state_size, dtype = window.shape[2], state.shape[2], x.dtype
    inner, z = _project(x, weights["in_proj"], 2 * channels, weights["in_bias"]).split(channels, 1)
    taps = (weights["conv_weight"], _present(weights["conv_bias"]))
    inner = causal_conv(window, conv_record, inner, *taps, round, out_dtype=dtype)
    parts = [dt_rank, state_size, state_size]
    low, B, C = _project(inner, weights["x_proj"], sum(parts), out_dtype=dtype).split(parts, 1)
    dt = _project(low, weights["dt_proj"], channels)
    settings = {"D": weights["D"], "dt_bias": weights["dt_bias"], "z": z, "out_dtype": dtype}
    y = selective_state(state, record, inner, dt, weights["A"], B, C, round, **settings)
    return _project(y, weights["out_proj"], x.shape[1], weights["out_bias"])


def _present(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _project(
    x: Tensor, weight: Tensor, outputs: int, bias: Tensor | None = None, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    bias = None if bias is None else _present(bias)
    return linear(x, PackedWeight(weight, outputs, x.shape[1]), bias, out_dtype=out_dtype)


_OP = Op(
    "mamba_layers",
    "(Tensor(a!) hidden, Tensor[] weights, Tensor last_norm, Tensor(b!) states, Tensor(c!) windows, "
    "Tensor(d!) records, Tensor(e!) conv_records, Tensor sequences, Tensor starts, Tensor parents, Tensor paths, "
    "Tensor halves, Tensor advances, int dt_rank, float epsilon, ScalarType dtype) -> Tensor",
    mamba_layers_reference,
    lambda hidden, *rest: torch.empty_like(hidden, dtype=rest[-1]),
    lambda: mamba_layers_reference,
)


def mamba_layers(
    hidden: Tensor,
    weights: Sequence[Tensor],
    last_norm: Tensor,
    states: Tensor,
    windows: Tensor,
    records: Tensor,
    conv_records: Tensor,
    round: Round,
    *,
    dt_rank: int,
    epsilon: float,
    dtype: torch.dtype,
) -> Tensor:
    """Replays what was accepted of the last round in all layers and runs the nodes of some trees through them.

    Each row has the bits of plain decoding along the node's path, whatever is beside it.

    Args:
        hidden: [R, H] fp32 and contiguous: the embeddings of all nodes, tree after tree; used up.
        weights: WEIGHTS, for each layer.
        last_norm: [H] fp32.
        states, windows, records, conv_records: of all layers, see StateCache; changed in place.
        round: the trees.
        dt_rank: inputs of dt_proj; 0 in Mamba-2.
        epsilon: of the norms.
        dtype: of activations, what the matrices were laid out for.

    Returns:
        [R, H] of dtype, after the last norm.

    Raises:
        RuntimeError, ValueError, TypeError: something does not fit; the message names it.
    """
    check_are_tensors(hidden=hidden, last_norm=last_norm)
    check_are_tensors(states=states, windows=windows, records=records, conv_records=conv_records)
    check_is_round(round)
    state = (states, windows, records, conv_records)
    return _OP(hidden, weights, last_norm, *state, *round.tensors(), dt_rank, epsilon, dtype)
