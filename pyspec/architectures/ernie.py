"""ERNIE 4.5 and Helium: Llama's layers, whose heads are turned as neighbours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, interleaved_rows, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_ERNIE = DEFAULTS | {"vocab_size": 103424, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18}
_ERNIE |= {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 131072}
_ERNIE |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "use_bias": False}
_HELIUM = DEFAULTS | {"vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040, "num_hidden_layers": 24}
_HELIUM |= {"num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128, "max_position_embeddings": 4096}
_HELIUM |= {"rms_norm_eps": 1e-8}


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    if architecture == "HeliumForCausalLM":
        return DecoderConfig(**read_decoder(source, entries, architecture, 1e5) | {"output_bias": False})
    if entries.flag("use_bias"):
        raise Unsupported(f"{source} has use_bias, which AttentionRunner does not have in feed forward layers")
    return DecoderConfig(**read_decoder(source, entries, architecture, 5e5) | {"qkv_bias": False, "output_bias": False})


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    return DecoderConfig(**read_gguf_shape(file, entries))


_ARCHITECTURES = {"Ernie4_5ForCausalLM": _ERNIE, "HeliumForCausalLM": _HELIUM}
_GGUF = GGUF(("ernie4_5",), _read_gguf, GGUF_TENSORS)
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF, interleaved_rows)
FAMILIES.register("ernie", _FAMILY, "ERNIE 4.5 without experts, Helium")
