"""MambaRunner: Mamba models. Every channel has a decay for each of its states, and a dt of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.models._weights import Matrix, dense
from pyspec.models.state_space import StateSpaceLayer, StateSpaceRunner
from pyspec.ops.selective_state import LANES, MULTIPLE, to_panels

__all__ = ["MambaConfig", "MambaLayer", "MambaRunner"]


@dataclass(frozen=True)
class MambaConfig:
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
        for name in ("vocab_size", "hidden_size", "layers", "channels", "state_size", "dt_rank", "conv_taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.channels % LANES or self.state_size % MULTIPLE:
            raise ValueError(
                f"MambaRunner has channels in multiples of {LANES} and state_size in multiples of {MULTIPLE}, "
                f"got {self.channels} and {self.state_size}"
            )

    @property
    def conv_channels(self) -> int:
        return self.channels

    @property
    def record_width(self) -> int:
        return 2 * self.channels + self.state_size

    def empty_layer(self, dtype: torch.dtype, device: torch.device) -> MambaLayer:
        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def new_exact(*shape: int) -> Tensor:  # vectors: as exact as the arithmetic they are part of
            return new(*shape, dtype=torch.float32)

        return MambaLayer(
            norm=new_exact(self.hidden_size),
            in_proj=new(2 * self.channels, self.hidden_size),
            in_bias=new_exact(2 * self.channels) if self.projection_bias else None,
            conv_weight=new_exact(self.conv_taps, self.channels),
            conv_bias=new_exact(self.channels) if self.conv_bias else None,
            x_proj=new(self.dt_rank + 2 * self.state_size, self.channels),
            dt_proj=new(self.channels, self.dt_rank),
            dt_bias=new_exact(self.channels),
            A_log=new_exact(self.channels, self.state_size),
            D=new_exact(self.channels),
            out_proj=new(self.hidden_size, self.channels),
            out_bias=new_exact(self.hidden_size) if self.projection_bias else None,
        )


@dataclass
class MambaLayer(StateSpaceLayer):
    """One layer, as checkpoints have it but for the convolution, whose taps come first."""

    MATRICES = ("in_proj", "x_proj", "dt_proj", "out_proj")

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

    def named(self, config: MambaConfig, prefix: str) -> dict[str, Tensor]:
        mixer = prefix + "mixer."
        tensors = {
            prefix + "norm.weight": self.norm,
            mixer + "in_proj.weight": dense(self.in_proj),
            mixer + "in_proj.bias": self.in_bias,
            mixer + "conv1d.weight": self.conv_weight.T[:, None],
            mixer + "conv1d.bias": self.conv_bias,
            mixer + "x_proj.weight": dense(self.x_proj),
            mixer + "dt_proj.weight": dense(self.dt_proj),
            mixer + "dt_proj.bias": self.dt_bias,
            mixer + "A_log": self.A_log,
            mixer + "D": self.D,
            mixer + "out_proj.weight": dense(self.out_proj),
            mixer + "out_proj.bias": self.out_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def kernel_tensors(self, config: MambaConfig) -> dict[str, Tensor]:
        tensors = {
            "norm": self.norm,
            "in_proj": self.in_proj.data,
            "in_bias": self.in_bias,
            "conv_weight": self.conv_weight,
            "conv_bias": self.conv_bias,
            "x_proj": self.x_proj.data,
            "dt_proj": self.dt_proj.data,
            "A": to_panels(-self.A_log.exp()),
            "D": self.D,
            "dt_bias": self.dt_bias,
            "out_proj": self.out_proj.data,
            "out_bias": self.out_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class MambaRunner(StateSpaceRunner):
    """A Mamba model; see StateSpaceRunner."""

    config: MambaConfig
