"""Mamba models. Every channel has a decay for each of its states, and a dt of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.architectures.blocks import mamba
from pyspec.architectures.state_space import StateSpaceConfig, StateSpaceLayer, StateSpaceWeights
from pyspec.architectures.weights import Blank, Matrix
from pyspec.entries import Entries
from pyspec.ops.selective_state import LANES, MULTIPLE, to_panels
from pyspec.runners.recurrent import RecurrentRunner

__all__ = ["MambaConfig", "MambaLayer", "SHARED_DEFAULTS", "check_silu", "mamba_ssm_shape"]


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


_ARCHITECTURES = {"MambaForCausalLM": _DEFAULTS, "mamba_ssm Mamba1": {}}
FAMILIES.register("mamba", Family(_ARCHITECTURES, _read, StateSpaceWeights, RecurrentRunner), "Mamba")
