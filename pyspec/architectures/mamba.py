"""Mamba models. Every channel has a decay for each of its states, and a dt of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyspec.architectures.blocks import mamba
from pyspec.architectures.state_space import StateSpaceConfig, StateSpaceLayer
from pyspec.architectures.weights import Blank, Matrix
from pyspec.ops.selective_state import LANES, MULTIPLE, to_panels

__all__ = ["MambaConfig", "MambaLayer"]


@dataclass(frozen=True)
class MambaConfig(StateSpaceConfig):
    """The shape of a model."""

    vocab_size: int
    hidden_size: int
    layers: int
    channels: int
    state_size: int
    dt_rank: int
    conv_taps: int
    norm_epsilon: float
    projection_bias: bool = False
    conv_bias: bool = True
    tied_embedding: bool = True
    architecture: str = "mamba"

    def __post_init__(self):
        self.check_positive("vocab_size", "hidden_size", "layers", "channels", "state_size", "dt_rank", "conv_taps")
        if self.channels % LANES or self.state_size % MULTIPLE:
            raise ValueError(
                f"RecurrentRunner has channels in multiples of {LANES} and state_size in multiples of {MULTIPLE}, "
                f"got {self.channels} and {self.state_size}"
            )

    @property
    def conv_channels(self) -> int:
        return self.channels

    @property
    def record_width(self) -> int:
        return 2 * self.channels + self.state_size

    def empty_layer(self, blank: Blank) -> MambaLayer:
        return MambaLayer(
            norm=blank.vector(self.hidden_size),
            in_proj=blank.matrix(2 * self.channels, self.hidden_size),
            in_bias=blank.vector(2 * self.channels) if self.projection_bias else None,
            conv_weight=blank.vector(self.conv_taps, self.channels),
            conv_bias=blank.vector(self.channels) if self.conv_bias else None,
            x_proj=blank.matrix(self.dt_rank + 2 * self.state_size, self.channels),
            dt_proj=blank.matrix(self.channels, self.dt_rank),
            dt_bias=blank.vector(self.channels),
            A_log=blank.vector(self.channels, self.state_size),
            D=blank.vector(self.channels),
            out_proj=blank.matrix(self.hidden_size, self.channels),
            out_bias=blank.vector(self.hidden_size) if self.projection_bias else None,
        )


@dataclass
class MambaLayer(StateSpaceLayer):
    """One layer; see StateSpaceLayer."""

    MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")
    NAMES = {
        "in_proj": "in_proj.weight",
        "in_bias": "in_proj.bias",
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "x_proj": "x_proj.weight",
        "dt_proj": "dt_proj.weight",
        "dt_bias": "dt_proj.bias",
        "out_proj": "out_proj.weight",
        "out_bias": "out_proj.bias",
    }

    norm: Tensor  # [hidden]
    in_proj: Matrix  # [2 channels, hidden]: x, then z
    in_bias: Tensor | None
    conv_weight: Tensor  # [taps, channels]
    conv_bias: Tensor | None
    x_proj: Matrix  # [dt_rank + 2 state_size, channels]: what becomes dt, then B and C
    dt_proj: Matrix  # [channels, dt_rank]
    dt_bias: Tensor  # [channels]
    A_log: Tensor  # [channels, state_size]
    D: Tensor  # [channels]
    out_proj: Matrix  # [hidden, channels]
    out_bias: Tensor | None

    def computed(self, config: MambaConfig) -> dict[str, Tensor]:
        return {"A": to_panels(-self.A_log.exp())}

    def mix(self, config: MambaConfig, x: Tensor, state: tuple[Tensor, ...], round) -> Tensor:
        return mamba(x, self.mixer(config), state, round)
