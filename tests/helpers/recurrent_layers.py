"""Layers of the recurrent ops with random weights, for tests that hold them against closed forms and plain decoding."""

from dataclasses import dataclass

import torch

from pyspec import DraftTree
from pyspec.ops import Round, gated_delta, selective_state
from pyspec.ops.selective_state import to_panels
from tests.helpers.rounds import chain_round

SEQUENCES, NODES = 4, 24


@dataclass
class SelectiveLayer:
    """A layer of Mamba (head_dim 1) or Mamba-2, with room for SEQUENCES; what is not used is NaN."""

    heads: int = 2
    head_dim: int = 32
    groups: int = 1
    states: int = 16
    has_d: bool = True
    has_z: bool = True

    def __post_init__(self):
        torch.manual_seed(self.heads + self.states)
        self.channels = self.heads * self.head_dim
        rates = (self.channels, self.states) if self.head_dim == 1 else (self.heads,)
        self.A = -torch.rand(rates).mul(3).exp()  # -1 to -20
        self.D = torch.randn(self.channels) if self.has_d else None
        self.dt_bias = torch.randn(self.heads)
        self.state = torch.full((SEQUENCES, self.channels // 16, self.states, 16), torch.nan)
        self.state[2].normal_()
        width = self.channels + self.heads + self.groups * self.states
        self.record = torch.full((2, SEQUENCES, NODES, width), torch.nan)

    def inputs(self, rows: int, dtype=torch.float32) -> dict:
        dt = torch.randn(rows, self.heads)
        dt[rows // 2, 0] = 25.0  # beyond where softplus is the identity
        B_size = self.groups * self.states
        wide = torch.randn(rows, self.channels + 2 * B_size + 8).to(dtype)
        x, B, C, _ = wide.split([self.channels, B_size, B_size, 8], 1)
        z = torch.randn(rows, self.channels) if self.has_z else None
        return {"x": x, "dt": dt, "B": B, "C": C, "z": z}

    def weights(self) -> dict:
        A = to_panels(self.A) if self.A.dim() == 2 else self.A
        return {"A": A, "D": self.D, "dt_bias": self.dt_bias}

    def call(self, inputs: dict, round: Round, **options) -> torch.Tensor:
        return selective_state(self.state, self.record, **inputs, **self.weights(), round=round, **options)

    def expected(self, before: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """y [n, channels] and the last state [channels, states] of a text in float64, each as one sum over its past.

        Not a recurrence: s[t] = e^(A (dt[0] + ... + dt[t])) s + sum over u <= t of e^(A (dt[u+1] + ... + dt[t])) ...
        """
        x, dt, B, C, z = (None if value is None else value.double() for value in inputs.values())
        rows = len(x)
        dt = (torch.log1p((dt + self.dt_bias).exp())).repeat_interleave(self.head_dim, 1)  # [n, channels]
        B, C = (
            value.view(rows, self.groups, self.states).repeat_interleave(self.channels // self.groups, 1)
            for value in (B, C)
        )
        A = self.A.double()
        A = A if A.dim() == 2 else A.repeat_interleave(self.head_dim)[:, None]
        passed = dt.cumsum(0)[..., None] * A  # [n, channels, N or 1]
        decays = (passed[:, None] - passed[None]).exp()  # [t, u, channels, ...]
        decays = decays * torch.ones(rows, rows).tril()[..., None, None]
        added = (dt * x)[..., None] * B
        states = passed.exp() * before.double() + (decays.nan_to_num(0, 0) * added).sum(1)
        y = (states * C).sum(2)
        if self.D is not None:
            y += self.D * x
        if z is not None:
            y *= torch.nn.functional.silu(z)
        return y, states[-1]


@dataclass
class DeltaLayer:
    """A gated delta net, with room for SEQUENCES; what is not used is NaN."""

    heads: int = 2
    head_dim: int = 32
    key_heads: int = 1
    keys: int = 16
    per_key: bool = False
    strength: float = 1.0
    tiled: bool = False

    def __post_init__(self):
        torch.manual_seed(self.heads + self.keys)
        self.channels, self.decays = self.heads * self.head_dim, self.heads * (self.keys if self.per_key else 1)
        self.A = -torch.rand(self.heads).exp()
        self.dt_bias = torch.randn(self.decays)
        self.state = torch.full((SEQUENCES, self.channels // 16, self.keys, 16), torch.nan)
        self.state[2].normal_()
        width = self.key_heads * self.keys + self.channels + self.decays
        self.record = torch.full((2, SEQUENCES, NODES, width), torch.nan)

    def inputs(self, rows: int, dtype=torch.float32) -> dict:
        decay = torch.randn(rows, self.decays) - 2
        decay[rows // 2, 0] = 25.0  # beyond where softplus is the identity
        sizes = [self.key_heads * self.keys] * 2 + [self.channels, 8]
        q, k, v, _ = torch.randn(rows, sum(sizes)).to(dtype).split(sizes, 1)
        beta = torch.randn(rows, self.heads + 3)[:, 3:]
        return {"q": q, "k": k, "v": v, "decay": decay, "beta": beta}

    def weights(self) -> dict:
        return {"A": self.A, "dt_bias": self.dt_bias, "strength": self.strength, "tiled": self.tiled}

    def call(self, inputs: dict, round: Round, **options) -> torch.Tensor:
        return gated_delta(self.state, self.record, **inputs, **self.weights(), round=round, **options)

    def expected(self, before: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """y [n, channels] and the last state [channels, keys] of a text in float64, by products of matrices.

        Not a correction: s[t] = M[t] s[t - 1] + beta k v with M = (I - beta k k) d, a matrix over keys.
        """
        q, k, v, decay, beta = (value.double() for value in inputs.values())
        rows = len(v)
        shared = self.heads // self.key_heads
        q, k = (
            x.repeat(1, shared, 1) if self.tiled else x.repeat_interleave(shared, 1)
            for x in (
                x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()
                for x in (q.view(rows, -1, self.keys), k.view(rows, -1, self.keys))
            )
        )
        d = (self.A.double()[:, None] * torch.log1p((decay + self.dt_bias).exp()).view(rows, self.heads, -1)).exp()
        beta = self.strength / (1 + (-beta).exp())
        v = v.view(rows, self.heads, self.head_dim)
        state = before.double().view(self.heads, self.head_dim, self.keys).mT  # [heads, keys, head_dim]
        y = torch.empty_like(v)
        for t in range(rows):
            corrects = beta[t, :, None, None] * k[t, :, :, None]
            moves = (torch.eye(self.keys) - corrects * k[t, :, None]) * d[t, :, None]
            state = moves @ state + corrects * v[t, :, None]
            y[t] = (q[t, :, None] @ state)[:, 0] / self.keys**0.5
        return y.flatten(1), state.mT.flatten(0, 1)


SELECTIVE_LAYERS = {
    "mamba": {"heads": 80, "head_dim": 1},
    "mamba, 32 states": {"heads": 16, "head_dim": 1, "states": 32},
    "mamba2": {"heads": 3, "head_dim": 64, "states": 128},
    "mamba2, heads of 80": {"heads": 2, "head_dim": 80, "states": 64},
    "mamba2, 8 groups": {"heads": 16, "head_dim": 16, "groups": 8},
    "mamba2 without D and z": {"has_d": False, "has_z": False},
}
DELTA_LAYERS = {
    "a key head for all": {},
    "Qwen3.5": {"heads": 4, "head_dim": 128, "key_heads": 2, "keys": 128},
    "heads that take turns": {"heads": 6, "head_dim": 32, "key_heads": 2, "keys": 32, "tiled": True},
    "heads of their own, strong": {"heads": 3, "head_dim": 48, "key_heads": 3, "keys": 32, "strength": 2.0},
    "a decay a key": {"heads": 4, "head_dim": 64, "key_heads": 4, "keys": 64, "per_key": True},
}


def rows_of(inputs: dict, rows) -> dict:
    return {name: None if value is None else value[rows] for name, value in inputs.items()}


def decode(layer: SelectiveLayer | DeltaLayer, inputs: dict, sequence: int = 2) -> torch.Tensor:
    """Plain decoding: each round replays the one node of the round before. The state is behind the last node."""
    half, out = 0, []
    for row in range(len(next(iter(inputs.values())))):
        path = [0] if row else []
        out.append(layer.call(rows_of(inputs, [row]), chain_round(1, sequence, path, half)))
        half = 1 - half
    replay = Round.of([DraftTree.chain([0])], [sequence], [[0] if out else []], [half])
    layer.call(layer.inputs(1), replay)
    return torch.cat(out) if out else torch.empty(0, layer.channels)
