"""Mamba models, Falcon's too. Every channel has a decay for each of its states, and a dt of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import mamba
from pyspec.architectures.mixture import ExpertCheckpoint
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
from pyspec.ops.selective_state import LANES, MULTIPLE, to_panels
from pyspec.runners.recurrent import RecurrentRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = [
    "GGUF_MAMBA",
    "MambaCheckpoint",
    "MambaConfig",
    "MambaLayer",
    "MambaPart",
    "MambaShape",
    "NormedMambaPart",
    "SHARED_DEFAULTS",
    "check_silu",
    "mamba_ssm_shape",
    "read_dt_rank",
    "read_gguf_state_space",
]


@dataclass(frozen=True, kw_only=True)
class MambaShape:
    """The shape of recurrent layers.

    Attributes:
        hidden_size: of the rows that they take in.
        layers: how many there are.
        channels, state_size: numbers of a state.
        dt_rank: numbers that the dt of all channels are made of.
        conv_taps: of the convolution.
        projection_bias, conv_bias: whether there are such.
        inner_epsilon: of the norms of what becomes dt, of B and of C; 0 where there are none.
    """

    hidden_size: int
    layers: int
    channels: int
    state_size: int
    dt_rank: int
    conv_taps: int
    projection_bias: bool = False
    conv_bias: bool = True
    inner_epsilon: float = 0.0

    def __post_init__(self):
        check_positive(self, "hidden_size", "layers", "channels", "state_size", "dt_rank", "conv_taps")
        if self.channels % LANES or self.state_size % MULTIPLE:
            raise Unsupported(
                f"RecurrentRunner has channels in multiples of {LANES} and state_size in multiples of {MULTIPLE}, "
                f"got {self.channels} and {self.state_size}"
            )

    @property
    def conv_channels(self) -> int:
        return self.channels

    @property
    def record_width(self) -> int:
        return 2 * self.channels + self.state_size


@dataclass(frozen=True, kw_only=True)
class MambaConfig(MambaShape, StateSpaceConfig):
    """The shape of a model."""

    vocab_size: int
    norm_epsilon: float
    tied_embedding: bool = True
    architecture: str = "mamba"

    def __post_init__(self):
        check_positive(self, "vocab_size")
        super().__post_init__()

    def kind(self) -> type[MambaLayer]:
        return NormedMambaLayer if self.inner_epsilon else MambaLayer


@dataclass
class MambaPart(RecurrentPart):
    """Weights of a recurrence of the shape of a MambaShape; see RecurrentPart."""

    RECURRENCE = ("in_proj", "x_proj", "dt_proj", "out_proj")
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

    in_proj: Matrix  # [2 channels, hidden]: x, then z
    in_bias: Tensor | None
    conv_weight: Tensor  # [taps, channels]
    conv_bias: Tensor | None
    x_proj: Matrix  # [dt_rank + 2 state_size, channels]: what becomes dt, then B and C; or the first alone
    dt_proj: Matrix  # [channels, dt_rank]
    dt_bias: Tensor  # [channels]
    A_log: Tensor  # [channels, state_size]
    D: Tensor  # [channels]
    out_proj: Matrix  # [hidden, channels]
    out_bias: Tensor | None

    @classmethod
    def empty_recurrence(cls, shape: MambaShape, blank: Blank) -> dict[str, Any]:
        inner = 0 if shape.inner_epsilon else 2 * shape.state_size
        return {
            "in_proj": blank.matrix(2 * shape.channels, shape.hidden_size),
            "in_bias": blank.vector(2 * shape.channels) if shape.projection_bias else None,
            "conv_weight": blank.vector(shape.conv_taps, shape.channels),
            "conv_bias": blank.vector(shape.channels) if shape.conv_bias else None,
            "x_proj": blank.matrix(shape.dt_rank + inner, shape.channels),
            "dt_proj": blank.matrix(shape.channels, shape.dt_rank),
            "dt_bias": blank.vector(shape.channels),
            "A_log": blank.vector(shape.channels, shape.state_size),
            "D": blank.vector(shape.channels),
            "out_proj": blank.matrix(shape.hidden_size, shape.channels),
            "out_bias": blank.vector(shape.hidden_size) if shape.projection_bias else None,
        }

    def computed(self, shape: MambaShape) -> dict[str, Tensor]:
        return {"A": to_panels(-self.A_log.exp())}

    def recur(self, x: Tensor, shape: MambaShape, state: tuple[Tensor, ...], round) -> Tensor:
        return mamba(x, self.mixer, state, round, shape.inner_epsilon)


@dataclass
class NormedMambaPart(MambaPart):
    """The same with norms of what becomes dt, of B and of C, which have a matrix of their own.

    The norms have no weights in checkpoints; some families have them.
    """

    RECURRENCE = ("in_proj", "x_proj", "BC_proj", "dt_proj", "out_proj")
    NAMES = MambaPart.NAMES | {"x_proj": "x_proj.low.weight", "BC_proj": "x_proj.BC.weight"}

    BC_proj: Matrix  # [2 state_size, channels]

    @classmethod
    def empty_recurrence(cls, shape: MambaShape, blank: Blank) -> dict[str, Any]:
        own = {"BC_proj": blank.matrix(2 * shape.state_size, shape.channels)}
        return super().empty_recurrence(shape, blank) | own

    def computed(self, shape: MambaShape) -> dict[str, Tensor]:
        norms = {"low_norm": self.D.new_ones(shape.dt_rank), "BC_norm": self.D.new_ones(2, shape.state_size)}
        return super().computed(shape) | norms


@dataclass
class MambaLayer(MambaPart, StateSpaceLayer):
    """One layer; see StateSpaceLayer."""

    MATRICES = MambaPart.RECURRENCE

    norm: Tensor  # [hidden]


@dataclass
class NormedMambaLayer(NormedMambaPart, StateSpaceLayer):
    """One layer; see StateSpaceLayer."""

    MATRICES = NormedMambaPart.RECURRENCE

    norm: Tensor  # [hidden]


class MambaWeights(StateSpaceWeights):
    """All weights, by the names of Hugging Face's Mamba."""

    @staticmethod
    def checkpoint(stored, config: MambaConfig) -> MambaCheckpoint:
        return MambaCheckpoint(stored, config)


class MambaCheckpoint(ExpertCheckpoint):
    """A checkpoint whose x_proj is two matrices where dt, B and C are normed; see ExpertCheckpoint."""

    NAMES = ()

    def __init__(self, stored, shape: MambaShape):
        self._rank = shape.dt_rank if shape.inner_epsilon else None
        super().__init__(stored)

    def _split(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple | None]:
        if self._rank is None or not name.endswith(".x_proj.weight"):
            return super()._split(name, shape)
        stem, rank = name.removesuffix("weight"), self._rank
        return {f"{stem}low.weight": (slice(rank),), f"{stem}BC.weight": (slice(rank, None),)}


# ==== config.json ====

SHARED_DEFAULTS = {"hidden_act": "silu", "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "expand": 2}
SHARED_DEFAULTS |= {"use_bias": False, "use_conv_bias": True}
_DEFAULTS = SHARED_DEFAULTS | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16}
_DEFAULTS |= {"tie_word_embeddings": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> MambaConfig:
    if architecture == "mamba_ssm Mamba1":
        shape, layer = mamba_ssm_shape(source, entries, "Mamba1")
        hidden = shape["hidden_size"]
        channels, rank = layer.whole("expand", 2) * hidden, read_dt_rank(layer, "dt_rank", hidden)
        return MambaConfig(channels=channels, state_size=layer.whole("d_state", 16), dt_rank=rank, **shape)
    check_silu(source, entries, "RecurrentRunner")
    hidden = entries.whole("hidden_size")
    return MambaConfig(
        vocab_size=entries.whole("vocab_size"),
        hidden_size=hidden,
        layers=entries.whole("num_hidden_layers"),
        channels=entries.whole("intermediate_size", entries.whole("expand") * hidden),
        state_size=entries.whole("state_size"),
        dt_rank=read_dt_rank(entries, "time_step_rank", hidden),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=entries.number("layer_norm_epsilon"),
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
        tied_embedding=entries.flag("tie_word_embeddings"),
        inner_epsilon=entries.number("mixer_rms_eps") if architecture == "FalconMambaForCausalLM" else 0.0,
    )


def check_silu(source: Path | str, entries: Entries, runner: str) -> None:
    if entries.text("hidden_act") not in ("silu", "swish"):
        raise Unsupported(f"{source} has hidden_act {entries.get('hidden_act')!r}, {runner} has silu")


def read_dt_rank(entries: Entries, key: str, hidden: int) -> int:
    return -(-hidden // 16) if entries.get(key, "auto") == "auto" else entries.whole(key)


def mamba_ssm_shape(source: Path | str, entries: Entries, kind: str) -> tuple[dict, Entries]:
    """The shape that both kinds of layers share in files of mamba_ssm, and of Codestral-Mamba with its other names.

    Returns:
        Fields of MambaConfig or Mamba2Config, and the entries about layers.
    """
    is_codestral = "dim" in entries
    layer = entries.part("ssm_cfg")
    fixed = {"rms_norm": True, "attn_layer_idx": [], "d_intermediate": 0, "norm_before_gate": False}
    for name, wanted in fixed.items():
        if (found := layer.get(name, entries.get(name, wanted))) != wanted:
            raise ValueError(f"{source} has {name} {found}, models of {kind} have {wanted}")
    multiple = entries.whole("pad_vocab_size_multiple", 1 if is_codestral else 8)
    shape = {
        "vocab_size": -(-entries.whole("vocab_size") // multiple) * multiple,
        "hidden_size": entries.whole("dim" if is_codestral else "d_model"),
        "layers": entries.whole("n_layers" if is_codestral else "n_layer"),
        "conv_taps": layer.whole("d_conv", 4),
        "norm_epsilon": 1e-5,
        "projection_bias": layer.flag("bias", False),
        "conv_bias": layer.flag("conv_bias", True),
        "tied_embedding": entries.flag("tie_embeddings", True),
    }
    return shape, layer


# ==== GGUF ====

GGUF_MAMBA = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "output": "lm_head",
    "attn_norm": "norm",
    "ssm_in": "mixer.in_proj",
    "ssm_conv1d": "mixer.conv1d",
    "ssm_x": "mixer.x_proj",
    "ssm_dt": "mixer.dt_proj",
    "ssm_a": "mixer.A_log",
    "ssm_d": "mixer.D",
    "ssm_norm": "mixer.norm",
    "ssm_out": "mixer.out_proj",
}


def read_gguf_state_space(file: GGUFFile, entries: Entries) -> dict[str, Any]:
    """Fields of MambaConfig and Mamba2Config that GGUF files state alike."""
    shapes = file.shapes
    return {
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "hidden_size": entries.whole("embedding_length"),
        "layers": entries.whole("block_count"),
        "state_size": entries.whole("ssm.state_size"),
        "conv_taps": entries.whole("ssm.conv_kernel"),
        "norm_epsilon": entries.number("attention.layer_norm_rms_epsilon"),
        "projection_bias": "blk.0.ssm_in.bias" in shapes,
        "conv_bias": "blk.0.ssm_conv1d.bias" in shapes,
        "tied_embedding": "output.weight" not in shapes,
    }


def _read_gguf(file: GGUFFile, entries: Entries) -> MambaConfig:
    shape = read_gguf_state_space(file, entries)
    return MambaConfig(
        **shape,
        channels=entries.whole("ssm.inner_size"),
        dt_rank=entries.whole("ssm.time_step_rank"),
        inner_epsilon=shape["norm_epsilon"] if entries.flag("ssm.dt_b_c_rms", False) else 0.0,
    )


_FALCON = _DEFAULTS | {"mixer_rms_eps": 1e-6}
_ARCHITECTURES = {"MambaForCausalLM": _DEFAULTS, "FalconMambaForCausalLM": _FALCON, "mamba_ssm Mamba1": {}}
_GGUF = GGUF(("mamba",), _read_gguf, GGUF_MAMBA, restored=GGUF_RECURRENT)
_FAMILY = Family(_ARCHITECTURES, _read, MambaWeights, RecurrentRunner, _GGUF)
FAMILIES.register("mamba", _FAMILY, "Mamba, Falcon Mamba")
