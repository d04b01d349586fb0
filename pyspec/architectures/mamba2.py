"""Mamba-2 models (state-spaces' and Codestral's). One decay a head, B and C shared by groups of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from pyspec.architectures.state_space import (
    RecurrentPart,
    StateSpaceConfig,
    StateSpaceLayer,
    StateSpaceWeights,
    check_positive,
)
from pyspec.architectures.weights import Blank, Matrix
from pyspec.entries import Entries
from pyspec.ops.selective_state import LANES, MULTIPLE
from pyspec.runners.recurrent import RecurrentRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = [
    "Mamba2Config",
    "Mamba2Layer",
    "Mamba2Part",
    "Mamba2Shape",
    "RESTORED_MAMBA2",
    "check_no_limit",
    "gguf_mamba2",
    "read_gguf_mamba2_shape",
    "read_mamba2_shape",
]


@dataclass(frozen=True, kw_only=True)
class Mamba2Shape:
    """The shape of recurrent layers.

    Attributes:
        hidden_size: of the rows that they take in.
        layers: how many there are.
        heads, head_dim: of the recurrence; its channels are their product.
        groups: of neighbouring heads, which share B and C.
        state_size: numbers of a channel's state.
        conv_taps: of the convolution.
        norm_epsilon: of the norm of what the recurrence gives.
        projection_bias, conv_bias: whether there are such.
        gate_order: "norm last", what is gated is normed; "norm first", or "no norm".
    """

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
    gate_order: str = "norm last"

    def __post_init__(self):
        names = ("hidden_size", "layers", "heads", "head_dim", "groups", "state_size", "conv_taps")
        check_positive(self, *names)
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


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(Mamba2Shape, StateSpaceConfig):
    """The shape of a model."""

    vocab_size: int
    tied_embedding: bool = False
    architecture: str = "mamba2"

    def __post_init__(self):
        check_positive(self, "vocab_size")
        super().__post_init__()

    def kind(self) -> type[Mamba2Layer]:
        return Mamba2Layer


@dataclass
class Mamba2Part(RecurrentPart):
    """Weights of a recurrence of the shape of a Mamba2Shape; see RecurrentPart."""

    RECURRENCE = ("in_proj", "out_proj")
    NAMES = {
        "in_proj": "in_proj.weight",
        "in_bias": "in_proj.bias",
        "conv_weight": "conv1d.weight",
        "conv_bias": "conv1d.bias",
        "gate_norm": "norm.weight",
        "out_proj": "out_proj.weight",
        "out_bias": "out_proj.bias",
    }

    in_proj: Matrix  # [channels + conv_channels + heads, hidden]: z, then x, B and C, then dt
    in_bias: Tensor | None
    conv_weight: Tensor  # [taps, conv_channels]
    conv_bias: Tensor | None
    A_log: Tensor  # [heads]
    D: Tensor  # [heads]
    dt_bias: Tensor  # [heads]
    gate_norm: Tensor | None  # [channels]
    out_proj: Matrix  # [hidden, channels]
    out_bias: Tensor | None

    @classmethod
    def empty_recurrence(cls, shape: Mamba2Shape, blank: Blank) -> dict[str, Any]:
        inputs = shape.channels + shape.conv_channels + shape.heads
        return {
            "in_proj": blank.matrix(inputs, shape.hidden_size),
            "in_bias": blank.vector(inputs) if shape.projection_bias else None,
            "conv_weight": blank.vector(shape.conv_taps, shape.conv_channels),
            "conv_bias": blank.vector(shape.conv_channels) if shape.conv_bias else None,
            "A_log": blank.vector(shape.heads),
            "D": blank.vector(shape.heads),
            "dt_bias": blank.vector(shape.heads),
            "gate_norm": None if shape.gate_order == "no norm" else blank.vector(shape.channels),
            "out_proj": blank.matrix(shape.hidden_size, shape.channels),
            "out_bias": blank.vector(shape.hidden_size) if shape.projection_bias else None,
        }

    def computed(self, shape: Mamba2Shape) -> dict[str, Tensor]:
        own = {"A": -self.A_log.exp(), "D": self.D.repeat_interleave(shape.head_dim)}
        return own if self.gate_norm is None else own | {"gate_norm": self.gate_norm.view(shape.groups, -1)}

    def recur(self, x: Tensor, shape: Mamba2Shape, state: tuple[Tensor, ...], round) -> Tensor:
        return mamba2(x, self.mixer, state, round, shape.norm_epsilon, norm_first=shape.gate_order == "norm first")


@dataclass
class Mamba2Layer(Mamba2Part, StateSpaceLayer):
    """One layer; see StateSpaceLayer."""

    MATRICES = Mamba2Part.RECURRENCE

    norm: Tensor  # [hidden]


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


def read_mamba2_shape(
    entries: Entries, layers: int, norm_epsilon: float, channels: int | None = None, **own
) -> Mamba2Shape:
    """The shape of so many recurrent layers of a hybrid, by the entries mamba_* of a config.json.

    channels: where they are not mamba_expand times the hidden size; own: fields that a family has.
    """
    hidden, heads = entries.whole("hidden_size"), entries.whole("mamba_n_heads")
    channels = channels or entries.whole("mamba_expand") * hidden
    is_stated = entries.get("mamba_d_head", "auto") != "auto"
    head_dim = entries.whole("mamba_d_head") if is_stated else channels // heads
    if heads * head_dim != channels:
        raise entries.wrong("mamba_n_heads", heads, f"heads that share {channels} channels")
    return Mamba2Shape(
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        groups=entries.whole("mamba_n_groups"),
        state_size=entries.whole("mamba_d_state"),
        conv_taps=entries.whole("mamba_d_conv"),
        norm_epsilon=norm_epsilon,
        conv_bias=entries.flag("mamba_conv_bias"),
        **{"projection_bias": entries.flag("mamba_proj_bias")} | own,
    )


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
RESTORED_MAMBA2 = GGUF_RECURRENT | {
    "ssm_a": lambda a: (-a).log().flatten(),
    "ssm_d": lambda d: d.flatten(),
    "ssm_norm.weight": lambda norm: norm.flatten(),
}


def gguf_mamba2(prefix: str) -> dict[str, str]:
    """Names of a recurrence's tensors, behind a prefix, by those in GGUF files."""
    own = {"ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_d": "D"}
    return {file: prefix + name for file, name in (own | {"ssm_norm": "norm", "ssm_out": "out_proj"}).items()}


def read_gguf_mamba2_shape(file: GGUFFile, entries: Entries, layers: int) -> Mamba2Shape:
    """The shape of so many recurrent layers of the model in a GGUF file."""
    channels, heads = entries.whole("ssm.inner_size"), entries.whole("ssm.time_step_rank")
    if channels % heads:
        raise entries.wrong("ssm.time_step_rank", heads, f"heads that share {channels} channels")
    ends = {name.split(".", 2)[-1] for name in file.shapes}
    return Mamba2Shape(
        hidden_size=entries.whole("embedding_length"),
        layers=layers,
        heads=heads,
        head_dim=channels // heads,
        groups=entries.whole("ssm.group_count", 1),
        state_size=entries.whole("ssm.state_size"),
        conv_taps=entries.whole("ssm.conv_kernel"),
        norm_epsilon=entries.number("attention.layer_norm_rms_epsilon"),
        projection_bias="ssm_in.bias" in ends,
        conv_bias="ssm_conv1d.bias" in ends,
        gate_order="norm last" if "ssm_norm.weight" in ends else "no norm",
    )


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
_GGUF = GGUF(("mamba2",), _read_gguf, GGUF_MAMBA | {"ssm_dt.bias": "mixer.dt_bias"}, restored=RESTORED_MAMBA2)
_FAMILY = Family(_ARCHITECTURES, _read, StateSpaceWeights, RecurrentRunner, _GGUF)
FAMILIES.register("mamba2", _FAMILY, "Mamba-2, Codestral Mamba")
