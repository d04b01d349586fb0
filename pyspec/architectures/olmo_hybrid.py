"""OLMo hybrid: gated delta nets whose states may change their sign, and attention as OLMo 2 has it in every fourth
layer, where norms are of what parts give. Released models turn nothing with positions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from pyspec.architectures import FAMILIES, Family
from pyspec.architectures.decoder import BEHIND, read_decoder
from pyspec.architectures.delta_net import DeltaLayer, DeltaShape
from pyspec.architectures.hybrid import HybridConfig, read_attention_layers
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights
from pyspec.architectures.mixture import ExpertCheckpoint
from pyspec.architectures.rotary import rope_entries
from pyspec.architectures.shapes import DEFAULTS
from pyspec.architectures.weights import dense
from pyspec.entries import Entries
from pyspec.runners.recurrent import HybridRunner

__all__ = []


class AttentionLayer(LayerWeights):
    """A layer with attention, which norms what its parts give."""

    NORMS = BEHIND


class OlmoDeltaLayer(DeltaLayer):
    """A layer with a gated delta net, whose input matrices and convolutions are each one in checkpoints."""

    def named(self, config: OlmoHybridConfig, prefix: str) -> dict[str, Tensor]:
        shape = config.recurrence
        keys, channels, heads = shape.key_channels, shape.channels, shape.heads
        names, sizes = ("q", "k", "v", "g", "b", "a"), [keys, keys, channels, channels, heads, heads]
        tensors = {
            f"{name}_proj.weight": part for name, part in zip(names, dense(self.in_proj).split(sizes), strict=True)
        }
        taps = self.conv_weight.T[:, None].split(sizes[:3])
        tensors |= {f"{name}_conv1d.weight": part for name, part in zip(names, taps, strict=False)}
        tensors |= {"A_log": self.A_log, "dt_bias": self.dt_bias, "o_norm.weight": self.gate_norm}
        tensors["o_proj.weight"] = dense(self.out_proj)
        tensors = self.named_norms(config) | {f"linear_attn.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {f"mlp.{name}.weight": tensor for name, tensor in self.named_feed_forward(config).items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class OlmoHybridConfig(HybridConfig):
    """The shape of a model."""

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        return AttentionLayer if self.is_attention[layer] else OlmoDeltaLayer


class OlmoHybridWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's OLMo hybrid."""

    @staticmethod
    def checkpoint(stored, config: OlmoHybridConfig) -> OlmoHybridCheckpoint:
        return OlmoHybridCheckpoint(stored, config.recurrence)


class OlmoHybridCheckpoint(ExpertCheckpoint):
    """A checkpoint of OLMo hybrid, see ExpertCheckpoint: convolutions are one tensor in transformers' class alone."""

    NAMES = (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    )

    def __init__(self, stored, shape: DeltaShape):
        self._keys = shape.key_channels
        super().__init__(stored)

    def _split(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple | None]:
        if not name.endswith(".linear_attn.conv1d.weight"):
            return super()._split(name, shape)
        stem, keys = name.removesuffix("conv1d.weight"), self._keys
        rows = {"q": slice(keys), "k": slice(keys, 2 * keys), "v": slice(2 * keys, None)}
        return {f"{stem}{part}_conv1d.weight": (place,) for part, place in rows.items()}


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 100352, "hidden_size": 3840, "intermediate_size": 11008}
_DEFAULTS |= {"num_attention_heads": 30, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6}
_DEFAULTS |= {"linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": True}
_GATE_EPSILON = 1e-5  # of what gated delta nets give, whatever the others have


def _read(source: Path | str, entries: Entries, architecture: str) -> OlmoHybridConfig:
    shape = read_decoder(source, entries, architecture, in_part=True)
    shape["architecture"] = entries.text("model_type", "olmo_hybrid")
    layers, hidden, heads = shape["layers"], shape["hidden_size"], shape["heads"]
    rope = rope_entries(entries)
    if rope.is_null("rope_theta") or ("rope_theta" not in rope and entries.is_null("rope_theta")):
        shape["turns"] = ("none",) * layers
    is_attention = read_attention_layers(entries, layers, "linear_attention", 4)
    if not any(is_attention):
        is_attention = (False,) * (layers - 1) + (True,)
    key_heads = entries.whole("linear_num_key_heads", heads)
    state_size = entries.whole("linear_key_head_dim", int(0.75 * hidden / key_heads))
    recurrence = DeltaShape(
        layers=is_attention.count(False),
        heads=entries.whole("linear_num_value_heads", heads),
        head_dim=entries.whole("linear_value_head_dim", 2 * state_size),
        key_heads=key_heads,
        state_size=state_size,
        conv_taps=entries.whole("linear_conv_kernel_dim"),
        strength=2.0 if entries.flag("linear_allow_neg_eigval") else 1.0,
        norm_epsilon=_GATE_EPSILON,
    )
    return OlmoHybridConfig(**shape, head_norm="row", is_attention=is_attention, recurrence=recurrence)


_FAMILY = Family({"OlmoHybridForCausalLM": _DEFAULTS}, _read, OlmoHybridWeights, HybridRunner)
FAMILIES.register("olmo_hybrid", _FAMILY, "OLMo hybrid, of attention and gated delta nets")
