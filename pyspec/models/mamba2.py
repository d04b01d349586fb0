"""Mamba2Runner: Mamba-2 models (state-spaces' and Codestral's). One decay a head, B and C shared by groups of heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyspec.models._weights import Matrix, dense
from pyspec.models.state_space import StateSpaceLayer, StateSpaceRunner
from pyspec.ops.selective_state import LANES, MULTIPLE

__all__ = ["Mamba2Config", "Mamba2Layer", "Mamba2Runner"]


@dataclass(frozen=True)
class Mamba2Config:
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
        for name in ("vocab_size", "hidden_size", "layers", "heads", "head_dim", "groups", "state_size", "conv_taps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim % LANES or self.state_size % MULTIPLE:
            raise ValueError(
                f"Mamba2Runner has head_dim in multiples of {LANES} and state_size in multiples of {MULTIPLE}, "
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

    def empty_layer(self, dtype: torch.dtype, device: torch.device) -> Mamba2Layer:
        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        def new_exact(*shape: int) -> Tensor:  # vectors: as exact as the arithmetic they are part of
            return new(*shape, dtype=torch.float32)

        inputs = self.channels + self.conv_channels + self.heads
        return Mamba2Layer(
            norm=new_exact(self.hidden_size),
            in_proj=new(inputs, self.hidden_size),
            in_bias=new_exact(inputs) if self.projection_bias else None,
            conv_weight=new_exact(self.conv_taps, self.conv_channels),
            conv_bias=new_exact(self.conv_channels) if self.conv_bias else None,
            A_log=new_exact(self.heads),
            D=new_exact(self.heads),
            dt_bias=new_exact(self.heads),
            gate_norm=new_exact(self.channels),
            out_proj=new(self.hidden_size, self.channels),
            out_bias=new_exact(self.hidden_size) if self.projection_bias else None,
        )


@dataclass
class Mamba2Layer(StateSpaceLayer):
    """One layer, as checkpoints have it but for the convolution, whose taps come first."""

    MATRICES = ("in_proj", "out_proj")

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

    def named(self, config: Mamba2Config, prefix: str) -> dict[str, Tensor]:
        mixer = prefix + "mixer."
        tensors = {
            prefix + "norm.weight": self.norm,
            mixer + "in_proj.weight": dense(self.in_proj),
            mixer + "in_proj.bias": self.in_bias,
            mixer + "conv1d.weight": self.conv_weight.T[:, None],
            mixer + "conv1d.bias": self.conv_bias,
            mixer + "A_log": self.A_log,
            mixer + "D": self.D,
            mixer + "dt_bias": self.dt_bias,
            mixer + "norm.weight": self.gate_norm,
            mixer + "out_proj.weight": dense(self.out_proj),
            mixer + "out_proj.bias": self.out_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def kernel_tensors(self, config: Mamba2Config) -> dict[str, Tensor]:
        tensors = {
            "norm": self.norm,
            "in_proj": self.in_proj.data,
            "in_bias": self.in_bias,
            "conv_weight": self.conv_weight,
            "conv_bias": self.conv_bias,
            "A": -self.A_log.exp(),
            "D": self.D.repeat_interleave(config.head_dim),
            "dt_bias": self.dt_bias,
            "gate_norm": self.gate_norm.view(config.groups, -1),
            "out_proj": self.out_proj.data,
            "out_bias": self.out_bias,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


class Mamba2Runner(StateSpaceRunner):
    """A Mamba-2 model; see StateSpaceRunner."""

    config: Mamba2Config
