"""Blocks: the parts of a layer that architectures share, as straight lines of ops.

A block takes normed rows [R, H] and gives what it adds to the residual stream, [R, H] fp32. Blocks are recorded
(pyspec/runners/replay.py): they call pyspec's ops and views of their results alone, and every other tensor that they
pass to an op outlives the call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyspec.ops.causal_conv import causal_conv
from pyspec.ops.expert_linear import ExpertWeight, JoinedExperts, expert_linear
from pyspec.ops.gated_delta import gated_delta
from pyspec.ops.linear import LinearWeight, linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.rotary_write import rotary_write
from pyspec.ops.route_experts import mix_experts, route_experts
from pyspec.ops.selective_state import LANES, selective_state
from pyspec.ops.swiglu import swiglu

__all__ = [
    "attend",
    "attention",
    "expert_gates",
    "experts",
    "feed_forward",
    "gated_delta_net",
    "mamba",
    "mamba2",
    "short_convolution",
    "tap",
    "write_keys",
]


def tap(hidden: Tensor) -> Tensor:
    """A copy of the residual stream [R, H] fp32 as it is now, for the norms of layers change it in place."""
    return rms_norm(hidden, None, 0.0)


def attention(x: Tensor, layer, config, cache, index: int, numbers) -> Tensor:
    """Attention over the keys of a cache's layer `index`, where those of the rows are written.

    Args:
        layer: has qkv, output, their biases, head_scales, sinks and has_keys, see architectures.llama.LayerWeights.
        config: has the heads, windows and scale and softcap of scores, see architectures.llama.LlamaConfig.
        cache: with keys and values, such as a DenseCache.
        numbers: where the rows lie, a pyspec.runners.numbers.Numbers.
    """
    return attend(_project(x, layer.qkv, layer.qkv_bias), layer, config, cache, index, numbers, x.dtype)


def attend(projected: Tensor, layer, config, cache, index: int, numbers, dtype: torch.dtype) -> Tensor:
    """Attention whose gates, queries, keys and values are there, one beside another in a row, fp32; see attention.

    Args:
        dtype: of activations.
    """
    if config.is_gated:
        gates, projected = projected.tensor_split([config.heads * config.head_dim], 1)
    q = write_keys(projected, layer, config, cache, index, numbers)
    scores = {"scale": config.attention_scale, "softcap": config.attention_softcap}
    if config.is_chunked:
        scores["chunked"] = True
    if layer.sinks is not None:
        scores["sinks"] = layer.sinks
    mixed = cache.attend(index, q, numbers, config.windows[index], **scores).flatten(1)
    if config.is_gated:
        mixed = swiglu(gates, up=mixed, activation="sigmoid", out_dtype=dtype)
    return _project(mixed, layer.output, layer.output_bias)


def write_keys(projected: Tensor, layer, config, cache, index: int, numbers) -> Tensor:
    """Turned queries [R, heads, D] of rows whose queries, keys and values are there, see attend; the keys and values go
    to their places in the cache."""
    slots = numbers.whole_slots if index in cache.unshifted else numbers.slots
    places = (numbers.positions, numbers.row_sequences, slots)
    (k, v), rope = cache.keys_values[index], cache.ropes[index]
    if not layer.has_keys:
        k, v = k[:, :0], v[:, :0]
    options = {"heads": config.heads, "query_scales": rope.query_scales, "norm_values": config.norms_values}
    if layer.head_scales is not None or config.norms_values:
        options |= {"norm": layer.head_scales, "epsilon": config.norm_epsilon}
    return rotary_write(projected, rope.cos_sin, *places, k, v, **options)


def feed_forward(x: Tensor, gate_up: LinearWeight, down: LinearWeight, activation: str = "silu") -> Tensor:
    """A gated layer: down (activation(gate x) up x), where gate and up are one matrix; or, with relu2, down relu(up
    x)^2."""
    return _project(_activated(_project(x, gate_up), None, activation, x.dtype), down)


def experts(x: Tensor, layer, config) -> Tensor:
    """Gated layers of which each row goes to a few, by a router in fp32, and one of all rows where there is one.

    Args:
        layer: has the experts' matrices, see architectures.mixture.MixtureLayer.
        config: has how many a row goes to, see architectures.mixture.MixtureConfig.
    """
    logits = _project(x, layer.router, layer.router_bias)
    options = {"bias": layer.choice_bias, "sigmoid": config.sigmoid_gates, "scale": config.gate_scale}
    gates, ids = route_experts(logits, config.experts_per_token, renormalise=config.renormalise, **options)
    gate, up = expert_gates(x, ids, layer.gate_up, layer.gate_up_biases)
    inner = _activated(gate, up, config.activation, x.dtype)
    values = expert_linear(inner, ids.view(-1, 1), layer.down, layer.down_bias, out_dtype=torch.float32)
    if not config.shared_size:
        return mix_experts(values, gates)
    shared = feed_forward(x, layer.shared_gate_up, layer.shared_down, config.activation)
    if layer.shared_router is None:
        return mix_experts(values, gates, shared)
    shared_gates, _ = route_experts(_project(x, layer.shared_router), 1, sigmoid=True)
    return mix_experts(values, gates, shared, shared_gates)


def _activated(gate: Tensor, up: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    """The inner rows of a feed-forward layer."""
    if activation == "relu2":
        return swiglu(gate, up=gate, activation="relu", out_dtype=dtype)
    return swiglu(gate, up=up, activation=activation, out_dtype=dtype)


def expert_gates(
    x: Tensor, ids: Tensor, gate_up: ExpertWeight | JoinedExperts, bias: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gates and ups of the experts that rows chose, as swiglu takes them: joined and None, or apart.

    They are apart where their formats differ; so are their biases then.
    """
    if not isinstance(gate_up, JoinedExperts):
        return expert_linear(x, ids, gate_up, bias, out_dtype=torch.float32), None
    biases = (None, None) if bias is None else bias
    gate, up = (
        expert_linear(x, ids, weight, own, out_dtype=torch.float32)
        for weight, own in zip(gate_up.split(), biases, strict=True)
    )
    return gate, up


def mamba2(
    x: Tensor, mixer: dict, state: tuple[Tensor, ...], round, epsilon: float, *, norm_first: bool = False
) -> Tensor:
    """The recurrence of Mamba-2, whose state is changed in place:

        z, x|B|C, dt = in_proj(x);  x|B|C = conv(x|B|C);  out_proj(group norm(recurrence(x, dt, B, C) silu(z)))

    Args:
        mixer: tensors by the names of architectures.state_space.MIXER; without a gate_norm nothing is normed.
        state: of the layer, see StateCache.layer.
        round: the trees, a pyspec.ops.selective_state.Round.
        epsilon: of the group norm.
        norm_first: whether it is the recurrence that is normed, and then gated.
    """
    memory, window, record, conv_record = state
    channels, conv_channels = memory.shape[1] * LANES, window.shape[2]
    parts = [channels, conv_channels, len(mixer["A"])]
    z, inner, dt = _project(x, mixer["in_proj"], mixer["in_bias"]).split(parts, 1)
    inner = causal_conv(window, conv_record, inner, mixer["conv_weight"], mixer["conv_bias"], round)
    inner, B, C = inner.split([channels, *[(conv_channels - channels) // 2] * 2], 1)
    scales = mixer["gate_norm"]
    settings = {"D": mixer["D"], "dt_bias": mixer["dt_bias"], "z": None if norm_first else z}
    settings["out_dtype"] = x.dtype if scales is None else torch.float32
    y = selective_state(memory, record, inner, dt, mixer["A"], B, C, round, **settings)
    if scales is not None:
        normed = torch.float32 if norm_first else x.dtype
        y = rms_norm(y.view(-1, scales.shape[1]), scales, epsilon, out_dtype=normed).view(-1, channels)
    if norm_first:
        y = swiglu(z, up=y, out_dtype=x.dtype)
    return _project(y, mixer["out_proj"], mixer["out_bias"])


def gated_delta_net(x: Tensor, layer, config, state: tuple[Tensor, ...], round) -> Tensor:
    """A gated delta net, whose state is changed in place:

        q|k|v, z, beta, decay = in_proj(x);  q|k|v = conv(q|k|v);  out_proj(head norm(recurrence(q, k, v)) silu(z))

    Args:
        layer: see architectures.delta_net.DeltaLayer.
        config: has the recurrence's shape, an architectures.delta_net.DeltaShape, as `recurrence`.
        state: of the layer, see StateCache.layer.
        round: the trees, a pyspec.ops.selective_state.Round.
    """
    memory, window, record, conv_record = state
    shape = config.recurrence
    parts = [shape.conv_channels, shape.channels, shape.heads, shape.heads]
    inner, z, beta, decay = _project(x, layer.in_proj).split(parts, 1)
    inner = causal_conv(window, conv_record, inner, layer.conv_weight, None, round)
    q, k, v = inner.split([shape.key_channels, shape.key_channels, shape.channels], 1)
    settings = {"dt_bias": layer.dt_bias, "strength": shape.strength, "tiled": shape.tiled}
    y = gated_delta(memory, record, q, k, v, decay, beta, layer.A, round, **settings)
    epsilon = config.norm_epsilon if shape.norm_epsilon is None else shape.norm_epsilon
    y = rms_norm(y.view(-1, shape.head_dim), layer.gate_norm, epsilon)
    return _project(swiglu(z, up=y.view(-1, shape.channels), out_dtype=x.dtype), layer.out_proj)


def mamba(x: Tensor, mixer: dict, state: tuple[Tensor, ...], round, epsilon: float = 0.0) -> Tensor:
    """The recurrence of Mamba, whose state is changed in place; arguments as for mamba2:

    x, z = in_proj(x);  x = conv(x);  low, B, C = x_proj(x);  dt = dt_proj(low)
    out_proj(recurrence(x, dt, B, C) silu(z))

    With a BC_proj, which gives B and C, low, B and C are normed; epsilon is of these norms.
    """
    memory, window, record, conv_record = state
    channels, states, dtype = window.shape[2], memory.shape[2], x.dtype
    inner, z = _project(x, mixer["in_proj"], mixer["in_bias"]).split(channels, 1)
    taps = (mixer["conv_weight"], mixer["conv_bias"])
    inner = causal_conv(window, conv_record, inner, *taps, round, out_dtype=dtype)
    if mixer["BC_proj"] is None:
        low, B, C = linear(inner, mixer["x_proj"], out_dtype=dtype).split([mixer["dt_proj"].inputs, states, states], 1)
    else:
        low = rms_norm(_project(inner, mixer["x_proj"]), mixer["low_norm"], epsilon, out_dtype=dtype)
        BC = _project(inner, mixer["BC_proj"]).view(-1, states)
        B, C = rms_norm(BC, mixer["BC_norm"], epsilon, out_dtype=dtype).view(-1, 2 * states).split(states, 1)
    dt = _project(low, mixer["dt_proj"])
    settings = {"D": mixer["D"], "dt_bias": mixer["dt_bias"], "z": z, "out_dtype": dtype}
    y = selective_state(memory, record, inner, dt, mixer["A"], B, C, round, **settings)
    return _project(y, mixer["out_proj"], mixer["out_bias"])


def short_convolution(x: Tensor, mixer: dict, state: tuple[Tensor, ...], round) -> Tensor:
    """A short convolution between two gates, whose state is a window alone; arguments as for mamba2:

    B, C, x = in_proj(x);  out_proj(C conv(B x))
    """
    _, window, _, conv_record = state
    B, C, inner = _project(x, mixer["in_proj"], mixer["in_bias"]).split(window.shape[2], 1)
    taps = (mixer["conv_weight"], mixer["conv_bias"])
    inner = causal_conv(window, conv_record, swiglu(B, up=inner, activation="none"), *taps, round, is_linear=True)
    return _project(swiglu(C, up=inner, activation="none", out_dtype=x.dtype), mixer["out_proj"], mixer["out_bias"])


def _project(x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
    return linear(x, weight, bias, out_dtype=torch.float32)
