"""Mamba-2 models (state-spaces' and Codestral's). One decay a head, B and C shared by groups of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import mamba2
from pyspec.architectures.mamba import (
    GGUF_MAMBA,
    SHARED_DEFAULTS,
    check_silu,
    mamba_ssm_shape,
    read_gguf_state_space,
)
from pyspec.architectures.shapes import GGUF_RECURRENT
from pyspec.architectures.state_space import StateSpaceConfig, StateSpaceLayer, StateSpaceWeights
from pyspec.architectures.weights import Blank, Matrix
from pyspec.entries import Entries
from pyspec.ops.selective_state import LANES, MULTIPLE
from pyspec.runners.recurrent import RecurrentRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["Mamba2Config", "Mamba2Layer", "check_no_limit"]


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
            raise Unsupported(
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

    def mix(self, x: Tensor, config: Mamba2Config, cache, place: int, numbers) -> Tensor:
        return mamba2(x, self.mixer, cache.layer(place), numbers.round, config.norm_epsilon)


# ==== config.json ====

_DEFAULTS = SHARED_DEFAULTS | {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128}
_DEFAULTS |= {"head_dim": 64, "state_size": 128, "n_groups": 8, "tie_word_embeddings": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> Mamba2Config:
    if architecture == "mamba_ssm Mamba2":
        return _read_mamba_ssm(source, entries)
    check_silu(source, entries, "RecurrentRunner")
    check_no_limit(source, entries, "RecurrentRunner")
    config = Mamba2Config(
        vocab_size=entries.whole("vocab_size"),
        hidden_size=entries.whole("hidden_size"),
        layers=entries.whole("num_hidden_layers"),
        heads=entries.whole("num_heads"),
        head_dim=entries.whole("head_dim"),
        groups=entries.whole("n_groups"),
        state_size=entries.whole("state_size"),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=entries.number("layer_norm_epsilon"),
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
        tied_embedding=entries.flag("tie_word_embeddings"),
    )
    if config.channels != (channels := entries.whole("expand") * config.hidden_size):
        raise entries.wrong("num_heads", config.heads, f"heads of {config.head_dim} that share {channels} channels")
    return config


def check_no_limit(source: Path | str, entries: Entries, runner: str) -> None:
    limit = entries.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        raise entries.wrong("time_step_limit", limit, "two numbers")
    lowest, highest = limit
    highest = highest.get("__float__") if isinstance(highest, dict) else highest  # how transformers writes infinity
    if type(lowest) not in (int, float) or lowest > 0 or highest not in (math.inf, "Infinity"):
        raise Unsupported(f"{source} has time_step_limit {lowest, highest}, {runner} has no limit")


def _read_mamba_ssm(source: Path | str, entries: Entries) -> Mamba2Config:
    shape, layer = mamba_ssm_shape(source, entries, "Mamba2")
    head_dim = layer.whole("headdim", 64)
    return Mamba2Config(
        heads=layer.whole("expand", 2) * shape["hidden_size"] // head_dim,
        head_dim=head_dim,
        groups=entries.whole("n_groups", 1) if "dim" in entries else layer.whole("ngroups", 1),
        state_size=layer.whole("d_state", 128),
        **shape,
    )


# ==== GGUF ====

# numbers of heads and the gate's norm have two dimensions there
_RESTORED = GGUF_RECURRENT | {
    "ssm_a": lambda a: (-a).log().flatten(),
    "ssm_d": lambda d: d.flatten(),
    "ssm_norm.weight": lambda norm: norm.flatten(),
}


def _read_gguf(file: GGUFFile, entries: Entries) -> Mamba2Config:
    channels, heads = entries.whole("ssm.inner_size"), entries.whole("ssm.time_step_rank")
    if channels % heads:
        raise entries.wrong("ssm.time_step_rank", heads, f"heads that share {channels} channels")
    return Mamba2Config(
        **read_gguf_state_space(file, entries),
        heads=heads,
        head_dim=channels // heads,
        groups=entries.whole("ssm.group_count", 1),
    )


_ARCHITECTURES = {"Mamba2ForCausalLM": _DEFAULTS, "mamba_ssm Mamba2": {}}
_GGUF = GGUF(("mamba2",), _read_gguf, GGUF_MAMBA | {"ssm_dt.bias": "mixer.dt_bias"}, restored=_RESTORED)
_FAMILY = Family(_ARCHITECTURES, _read, StateSpaceWeights, RecurrentRunner, _GGUF)
FAMILIES.register("mamba2", _FAMILY, "Mamba-2, Codestral Mamba")
