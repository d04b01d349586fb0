"""Mamba-2 models (state-spaces' and Codestral's). One decay a head, B and C shared by groups of heads."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyspec.architectures.blocks import mamba2
from pyspec.architectures.state_space import StateSpaceConfig, StateSpaceLayer
from pyspec.architectures.weights import Blank, Matrix
from pyspec.ops.selective_state import LANES, MULTIPLE

__all__ = ["Mamba2Config", "Mamba2Layer"]


@dataclass(frozen=True)
class Mamba2Config(StateSpaceConfig):
    """The shape of a model."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    groups: int
    state_size: int
    conv_taps: int
    norm_epsilon: float
    projection_bias: bool = False
    conv_bias: bool = True
    tied_embedding: bool = False
    architecture: str = "mamba2"
    dt_rank: int = 0

    def __post_init__(self):
        self.check_positive("vocab_size", "hidden_size", "layers", "heads", "head_dim")
        self.check_positive("groups", "state_size", "conv_taps")
        if self.head_dim % LANES or self.state_size % MULTIPLE:
            raise ValueError(
                f"RecurrentRunner has head_dim in multiples of {LANES} and state_size in multiples of {MULTIPLE}, "
                f"got {self.head_dim} and {self.state_size}"
            )
        if self.heads % self.groups:
            raise ValueError(f"heads must be a multiple of groups, got {self.heads} and {self.groups}")

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_channels(self) -> int:
        return self.channels + 2 * self.groups * self.state_size

    @property
    def record_width(self) -> int:
        return self.channels + self.heads + self.groups * self.state_size

    def empty_layer(self, blank: Blank) -> Mamba2Layer:
        inputs = self.channels + self.conv_channels + self.heads
        return Mamba2Layer(
            norm=blank.vector(self.hidden_size),
            in_proj=blank.matrix(inputs, self.hidden_size),
            in_bias=blank.vector(inputs) if self.projection_bias else None,
            conv_weight=blank.vector(self.conv_taps, self.conv_channels),
            conv_bias=blank.vector(self.conv_channels) if self.conv_bias else None,
            A_log=blank.vector(self.heads),
            D=blank.vector(self.heads),
            dt_bias=blank.vector(self.heads),
            gate_norm=blank.vector(self.channels),
            out_proj=blank.matrix(self.hidden_size, self.channels),
            out_bias=blank.vector(self.hidden_size) if self.projection_bias else None,
        )


@dataclass
class Mamba2Layer(StateSpaceLayer):
    """One layer; see StateSpaceLayer."""

    MATRICES = ("in_proj", "out_proj")
    NAMES = {
        "in_proj": "in_proj.weight",
        "in_bias": "in_proj.bias",
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "gate_norm": "norm.weight",
        "out_proj": "out_proj.weight",
        "out_bias": "out_proj.bias",
    }

    norm: Tensor  # [hidden]
    in_proj: Matrix  # [channels + conv_channels + heads, hidden]: z, then x, B and C, then dt
    in_bias: Tensor | None
    conv_weight: Tensor  # [taps, conv_channels]
    conv_bias: Tensor | None
    A_log: Tensor  # [heads]
    D: Tensor  # [heads]
    dt_bias: Tensor  # [heads]
    gate_norm: Tensor  # [channels]
    out_proj: Matrix  # [hidden, channels]
    out_bias: Tensor | None

    def computed(self, config: Mamba2Config) -> dict[str, Tensor]:
        return {
            "A": -self.A_log.exp(),
            "D": self.D.repeat_interleave(config.head_dim),
            "gate_norm": self.gate_norm.view(config.groups, -1),
        }

    def mix(self, config: Mamba2Config, x: Tensor, state: tuple[Tensor, ...], round) -> Tensor:
        return mamba2(x, self.mixer(config), state, round, config.norm_epsilon)
