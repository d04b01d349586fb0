"""The calls of recurrent layers that `pyspec bench kernels` times, and the shapes of such layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from pyspec import ops
from pyspec.measure.problems import TREE, Problem, Random, nbytes
from pyspec.tree import DraftTree

__all__ = ["DeltaNet", "StateSpace", "causal_conv_problem", "gated_delta_problem", "selective_state_problem"]


@dataclass(frozen=True)
class StateSpace:
    """Mamba-2: inputs of heads * head_dim channels, one group."""

    hidden: int
    heads: int
    head_dim: int
    state: int
    taps: int = 4

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.channels + 2 * self.state


@dataclass(frozen=True)
class DeltaNet:
    """A gated delta net: key heads are `state` wide."""

    heads: int
    head_dim: int
    key_heads: int
    state: int
    taps: int = 4

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.channels + 2 * self.key_heads * self.state


def _round(device: str) -> ops.Round:
    """A chain of TREE / 2 drafts behind four accepted ones."""
    chain = DraftTree.chain([0] * (TREE // 2))
    return ops.Round.of([chain], [0], [range(4)], [0], device=device)


def selective_state_problem(s: StateSpace, device: str) -> Problem:
    random, rows = Random(device), TREE // 2
    state = random(1, s.channels // 16, s.state, 16)
    record = random(2, 1, rows, s.channels + s.heads + s.state, scale=0.1)
    x, B, C = random(rows, s.channels), random(rows, s.state), random(rows, s.state)
    dt, A, D = random(rows, s.heads), -random(s.heads).abs(), random(s.heads).repeat_interleave(s.head_dim)
    bias, round, kept = torch.full((s.heads,), -4.0, device=device), _round(device), (state.clone(), record.clone())

    def fresh() -> None:
        state.copy_(kept[0])
        record.copy_(kept[1])

    return Problem(
        lambda: ops.selective_state(state, record, x, dt, A, B, C, round, D=D, dt_bias=bias),
        bytes=2 * state.nbytes + nbytes(x, dt, B, C, x) + record.nbytes // 2,
        operations=(4 + rows) * 5 * state.numel() + rows * 2 * state.numel(),
        tolerance=1e-3,
        fresh=fresh,
    )


def gated_delta_problem(s: DeltaNet, device: str) -> Problem:
    random, rows, keys = Random(device), TREE // 2, s.key_heads * s.state
    state, record = random(1, s.channels // 16, s.state, 16), random(2, 1, rows, keys + s.channels + s.heads, scale=0.1)
    q, k, v = random(rows, keys), random(rows, keys), random(rows, s.channels)
    decay, beta, A = random(rows, s.heads), random(rows, s.heads), -random(s.heads).abs()
    round, kept = _round(device), (state.clone(), record.clone())

    def fresh() -> None:
        state.copy_(kept[0])
        record.copy_(kept[1])

    return Problem(
        lambda: ops.gated_delta(state, record, q, k, v, decay, beta, A, round),
        bytes=2 * state.nbytes + nbytes(q, k, v, decay, beta, v) + record.nbytes // 2,
        operations=(3 * (4 + rows) + 4 * rows) * state.numel(),
        tolerance=1e-3,
        fresh=fresh,
    )


def causal_conv_problem(s: StateSpace | DeltaNet, device: str) -> Problem:
    random, rows, channels = Random(device), TREE // 2, s.conv_channels
    window, record = random(1, s.taps - 1, channels), random(2, 1, rows, channels)
    x, weight, bias, round = random(rows, channels), random(s.taps, channels), random(channels), _round(device)
    kept = window.clone()
    return Problem(
        lambda: ops.causal_conv(window, record, x, weight, bias, round),
        bytes=2 * window.nbytes + nbytes(x, weight, x) + record.nbytes // 2,
        operations=2 * s.taps * x.numel(),
        peers={"torch conv1d": lambda: F.conv1d(x.T[None], weight.T[:, None].contiguous(), bias, groups=channels)},
        fresh=lambda: window.copy_(kept),
    )
