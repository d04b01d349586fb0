"""Bamba models, hybrids in which some layers are attention and the others Mamba-2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.architectures.decoder import read_rope_width
from pyspec.architectures.hybrid import HybridConfig, HybridMamba2Layer
from pyspec.architectures.llama import DecoderLayer, LayerWeights, LlamaWeights
from pyspec.architectures.mamba import check_silu
from pyspec.architectures.mamba2 import check_no_limit, read_mamba2_shape
from pyspec.architectures.mixture import ExpertCheckpoint
from pyspec.architectures.rotary import rope_entries
from pyspec.architectures.shapes import DEFAULTS, read_heads
from pyspec.entries import Entries
from pyspec.runners.recurrent import HybridRunner

__all__ = ["BambaConfig", "BambaWeights"]


@dataclass(frozen=True)
class BambaConfig(HybridConfig):
    """The shape of a model; its recurrence is that of a Mamba-2."""

    norm_names = {"attention": "input_layernorm", "feed_forward": "pre_ff_layernorm"}  # noqa: RUF012

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        return LayerWeights if self.is_attention[layer] else HybridMamba2Layer


class BambaWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's Bamba."""

    NORM = "model.final_layernorm.weight"

    @staticmethod
    def checkpoint(stored, config) -> BambaCheckpoint:
        return BambaCheckpoint(stored)


class BambaCheckpoint(ExpertCheckpoint):
    """A checkpoint of Bamba, whose names of the feed-forward part are its own."""

    NAMES = ((r"\.feed_forward\.", ".mlp."),)


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 128000, "intermediate_size": 14336, "max_position_embeddings": 262144}
_DEFAULTS |= {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "mamba_n_heads": 128, "mamba_n_groups": 1}
_DEFAULTS |= {"mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2}
_DEFAULTS |= {"mamba_conv_bias": True, "mamba_proj_bias": False}


def _read(source: Path | str, entries: Entries, architecture: str) -> BambaConfig:
    check_silu(source, entries, "HybridRunner")
    check_no_limit(source, entries, "HybridRunner")
    if entries.flag("mlp_bias"):
        raise Unsupported(f"{source} has mlp_bias True, HybridRunner has none")
    rope = rope_entries(entries)
    if (kind := rope.text("rope_type", rope.text("type", "default"))) != "default":
        raise Unsupported(f"{source} has rope scaling {kind!r}, HybridRunner has none")
    layers = entries.whole("num_hidden_layers")
    heads, kv_heads, head_dim = read_heads(entries)
    places = set(entries.array("attn_layer_indices", int, []))
    is_attention = tuple(layer in places for layer in range(layers))
    if not any(is_attention) or all(is_attention):
        raise entries.wrong("attn_layer_indices", sorted(places), f"some of the {layers} layers, and not all")
    epsilon = entries.number("rms_norm_eps")
    return BambaConfig(
        architecture=entries.text("model_type", "bamba"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        rope_base=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        rope_width=read_rope_width(entries, head_dim, 0.5),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        recurrence=read_mamba2_shape(entries, layers - sum(is_attention), epsilon),
        is_attention=is_attention,
        vocab_size=entries.whole("vocab_size"),
        hidden_size=entries.whole("hidden_size"),
        norm_epsilon=epsilon,
        tied_embedding=entries.flag("tie_word_embeddings"),
    )


_FAMILY = Family({"BambaForCausalLM": _DEFAULTS}, _read, BambaWeights, HybridRunner)
FAMILIES.register("bamba", _FAMILY, "Bamba, hybrids of attention and Mamba-2")
