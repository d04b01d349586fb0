"""Mamba models. Every channel has a decay for each of its states, and a dt of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import mamba
from pyspec.architectures.shapes import GGUF_RECURRENT
from pyspec.architectures.state_space import StateSpaceConfig, StateSpaceLayer, StateSpaceWeights
from pyspec.architectures.weights import Blank, Matrix
from pyspec.entries import Entries
from pyspec.ops.selective_state import LANES, MULTIPLE, to_panels
from pyspec.runners.recurrent import RecurrentRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = [
    "GGUF_MAMBA",
    "MambaConfig",
    "MambaLayer",
    "SHARED_DEFAULTS",
    "check_silu",
    "mamba_ssm_shape",
    "read_gguf_state_space",
]


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

    def mix(self, x: Tensor, config: MambaConfig, cache, place: int, numbers) -> Tensor:
        return mamba(x, self.mixer, cache.layer(place), numbers.round)


# ==== config.json ====

SHARED_DEFAULTS = {"hidden_act": "silu", "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "expand": 2}
SHARED_DEFAULTS |= {"use_bias": False, "use_conv_bias": True}
_DEFAULTS = SHARED_DEFAULTS | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16}
_DEFAULTS |= {"tie_word_embeddings": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> MambaConfig:
    if architecture == "mamba_ssm Mamba1":
        shape, layer = mamba_ssm_shape(source, entries, "Mamba1")
        hidden = shape["hidden_size"]
        channels, rank = layer.whole("expand", 2) * hidden, _dt_rank(layer, "dt_rank", hidden)
        return MambaConfig(channels=channels, state_size=layer.whole("d_state", 16), dt_rank=rank, **shape)
    check_silu(source, entries, "RecurrentRunner")
    hidden = entries.whole("hidden_size")
    return MambaConfig(
        vocab_size=entries.whole("vocab_size"),
        hidden_size=hidden,
        layers=entries.whole("num_hidden_layers"),
        channels=entries.whole("intermediate_size", entries.whole("expand") * hidden),
        state_size=entries.whole("state_size"),
        dt_rank=_dt_rank(entries, "time_step_rank", hidden),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=entries.number("layer_norm_epsilon"),
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
        tied_embedding=entries.flag("tie_word_embeddings"),
    )


def check_silu(source: Path | str, entries: Entries, runner: str) -> None:
    if entries.text("hidden_act") not in ("silu", "swish"):
        raise Unsupported(f"{source} has hidden_act {entries.get('hidden_act')!r}, {runner} has silu")


def _dt_rank(entries: Entries, key: str, hidden: int) -> int:
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
    if entries.flag("ssm.dt_b_c_rms", False):
        raise Unsupported(f"{file.path} has norms of dt, B and C, which layers of Mamba do not have")
    return MambaConfig(
        **read_gguf_state_space(file, entries),
        channels=entries.whole("ssm.inner_size"),
        dt_rank=entries.whole("ssm.time_step_rank"),
    )


_ARCHITECTURES = {"MambaForCausalLM": _DEFAULTS, "mamba_ssm Mamba1": {}}
_GGUF = GGUF(("mamba",), _read_gguf, GGUF_MAMBA, restored=GGUF_RECURRENT)
FAMILIES.register("mamba", Family(_ARCHITECTURES, _read, StateSpaceWeights, RecurrentRunner, _GGUF), "Mamba")
