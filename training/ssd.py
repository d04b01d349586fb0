"""The matrix form of Mamba-2's recurrence ("SSD"), to train with: transformers' own without mamba_ssm is slow.

Within a chunk, outputs are sums over the chunk's earlier tokens, a product of matrices; between chunks one state is
handed on. What B and C have in common in all heads of a group is computed once a group, which is where most of the
difference lies. It sums in another order than `selective_state` does, so it is for training only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ssd", "use_ssd"]

CHUNK = 64


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int = CHUNK) -> Tensor:
    """y[t] = sum over u <= t of e^(A (dt[u+1] + ... + dt[t])) (C[t] B[u]) dt[u] x[u], differentiable.

    Args:
        x: [batch, length, heads, P].
        dt: [batch, length, heads] fp32, after softplus.
        A: [heads] fp32, negative.
        B, C: [batch, length, groups, N].
        chunk: tokens of a chunk.

    Returns:
        [batch, length, heads, P] fp32.
    """
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    chunks = -(-length // chunk)

    def cut(values: Tensor) -> Tensor:
        """[batch, length, items, size] as [batch, groups, items of a group, chunks, chunk, size]."""
        if length % chunk:
            values = F.pad(values, (0, 0, 0, 0, 0, -length % chunk))
        return values.view(batch, chunks, chunk, groups, -1, values.shape[-1]).permute(0, 3, 4, 1, 2, 5)

    B, C = cut(B), cut(C)  # [batch, groups, 1, chunks, chunk, N]
    inputs = cut(x * dt[..., None])  # [batch, groups, heads of a group, chunks, chunk, P]
    passed = cut((dt * A)[..., None]).squeeze(-1).cumsum(-1)  # [..., chunks, chunk], fp32

    # within a chunk: what u adds to t, for t >= u; before exp, for above the diagonal it may overflow
    above = torch.ones(chunk, chunk, dtype=torch.bool, device=x.device).triu(1)
    decay = (passed[..., :, None] - passed[..., None, :]).masked_fill(above, -torch.inf).exp()
    y = ((C @ B.mT) * decay) @ inputs

    if chunks > 1:
        # what a chunk adds to the state, and the state before each chunk
        end = passed[..., -1:]
        added = (B.mT @ (inputs * (end - passed).exp()[..., None])).float()  # [..., chunks, N, P]
        kept = end.exp()[..., None]
        state, before = torch.zeros_like(added[..., 0, :, :]), []
        for added_here, kept_here in zip(added.unbind(3), kept.unbind(3), strict=True):
            before.append(state)
            state = state * kept_here + added_here
        y = y + (C @ torch.stack(before, 3).to(C.dtype)) * passed.exp()[..., None]
    y = y.permute(0, 3, 4, 1, 2, 5).reshape(batch, chunks * chunk, heads, width)
    return y[:, :length].float()


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[batch, length, channels] with weight [channels, 1, taps]; compiled, some times as fast as F.conv1d backwards."""
    taps, length = weight.shape[-1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = sum(padded[:, tap : tap + length] * weight[:, 0, tap] for tap in range(taps))
    return y if bias is None else y + bias


def mix(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    groups: int,
    states: int,
    epsilon: float,
) -> Tensor:
    """What a mixer of Mamba-2 does between its two projections: [batch, length, ...] as [batch, length, channels].

    The arguments are named as in transformers' Mamba2Mixer; projected holds z, then x, B and C, then dt.
    """
    heads, channels = len(A_log), len(norm_weight)
    shared = groups * states
    z, x, dt = projected.split([channels, channels + 2 * shared, heads], -1)
    x, B, C = F.silu(causal_conv(x, conv_weight, conv_bias)).split([channels, shared, shared], -1)
    x = x.unflatten(-1, (heads, -1))
    dt = F.softplus(dt.float() + dt_bias)
    y = ssd(x, dt, -A_log.float().exp(), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1)))
    y = (y + D[:, None] * x).flatten(-2) * F.silu(z.float())
    y = F.rms_norm(y.unflatten(-1, (groups, -1)), (channels // groups,), eps=epsilon).flatten(-2)
    return (y * norm_weight).to(projected.dtype)


def use_ssd(model, compiled: bool = False) -> None:
    """Makes the mixers of a Mamba2ForCausalLM run by `mix`, without a cache; its weights and their names stay.

    compiled: by torch.compile, for long runs: it takes a minute, and fuses what is not a product of matrices.
    """
    function = torch.compile(mix, dynamic=False) if compiled else mix
    for block in model.backbone.layers:
        block.mixer.forward = _Mixer(block.mixer, function)


class _Mixer:
    """The forward of transformers' Mamba2Mixer."""

    def __init__(self, mixer, function):
        self.mixer, self.function = mixer, function

    def __call__(self, hidden: Tensor, **unused) -> Tensor:
        mixer, conv = self.mixer, self.mixer.conv1d
        vectors = (mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
        settings = (mixer.n_groups, mixer.ssm_state_size, mixer.layer_norm_epsilon)
        return mixer.out_proj(self.function(mixer.in_proj(hidden), conv.weight, conv.bias, *vectors, *settings))
