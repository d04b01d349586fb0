"""StableLM 2: layer norms with biases; a quarter of a head is turned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import DecoderConfig, read_decoder, read_rope_width
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = {"vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_key_value_heads": 32}
_DEFAULTS = DEFAULTS | _DEFAULTS | {"max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False}
_DEFAULTS |= {"qk_layernorm": False, "use_parallel_residual": False}
_NORMS = {"centred": True, "norm_bias": True}


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    for name in ("qk_layernorm", "use_parallel_residual"):
        if entries.flag(name):
            raise Unsupported(f"{source} has {name}, AttentionRunner has a StableLM without")
    shape = read_decoder(source, entries, architecture, in_part=True, epsilon="layer_norm_eps")
    shape["head_dim"] = max(1, shape["hidden_size"] // shape["heads"])  # whatever head_dim says
    shape |= {"qkv_bias": entries.flag("use_qkv_bias"), "output_bias": False}
    return DecoderConfig(**shape, **_NORMS, rope_width=read_rope_width(entries, shape["head_dim"], 0.25))


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    shape = read_gguf_shape(file, entries)
    if "blk.0.attn_q_norm.weight" in file.shapes or "blk.0.ffn_norm.weight" not in file.shapes:
        raise Unsupported(
            f"{file.path} has norms of queries and keys, or parallel layers, which AttentionRunner does not have"
        )
    return DecoderConfig(**shape, **_NORMS, rope_width=entries.whole("rope.dimension_count", shape["head_dim"]))


_GGUF = GGUF(("stablelm",), _read_gguf, GGUF_TENSORS)
_FAMILY = Family({"StableLmForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("stablelm", _FAMILY, "StableLM 2")
