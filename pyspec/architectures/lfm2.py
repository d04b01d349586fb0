"""LFM2 and its mixtures: short convolutions between two gates, and attention in some layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import short_convolution
from pyspec.architectures.hybrid import HybridConfig, RecurrentLayer, read_attention_layers, read_gguf_kinds
from pyspec.architectures.llama import DecoderLayer, LayerWeights
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    ExpertCheckpoint,
    ExpertPart,
    MixtureConfig,
    MixtureLayer,
    MixtureWeights,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import read_shape
from pyspec.architectures.state_space import RecurrentPart, check_positive
from pyspec.architectures.weights import Blank, Matrix
from pyspec.entries import Entries
from pyspec.ops.causal_conv import LANES, MOST_TAPS
from pyspec.runners.recurrent import HybridRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["ConvolutionShape", "Lfm2Config", "Lfm2Weights"]


@dataclass(frozen=True, kw_only=True)
class ConvolutionShape:
    """The shape of layers with a short convolution, whose state is a window alone.

    Attributes:
        hidden_size: of the rows that they take in, and channels of the convolution.
        layers: how many there are.
        conv_taps: of the convolution.
        bias: whether projections and convolution have biases.
    """

    hidden_size: int
    layers: int
    conv_taps: int
    bias: bool = False

    state_size = record_width = 0

    def __post_init__(self):
        check_positive(self, "hidden_size", "layers", "conv_taps")
        if self.hidden_size % LANES or self.conv_taps > MOST_TAPS:
            raise Unsupported(
                f"HybridRunner has convolutions of channels in multiples of {LANES} and of at most {MOST_TAPS} taps, "
                f"got {self.hidden_size} and {self.conv_taps}"
            )

    @property
    def channels(self) -> int:
        return self.hidden_size

    @property
    def conv_channels(self) -> int:
        return self.hidden_size


@dataclass
class ConvolutionPart(RecurrentPart):
    """Weights of a short convolution; see RecurrentPart."""

    RECURRENCE = ("in_proj", "out_proj")
    NAMES = {
        "in_proj": "in_proj.weight",
        "in_bias": "in_proj.bias",
        "conv_weight": "conv.weight",
        "conv_bias": "conv.bias",
        "out_proj": "out_proj.weight",
        "out_bias": "out_proj.bias",
    }

    in_proj: Matrix  # [3 hidden, hidden]: the gate before the convolution, that behind it, and what is convolved
    in_bias: Tensor | None
    conv_weight: Tensor  # [taps, hidden]
    conv_bias: Tensor | None
    out_proj: Matrix  # [hidden, hidden]
    out_bias: Tensor | None

    @classmethod
    def empty_recurrence(cls, shape: ConvolutionShape, blank: Blank) -> dict[str, Any]:
        hidden = shape.hidden_size
        return {
            "in_proj": blank.matrix(3 * hidden, hidden),
            "in_bias": blank.vector(3 * hidden) if shape.bias else None,
            "conv_weight": blank.vector(shape.conv_taps, hidden),
            "conv_bias": blank.vector(hidden) if shape.bias else None,
            "out_proj": blank.matrix(hidden, hidden),
            "out_bias": blank.vector(hidden) if shape.bias else None,
        }

    def computed(self, shape: ConvolutionShape) -> dict[str, Tensor]:
        return {}

    def recur(self, x: Tensor, shape: ConvolutionShape, state: tuple[Tensor, ...], round) -> Tensor:
        return short_convolution(x, self.mixer, state, round)


@dataclass
class ConvolutionLayer(ConvolutionPart, RecurrentLayer):
    """A layer with a short convolution."""

    MATRICES = (*ConvolutionPart.RECURRENCE, *DecoderLayer.MATRICES)
    RECURRENCE_NAME = "conv."


@dataclass
class ConvolutionMixtureLayer(ExpertPart, ConvolutionLayer):
    """A layer with a short convolution and experts."""


@dataclass(frozen=True)
class Lfm2Config(HybridConfig, MixtureConfig):
    """The shape of a model, whose first layers, or all, have no experts."""

    norm_names = {"attention": "operator_norm", "feed_forward": "ffn_norm"}  # noqa: RUF012

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        if self.expert_layers[layer]:
            return MixtureLayer if self.is_attention[layer] else ConvolutionMixtureLayer
        return LayerWeights if self.is_attention[layer] else ConvolutionLayer


class Lfm2Weights(MixtureWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE."""

    NORM = "model.embedding_norm.weight"

    @staticmethod
    def checkpoint(stored, config: Lfm2Config) -> Lfm2Checkpoint:
        return Lfm2Checkpoint(stored)


class Lfm2Checkpoint(ExpertCheckpoint):
    """A checkpoint of LFM2, see ExpertCheckpoint."""

    NAMES = (
        (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.self_attn\.([qk])_layernorm\.", r".self_attn.\1_norm."),
        (r"\.feed_forward\.", ".mlp."),
        (r"\.mlp\.expert_bias$", ".mlp.choice_bias.weight"),
        (r"\.mlp\.w1\.", ".mlp.gate_proj."),
        (r"\.mlp\.w2\.", ".mlp.down_proj."),
        (r"\.mlp\.w3\.", ".mlp.up_proj."),
        *ExpertCheckpoint.NAMES,
    )


# ==== config.json ====

_SHARED = {"vocab_size": 65536, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
_SHARED |= {"max_position_embeddings": 128000, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3}
_DENSE = _SHARED | {"hidden_size": 2560, "intermediate_size": 12288, "block_multiple_of": 256}
_DENSE |= {"block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True}
_MIXTURE = _SHARED | {"hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792}
_MIXTURE |= {"num_dense_layers": 2, "num_experts_per_tok": 4, "num_experts": 32, "use_expert_bias": True}
_MIXTURE |= {"routed_scaling_factor": 1.0, "norm_topk_prob": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> Lfm2Config:
    tied = entries.flag("tie_embedding", entries.flag("tie_word_embeddings", True))
    entries = entries.with_own({"tie_word_embeddings": tied})
    if "block_ff_dim" in entries:
        entries = entries.with_own({"intermediate_size": entries.whole("block_ff_dim")})
    shape = read_shape(source, entries, architecture, epsilon="norm_eps")
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries, 1e6)
    layers, is_mixture = shape["layers"], architecture == "Lfm2MoeForCausalLM"
    shape["architecture"] = entries.text("model_type", "lfm2_moe" if is_mixture else "lfm2")
    if "layer_types" not in entries and "full_attn_idxs" in entries:
        attends = entries.array("full_attn_idxs", int)
        kinds = ["full_attention" if layer in attends else "conv" for layer in range(layers)]
        entries = entries.with_own({"layer_types": kinds})
    is_attention = read_attention_layers(entries, layers, "conv")
    if is_mixture:
        shape |= _read_experts(entries, layers)
    else:
        shape |= {"intermediate_size": _inner_size(entries), "expert_layers": (False,) * layers}
    recurrence = ConvolutionShape(
        hidden_size=shape["hidden_size"],
        layers=is_attention.count(False),
        conv_taps=entries.whole("conv_L_cache"),
        bias=entries.flag("conv_bias"),
    )
    return Lfm2Config(**shape, head_norm="head", is_attention=is_attention, recurrence=recurrence)


def _read_experts(entries: Entries, layers: int) -> dict[str, Any]:
    dense = entries.whole("num_dense_layers", least=0)
    return read_choices(entries) | {
        "expert_size": entries.whole("moe_intermediate_size"),
        "expert_layers": tuple(layer >= dense for layer in range(layers)),
        "sigmoid_gates": True,
        "choice_bias": entries.flag("use_expert_bias"),
        "renormalise": entries.flag("norm_topk_prob"),
        "gate_scale": entries.number("routed_scaling_factor"),
    }


def _inner_size(entries: Entries) -> int:
    """Two thirds of what is stated, brought to a multiple, where that is asked for."""
    size = entries.whole("intermediate_size")
    if not entries.flag("block_auto_adjust_ff_dim"):
        return size
    size, multiple = int(2 * size / 3), entries.whole("block_multiple_of")
    if not entries.is_null("block_ffn_dim_multiplier"):
        size = int(entries.number("block_ffn_dim_multiplier") * size)
    return -(-size // multiple) * multiple


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> Lfm2Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it."""
    shape, is_attention = read_gguf_kinds(file, entries)
    layers = shape["layers"]
    dense = layers
    if entries.whole("expert_count", 0, least=0):
        dense = entries.whole("leading_dense_block_count", 0, least=0)
        shape |= read_gguf_choices(entries) | {"expert_size": entries.whole("expert_feed_forward_length")}
        shape |= {"sigmoid_gates": True, "choice_bias": True, "renormalise": True}
        shape["gate_scale"] = entries.number("expert_weights_scale", 1.0)
    recurrence = ConvolutionShape(
        hidden_size=shape["hidden_size"],
        layers=is_attention.count(False),
        conv_taps=entries.whole("shortconv.l_cache"),
        bias=any(name.endswith("shortconv.conv.bias") for name in file.shapes),
    )
    expert_layers = tuple(layer >= dense for layer in range(layers))
    own = {"head_norm": "head", "expert_layers": expert_layers}
    return Lfm2Config(**shape, **own, is_attention=is_attention, recurrence=recurrence)


_TENSORS = GGUF_EXPERTS | {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "ffn_norm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "exp_probs_b.bias": "mlp.choice_bias.weight",
}
_RESTORED = {"shortconv.conv.weight": lambda taps: taps[:, None]}
_GGUF = GGUF(("lfm2", "lfm2moe"), _read_gguf, _TENSORS, restored=_RESTORED)
_ARCHITECTURES = {"Lfm2ForCausalLM": _DENSE, "Lfm2MoeForCausalLM": _MIXTURE}
_FAMILY = Family(_ARCHITECTURES, _read, Lfm2Weights, HybridRunner, _GGUF)
FAMILIES.register("lfm2", _FAMILY, "LFM2 and its mixtures, hybrids of attention and short convolutions")
