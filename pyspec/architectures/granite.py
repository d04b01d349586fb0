"""Granite 3: Llama's layers with multipliers of embeddings, scores, logits and of what they add.

A layer adds m times what it gives. Here the stream is kept divided by m: what is added is then what a layer gives, the
embedding is multiplied by 1 / m beside its own multiplier, and a norm, which divides by sqrt(mean square + epsilon),
gives what it gave with an epsilon of 1 / m^2 times its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspec.architectures import FAMILIES, GGUF, Family
from pyspec.architectures.decoder import DecoderConfig, read_decoder
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.shapes import DEFAULTS, GGUF_TENSORS, interleaved_rows, read_gguf_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["DEFAULTS_3", "read_gguf_multipliers", "read_multipliers"]


DEFAULTS_3 = DEFAULTS | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048}
DEFAULTS_3 |= {"rms_norm_eps": 1e-6, "embedding_multiplier": 1.0, "residual_multiplier": 1.0}
DEFAULTS_3 |= {"attention_multiplier": 1.0, "logits_scaling": 1.0}


def _scaled(embedding: float, residual: float, scores: float, logits: float, epsilon: float) -> dict[str, Any]:
    multipliers = {"embedding_scale": embedding / residual, "attention_scale": scores, "logits_scale": 1 / logits}
    return multipliers | {"norm_epsilon": epsilon / residual**2}


def read_multipliers(entries: Entries) -> dict[str, Any]:
    """Fields of a DecoderConfig that say what a config.json's multipliers do."""
    names = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "rms_norm_eps")
    return _scaled(*map(entries.number, names))


def read_gguf_multipliers(entries: Entries, shape: dict[str, Any]) -> dict[str, Any]:
    """The same, of a GGUF file and its shape."""
    names = {"embedding_scale": 1.0, "residual_scale": 1.0, "attention.scale": shape["head_dim"] ** -0.5}
    multipliers = (*(entries.number(*pair) for pair in names.items()), entries.number("logit_scale"))
    return _scaled(*multipliers, shape["norm_epsilon"])


def _read(source: Path | str, entries: Entries, architecture: str) -> DecoderConfig:
    shape = read_decoder(source, entries, architecture) | read_multipliers(entries)
    return DecoderConfig(**shape)


def _read_gguf(file: GGUFFile, entries: Entries) -> DecoderConfig:
    shape = read_gguf_shape(file, entries)
    return DecoderConfig(**shape | read_gguf_multipliers(entries, shape))


_GGUF = GGUF(("granite",), _read_gguf, GGUF_TENSORS, interleaved_rows)
_FAMILY = Family({"GraniteForCausalLM": DEFAULTS_3}, _read, LlamaWeights, AttentionRunner, _GGUF)
FAMILIES.register("granite", _FAMILY, "Granite 3")
