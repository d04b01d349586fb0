"""Llama 4 (text): experts beside a feed-forward part of all rows, and most layers attend within chunks of a text.

One expert of a row counts by a sigmoid, which scales what it takes in. Layers that attend to the whole text do not turn
their heads, but scale queries by their position; in the others heads may be normed, without weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.blocks import expert_gates, feed_forward
from pyspec.architectures.decoder import read_decoder
from pyspec.architectures.llama import LayerWeights, LlamaWeights
from pyspec.architectures.mixture import (
    GGUF_EXPERTS,
    ExpertCheckpoint,
    MixtureConfig,
    MixtureLayer,
    read_choices,
    read_gguf_choices,
)
from pyspec.architectures.rotary import Rope
from pyspec.architectures.shapes import DEFAULTS, interleaved_rows, read_gguf_shape
from pyspec.architectures.weights import Blank, Matrix, dense
from pyspec.entries import Entries
from pyspec.ops.expert_linear import expert_linear
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.route_experts import mix_experts, route_experts
from pyspec.ops.swiglu import swiglu
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["Llama4Config", "Llama4Weights"]


@dataclass(frozen=True)
class Llama4Config(MixtureConfig):
    """The shape of a model: windows are chunks, and shared_size is of the part of all rows beside experts.

    Attributes:
        norms_heads: whether queries and keys that are turned are divided by their root mean square.
        warming: (factor, period): at position p queries that are not turned are multiplied by 1 + factor log(1 + n), n
            being (p + 1) // period; None for 1.
    """

    is_chunked = True

    norms_heads: bool = False
    warming: tuple[float, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.experts_per_token != 1:
            raise Unsupported(
                f"{self.architecture} has {self.experts_per_token} experts of a token, our kernels of Llama 4 have 1"
            )

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """What each layer's heads are turned by at so many positions."""
        ropes = super().ropes(positions, device)
        if self.warming is None:
            return ropes
        factor, period = self.warming
        periods = torch.arange(1, positions + 1, device="cpu") // period
        scales = (1 + factor * torch.log1p(periods.float())).to(device)
        return [
            rope._replace(query_scales=scales) if turn == "none" else rope
            for turn, rope in zip(self.turns, ropes, strict=True)
        ]

    def empty_layers(self, blank: Blank) -> list[LayerWeights]:
        kinds = {False: Llama4Layer, True: Llama4ExpertLayer}
        layers = [kinds[has_experts].empty(self, blank) for has_experts in self.expert_layers]
        for layer, turn in zip(layers, self.turns, strict=True):
            layer.is_normed = self.norms_heads and turn != "none"
        return layers


class Llama4Layer(LayerWeights):
    """A layer whose queries and keys may be normed without weights."""

    is_normed = False

    def prepare(self, config: Llama4Config) -> None:
        super().prepare(config)
        if self.is_normed:
            self.head_scales = torch.ones(2, config.head_dim, device=self.norms["attention"].device)


@dataclass
class Llama4ExpertLayer(Llama4Layer, MixtureLayer):
    """A layer with experts and a part of all rows."""

    MATRICES = (*LayerWeights.MATRICES, "shared_gate_up", "shared_down")

    shared_gate_up: Matrix  # [2 * shared_size, hidden]
    shared_down: Matrix  # [hidden, shared_size]

    @classmethod
    def empty_feed_forward(cls, config: Llama4Config, blank: Blank) -> dict[str, Tensor]:
        return super().empty_feed_forward(config, blank) | {
            "shared_gate_up": blank.matrix(2 * config.shared_size, config.hidden_size),
            "shared_down": blank.matrix(config.hidden_size, config.shared_size),
        }

    def named_feed_forward(self, config: Llama4Config) -> dict[str, Tensor]:
        gate, up = dense(self.shared_gate_up).split(config.shared_size)
        tensors = {"gate_proj": gate, "up_proj": up, "down_proj": dense(self.shared_down)}
        tensors = {f"shared_expert.{name}": tensor for name, tensor in tensors.items()}
        return super().named_feed_forward(config) | tensors

    def feed_forward(self, x: Tensor, config: Llama4Config) -> Tensor:
        gates, ids = route_experts(linear(x, self.router, out_dtype=torch.float32), 1, sigmoid=True)
        gate, up = (part if part is None else mix_experts(part, gates) for part in expert_gates(x, ids, self.gate_up))
        inner = swiglu(gate, up=up, activation=config.activation, out_dtype=x.dtype)
        values = expert_linear(inner, ids, self.down, out_dtype=torch.float32)
        shared = feed_forward(x, self.shared_gate_up, self.shared_down, config.activation)
        return rms_norm(shared, None, 0.0, delta=values)


class Llama4Weights(LlamaWeights):
    """All weights, by the names of Hugging Face's Qwen3 MoE."""

    @staticmethod
    def checkpoint(stored, config: Llama4Config) -> Llama4Checkpoint:
        return Llama4Checkpoint(stored)


class Llama4Checkpoint(ExpertCheckpoint):
    """A checkpoint of Llama 4, see ExpertCheckpoint: matrices of experts that are together lie on their side."""

    NAMES = ((r"\.feed_forward\.", ".mlp."), *ExpertCheckpoint.NAMES)
    IS_TRANSPOSED = True


# ==== config.json ====

_DEFAULTS = DEFAULTS | {"vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "num_hidden_layers": 48}
_DEFAULTS |= {"intermediate_size_mlp": 16384, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128}
_DEFAULTS |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "num_experts_per_tok": 1}
_DEFAULTS |= {"num_local_experts": 16, "interleave_moe_layer_step": 1, "use_qk_norm": True, "floor_scale": 8192}
_DEFAULTS |= {"no_rope_layer_interval": 4, "attention_chunk_size": 8192, "attn_temperature_tuning": True}
_DEFAULTS |= {"attn_scale": 0.1}
_TURNS = {True: "global", False: "none"}


def _read(source: Path | str, entries: Entries, architecture: str) -> Llama4Config:
    shape = read_decoder(source, entries, architecture, 5e5)
    layers, size = shape["layers"], shape["intermediate_size"]
    shape["intermediate_size"] = entries.whole("intermediate_size_mlp")
    interval, step = entries.whole("no_rope_layer_interval"), entries.whole("interleave_moe_layer_step")
    turned = entries.array("no_rope_layers", int, []) or [int((layer + 1) % interval != 0) for layer in range(layers)]
    if len(turned) < layers or not set(turned) <= {0, 1}:
        raise entries.wrong("no_rope_layers", turned, f"0 or 1 for each of {layers} layers")
    chunk = None if entries.is_null("attention_chunk_size") else entries.whole("attention_chunk_size")
    kinds = entries.array("layer_types", str, [_kind(is_turned and chunk) for is_turned in turned[:layers]])
    if (
        len(kinds) != layers
        or not set(kinds) <= {_kind(True), _kind(False)}
        or (chunk is None and _kind(True) in kinds)
    ):
        raise entries.wrong("layer_types", kinds, f"{layers} of {_kind(False)} or, with chunks, {_kind(True)}")
    mixed = entries.array("moe_layers", int, list(range(step - 1, layers, step)))
    is_warmed = entries.flag("attn_temperature_tuning")
    return Llama4Config(
        **shape,
        **read_choices(entries),
        expert_size=size,
        shared_size=size,
        expert_layers=tuple(layer in mixed for layer in range(layers)),
        windows=tuple(chunk if kind == _kind(True) else None for kind in kinds),
        turns=tuple(_TURNS[bool(is_turned)] for is_turned in turned[:layers]),
        norms_heads=entries.flag("use_qk_norm"),
        warming=(entries.number("attn_scale"), entries.whole("floor_scale")) if is_warmed else None,
    )


def _kind(is_chunked: bool) -> str:
    return "chunked_attention" if is_chunked else "full_attention"


# ==== GGUF ====

_OF_LLAMA_CPP = 8192  # its chunks, and the period of its warming


def _read_gguf(file: GGUFFile, entries: Entries) -> Llama4Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it, which fixes chunks and turned layers."""
    shape, choices = read_gguf_shape(file, entries, is_mixture=True), read_gguf_choices(entries)
    layers, step = shape["layers"], entries.whole("interleave_moe_layer_step")
    size = entries.whole("expert_feed_forward_length")
    in_chunks = entries.whole("attention.sliding_window", _OF_LLAMA_CPP, least=0) > 0
    turned = [not in_chunks or (layer + 1) % 4 != 0 for layer in range(layers)]
    return Llama4Config(
        **shape,
        **choices,
        expert_size=size,
        shared_size=size,
        expert_layers=tuple((layer + 1) % step == 0 for layer in range(layers)),
        windows=tuple(_OF_LLAMA_CPP if in_chunks and each else None for each in turned),
        turns=tuple(_TURNS[each] for each in turned),
        norms_heads=choices["experts"] != 128,  # as Maverick has it
        warming=(0.1, _OF_LLAMA_CPP),
    )


_GGUF = GGUF(("llama4",), _read_gguf, GGUF_EXPERTS)
_ARCHITECTURES = dict.fromkeys(("Llama4ForCausalLM", "Llama4ForConditionalGeneration"), _DEFAULTS)
_FAMILY = Family(_ARCHITECTURES, _read, Llama4Weights, AttentionRunner, _GGUF, interleaved_rows)
FAMILIES.register("llama4", _FAMILY, "Llama 4 (text)")
