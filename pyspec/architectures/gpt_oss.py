"""gpt-oss: experts with biases and a clamped activation, heads with sinks, and a window in every other layer.

Its files have gates and ups of an expert as neighbours; in MXFP4 as rows, in floats as columns.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.decoder import read_decoder
from pyspec.architectures.llama import LayerWeights, LlamaWeights
from pyspec.architectures.mixture import GGUF_EXPERTS, MixtureConfig, MixtureLayer, read_choices, read_gguf_choices
from pyspec.architectures.shapes import DEFAULTS, read_gguf_shape, read_kinds
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries
from pyspec.ops.expert_linear import JoinedExperts
from pyspec.ops.lay_out import StoredCodes, StoredMatrix, stored_floats
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["GptOssConfig", "GptOssWeights"]


@dataclass(frozen=True)
class GptOssConfig(MixtureConfig):
    """The shape of a model."""

    def empty_layers(self, blank: Blank) -> list[LayerWeights]:
        return [GptOssLayer.empty(self, blank) for _ in range(self.layers)]


@dataclass
class GptOssLayer(MixtureLayer):
    """A layer with experts whose router and matrices have biases."""

    router_bias: Tensor  # [experts]
    gate_up_bias: Tensor  # [experts, 2 * expert_size]
    down_bias: Tensor  # [experts, hidden]

    @classmethod
    def empty_feed_forward(cls, config: GptOssConfig, blank: Blank) -> dict[str, Tensor]:
        return super().empty_feed_forward(config, blank) | {
            "router_bias": blank.vector(config.experts),
            "gate_up_bias": blank.vector(config.experts, 2 * config.expert_size),
            "down_bias": blank.vector(config.experts, config.hidden_size),
        }

    def prepare(self, config: GptOssConfig) -> None:
        super().prepare(config)
        self.gate_up_biases = self.gate_up_bias
        if isinstance(self.gate_up, JoinedExperts):
            self.gate_up_biases = [half.contiguous() for half in self.gate_up_bias.split(config.expert_size, 1)]

    def named(self, config: GptOssConfig, prefix: str) -> dict[str, Tensor]:
        gate, up = self.gate_up_bias.split(config.expert_size, 1)
        biases = {"gate": self.router_bias, "experts.gate_proj": gate, "experts.up_proj": up}
        biases["experts.down_proj"] = self.down_bias
        named = {f"{prefix}mlp.{name}.bias": bias for name, bias in biases.items()}
        return super().named(config, prefix) | named


class GptOssWeights(LlamaWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE; biases of experts are together."""

    @staticmethod
    def checkpoint(stored, config) -> GptOssCheckpoint:
        return GptOssCheckpoint(stored)


class GptOssCheckpoint:
    """A checkpoint of gpt-oss, see checkpoints.weights, with a tensor for each matrix of each expert."""

    def __init__(self, stored):
        self._stored = stored
        self._places: dict[str, tuple[str, tuple[int, slice] | None]] = {}  # a stored tensor, and where in it
        self._codes: dict[str, StoredCodes] = {}  # of experts in MXFP4, while they are read
        self.shapes: dict[str, tuple[int, ...]] = {}
        for original, shape in stored.shapes.items():
            match = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", original)
            if match is None:
                name = original.replace(".mlp.router.", ".mlp.gate.")
                name = name.replace(".sinks.weight", ".sinks")
                self._places[name], self.shapes[name] = (original, None), shape
                continue
            is_split, is_bias = match[2] == "gate_up", match[3] is not None
            parts = {"gate": slice(0, None, 2), "up": slice(1, None, 2)} if is_split else {"down": slice(None)}
            outputs = shape[-1] if is_bias or not self._is_in_codes(original) else shape[1]
            for part, rows in parts.items():
                if is_bias:
                    name = f"{match[1]}.{part}_proj.bias"
                    self._places[name], self.shapes[name] = (original, (0, rows)), (shape[0], len(range(outputs)[rows]))
            for number, (part, rows) in product(range(0 if is_bias else shape[0]), parts.items()):
                name = f"{match[1]}.{number}.{part}_proj.weight"
                self._places[name] = original, (number, rows)
                self.shapes[name] = len(range(outputs)[rows]), shape[2] if outputs == shape[1] else shape[1]
        self._left = Counter(original for original, _ in self._places.values())

    def blocks(self, name: str) -> Iterator[tuple[Tensor | slice, Tensor]]:
        """Row numbers and the values of these rows."""
        original, place = self._places[name]
        if place is None:
            yield from self._stored.blocks(original)
        elif isinstance(codes := self.stored(name), StoredCodes):
            yield slice(None), codes.codes.values()
        else:
            yield slice(None), self._part(original, place)

    def stored(self, name: str) -> StoredMatrix | StoredCodes | None:
        """The matrix as it lies in the file, or in memory."""
        original, place = self._places[name]
        if place is None:
            return self._stored.stored(original)
        if not self._is_in_codes(original):
            return stored_floats(self._part(original, place))
        whole = self._codes.setdefault(original, self._stored.stored(original))
        number, rows = place
        outputs = self._stored.shapes[original][1]
        index = torch.arange(number * outputs, (number + 1) * outputs, device="cpu")[rows]
        return StoredCodes(whole.kind, len(index), whole.inputs, lambda: whole.codes.rows(index))

    def release(self, name: str) -> None:
        """Says that a tensor is done with."""
        original, _ = self._places[name]
        self._left[original] -= 1
        if not self._left[original]:
            self._codes.pop(original, None)
            self._stored.release(original)

    def _is_in_codes(self, original: str) -> bool:
        return isinstance(self._stored.stored(original), StoredCodes)

    def _part(self, original: str, place: tuple[int, slice]) -> Tensor:
        """Rows of an expert of floats, or columns of all biases."""
        ((_, whole),) = self._stored.blocks(original)
        number, rows = place
        return whole[:, rows] if whole.dim() == 2 else whole[number].detach().t()[rows].contiguous()


# ==== config.json ====

_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
_YARN |= {"original_max_position_embeddings": 4096}
_DEFAULTS = DEFAULTS | {"vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36}
_DEFAULTS |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072}
_DEFAULTS |= {"rms_norm_eps": 1e-5, "attention_bias": True, "sliding_window": 128, "num_local_experts": 128}
_DEFAULTS |= {"num_experts_per_tok": 4, "rope_parameters": _YARN, "model_type": "gpt_oss"}
_DEFAULTS |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
_ALIKE = {"renormalise": True, "has_sinks": True, "activation": "clamped"}


def _windows(layers: list[bool], window: int | None) -> tuple[int | None, ...]:
    return tuple(window if is_local else None for is_local in layers)


def _read(source: Path | str, entries: Entries, architecture: str) -> GptOssConfig:
    for name in ("swiglu_alpha", "swiglu_limit"):
        if entries.number(name) != _DEFAULTS[name]:
            raise Unsupported(f"{source} has {name} {entries.number(name)}, our kernels have {_DEFAULTS[name]}")
    shape = read_decoder(source, entries, architecture, 150000.0) | _ALIKE
    window = None if entries.is_null("sliding_window") else entries.whole("sliding_window")
    is_local = read_kinds(entries, shape["layers"], lambda layer: layer % 2 == 0, has_window=True)
    return GptOssConfig(
        **shape,
        **read_choices(entries),
        expert_size=shape["intermediate_size"],
        windows=_windows(is_local, window),
    )


def _read_gguf(file: GGUFFile, entries: Entries) -> GptOssConfig:
    """The shape of the model in a GGUF file, as llama.cpp reads it."""
    shape = read_gguf_shape(file, entries, is_mixture=True) | _ALIKE
    windows = _windows([layer % 2 == 0 for layer in range(shape["layers"])], entries.whole("attention.sliding_window"))
    size = entries.whole("expert_feed_forward_length", shape["intermediate_size"])
    return GptOssConfig(**shape, **read_gguf_choices(entries), expert_size=size, windows=windows)


_TENSORS = GGUF_EXPERTS | {"post_attention_norm": "post_attention_layernorm", "attn_sinks": "self_attn.sinks"}
_GGUF = GGUF(("gpt-oss",), _read_gguf, _TENSORS)
_FAMILY = Family({"GptOssForCausalLM": _DEFAULTS}, _read, GptOssWeights, AttentionRunner, _GGUF)
FAMILIES.register("gpt_oss", _FAMILY, "gpt-oss")
