"""Command R, R7B and A (Cohere 1 and 2): layer norms without a bias, attention and feed forward of the same rows.

Heads are turned as neighbours. Of Cohere 2 most layers have a window, and the others do not turn their heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, interleaved_rows, read_gguf_shape, read_kinds
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["CohereConfig"]


@dataclass(frozen=True)
class CohereConfig(DecoderConfig):
    """The shape of a model."""

    norm_names = {"attention": "input_layernorm"}  # noqa: RUF012


_COHERE = DEFAULTS | {"vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40}
_COHERE |= {"num_attention_heads": 64, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5, "logit_scale": 0.0625}
_COHERE |= {"tie_word_embeddings": True}
_COHERE2 = _COHERE | {"sliding_window": 4096}
_ALIKE = {"centred": True, "is_parallel": True}


def _windows(is_local: list[bool], window: int | None) -> dict:
    return {
        "windows": tuple(window if local else None for local in is_local),
        "turns": tuple("global" if local else "none" for local in is_local),
    }


def _read(source: Path | str, entries: Entries, architecture: str) -> CohereConfig:
    is_first = architecture == "CohereForCausalLM"
    shape = read_decoder(source, entries, architecture, 5e5 if is_first else 1e4, epsilon="layer_norm_eps")
    shape["logits_scale"] = entries.number("logit_scale")
    if is_first:
        if entries.flag("use_qk_norm", False):
            raise Unsupported(f"{source} has use_qk_norm, AttentionRunner has no layer norms of queries and keys")
        return CohereConfig(**shape, **_ALIKE)
    window = None if entries.is_null("sliding_window") else entries.whole("sliding_window", least=0) or None
    period = entries.whole("sliding_window_pattern", 4)
    is_local = read_kinds(entries, shape["layers"], lambda layer: (layer + 1) % period != 0, has_window=True)
    turned = is_local if window else [False] * shape["layers"]  # which layers without a window are not
    shape["head_dim"] = max(1, shape["hidden_size"] // shape["heads"])  # whatever head_dim says
    return CohereConfig(**shape, **_ALIKE, **_windows(turned, window))


def _read_gguf(file: GGUFFile, entries: Entries) -> CohereConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it: of four layers, three have the window."""
    shape = read_gguf_shape(file, entries) | {"logits_scale": entries.number("logit_scale")}
    if "blk.0.attn_q_norm.weight" in file.shapes:
        raise Unsupported(f"{file.path} has layer norms of queries and keys, which AttentionRunner does not have")
    if shape["architecture"] == "command-r":
        return CohereConfig(**shape, **_ALIKE)
    is_local = [(layer + 1) % 4 != 0 for layer in range(shape["layers"])]
    return CohereConfig(**shape, **_ALIKE, **_windows(is_local, entries.whole("attention.sliding_window")))


_GGUF = GGUF(("command-r", "cohere2"), _read_gguf, GGUF_TENSORS)
_ARCHITECTURES = {"CohereForCausalLM": _COHERE, "Cohere2ForCausalLM": _COHERE2}
_FAMILY = Family(_ARCHITECTURES, _read, LlamaWeights, AttentionRunner, _GGUF, interleaved_rows)
FAMILIES.register("cohere", _FAMILY, "Command R, R7B and A (Cohere 1 and 2)")
