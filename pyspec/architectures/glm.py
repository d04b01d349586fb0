"""GLM-4: half of a head is turned, as neighbours; since 0414 a layer's parts have norms around them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig, read_decoder, read_rope_width
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, interleaved_rows, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["Glm4Config", "GlmConfig"]


@dataclass(frozen=True)
class GlmConfig(DecoderConfig):
    """The shape of a GLM-4 as it was first."""

    fused = ("gate_up",)


@dataclass(frozen=True)
class Glm4Config(GlmConfig):
    """The shape of a GLM-4-0414."""

    norm_names = {  # noqa: RUF012
        "attention": "input_layernorm",
        "attention_output": "post_self_attn_layernorm",
        "feed_forward": "post_attention_layernorm",
        "feed_forward_output": "post_mlp_layernorm",
    }


_DEFAULTS = DEFAULTS | {"vocab_size": 151552, "intermediate_size": 13696, "num_hidden_layers": 40}
_DEFAULTS |= {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
_DEFAULTS |= {"rms_norm_eps": 1.5625e-7, "attention_bias": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> GlmConfig:
    shape = read_decoder(source, entries, architecture, in_part=True) | {"output_bias": False}
    config = Glm4Config if architecture == "Glm4ForCausalLM" else GlmConfig
    return config(**shape, rope_width=read_rope_width(entries, shape["head_dim"], 0.5))


def _read_gguf(file: GGUFFile, entries: Entries) -> Glm4Config:
    shape = read_gguf_shape(file, entries)
    return Glm4Config(**shape, rope_width=entries.whole("rope.dimension_count", shape["head_dim"]))


_TENSORS = GGUF_TENSORS | {"ffn_up": "mlp.gate_up_proj", "post_attention_norm": "post_self_attn_layernorm"}
_TENSORS |= {"post_ffw_norm": "post_mlp_layernorm"}
_GGUF = GGUF(("glm4",), _read_gguf, _TENSORS)
_ARCHITECTURES = {"GlmForCausalLM": _DEFAULTS, "Glm4ForCausalLM": _DEFAULTS}
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF, interleaved_rows)
FAMILIES.register("glm4", _FAMILY, "GLM-4 without experts")
