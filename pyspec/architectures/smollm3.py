"""SmolLM3: Llama's layers, of which every fourth does not turn its heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import (
    DEFAULTS,
    GGUF_TENSORS,
    interleaved_rows,
    read_activation,
    read_gguf_shape,
    read_kinds,
    read_shape,
)
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []

_DEFAULTS = DEFAULTS | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008, "rms_norm_eps": 1e-6}
_DEFAULTS |= {"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4}
_DEFAULTS |= {"max_position_embeddings": 32768, "tie_word_embeddings": True, "use_sliding_window": False}
_DEFAULTS |= {"no_rope_layer_interval": 4}
_TURNS = {True: "global", False: "none"}


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_shape(source, entries, architecture)
    theta, scaling = read_rope(source, entries, 2e6)
    layers, interval = shape["layers"], entries.whole("no_rope_layer_interval")
    turned = entries.array("no_rope_layers", int, [int((layer + 1) % interval != 0) for layer in range(layers)])
    if len(turned) < layers or not set(turned) <= {0, 1}:
        raise entries.wrong("no_rope_layers", turned, f"0 or 1 for each of {layers} layers")
    window = None
    if entries.flag("use_sliding_window") and "sliding_window" in entries:
        window = entries.whole("sliding_window")
    kinds = read_kinds(entries, layers, lambda layer: not turned[layer], has_window=window is not None)
    return DecoderConfig(
        **shape,
        rope_base=theta,
        rope_scaling=scaling,
        windows=tuple(window if is_local else None for is_local in kinds),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        activation=read_activation(source, entries),
        turns=tuple(_TURNS[bool(is_turned)] for is_turned in turned[:layers]),
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    shape = read_gguf_shape(file, entries)
    return DecoderConfig(**shape, turns=tuple(_TURNS[(layer + 1) % 4 != 0] for layer in range(shape["layers"])))


_GGUF = GGUF(("smollm3",), _read_gguf, GGUF_TENSORS, interleaved_rows)
_FAMILY = Family({"SmolLM3ForCausalLM": _DEFAULTS}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("smollm3", _FAMILY, "SmolLM3")
