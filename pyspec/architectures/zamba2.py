"""Zamba2: layers of Mamba-2, and a few blocks of attention that many of them share, each with small parts of its own.

With e the embedded rows, h the residual stream, and the block's matrices those of the layer's turn:

    s = linear(feed_forward(norm(attention(norm([h, e])))));  h = h + mamba2(norm(h + s))

What a layer has of its own are two narrow matrices beside the block's gates and ups, and in some models beside its
queries, keys and values: x goes through both, and what they give is added. So a block is read as often as it is used,
but kept once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, Family, Unsupported
from pyspec.architectures.blocks import attend, tap
from pyspec.architectures.hybrid import HybridConfig
from pyspec.architectures.llama import LayerWeights, LlamaWeights
from pyspec.architectures.mamba2 import Mamba2Part, Mamba2Shape
from pyspec.architectures.mixture import ExpertCheckpoint
from pyspec.architectures.rotary import read_rope
from pyspec.architectures.shapes import DEFAULTS, read_activation, read_shape
from pyspec.architectures.weights import Blank, Matrix, dense
from pyspec.entries import Entries
from pyspec.ops.expert_linear import expert_linear
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.swiglu import swiglu
from pyspec.runners.recurrent import HybridRunner

__all__ = []


@dataclass(frozen=True)
class Zamba2Config(HybridConfig):
    """The shape of a model. All layers are recurrent; is_attention are those that use a block before.

    Attributes:
        blocks: how many there are; the layers with attention take turns at them.
        rank: of the layers' own matrices beside a block's.
        has_own_heads: whether they have such beside queries, keys and values too.
    """

    norm_names = {"attention": "input_layernorm", "feed_forward": "pre_ff_layernorm"}  # noqa: RUF012
    fused = ("gate_up",)
    some_have_both = True

    blocks: int = 1
    rank: int = 1
    has_own_heads: bool = False

    def number_of(self, layer: int) -> int:
        """Of a layer among those that use a block."""
        return sum(self.is_attention[:layer])

    def owner_of(self, layer: int) -> int:
        """The layer by whose name checkpoints have the block that a layer uses: the first of its turn."""
        users = [index for index, attends in enumerate(self.is_attention) if attends]
        return users[self.number_of(layer) % self.blocks]

    def empty_layers(self, blank: Blank) -> list[Zamba2Layer]:
        return [self._kind_of(layer).empty_at(layer, self, blank) for layer in range(self.layers)]

    def _kind_of(self, layer: int) -> type[Zamba2Layer]:
        if not self.is_attention[layer]:
            return Zamba2Layer
        return OwningLayer if self.owner_of(layer) == layer else SharingLayer


@dataclass
class Zamba2Layer(Mamba2Part):
    """A layer with a recurrence of Mamba-2."""

    MATRICES = Mamba2Part.RECURRENCE
    PART = ""  # what names of its own tensors begin with

    norm: Tensor  # [hidden]

    @classmethod
    def empty_at(cls, index: int, config: Zamba2Config, blank: Blank) -> Zamba2Layer:
        """Weights of a layer to be filled."""
        return cls(**cls.own_fields(config, blank))

    @classmethod
    def own_fields(cls, config: Zamba2Config, blank: Blank) -> dict[str, Any]:
        return cls.empty_recurrence(config.recurrence, blank) | {"norm": blank.vector(config.hidden_size)}

    def named(self, config: Zamba2Config, prefix: str) -> dict[str, Tensor]:
        prefix += self.PART
        return {f"{prefix}input_layernorm.weight": self.norm} | self.named_recurrence(f"{prefix}mamba.")

    def prepare(self, config: Zamba2Config) -> None:
        if not hasattr(self, "mixer"):  # another runner shares the weights
            self.compute_recurrence(config.recurrence)


@dataclass
class SharingLayer(Zamba2Layer):
    """A layer that uses a block before. `index` is its place among the layers."""

    MATRICES = ("gate_up_down", "gate_up_up", "linear", *Zamba2Layer.MATRICES)
    OWN_HEADS = ("heads_down", "heads_up")
    PART = "mamba_decoder."

    index: int
    linear: Matrix  # [hidden, hidden]: of what the block gives
    gate_up_down: Matrix  # [rank, hidden]
    gate_up_up: Matrix  # [2 * intermediate, rank]
    heads_down: Matrix | None  # [3 * rank, 2 * hidden], of queries, keys and values
    heads_up: Matrix | None  # [3, heads * head_dim, rank]

    @classmethod
    def empty_at(cls, index: int, config: Zamba2Config, blank: Blank) -> SharingLayer:
        layer = cls(index=index, **cls.own_fields(config, blank))
        if config.has_own_heads:
            layer.MATRICES = (*cls.OWN_HEADS, *cls.MATRICES)
        return layer

    @classmethod
    def own_fields(cls, config: Zamba2Config, blank: Blank) -> dict[str, Any]:
        hidden, rank, width = config.hidden_size, config.rank, config.heads * config.head_dim
        own = {"heads_down": None, "heads_up": None}
        if config.has_own_heads:
            own = {"heads_down": blank.matrix(3 * rank, 2 * hidden), "heads_up": blank.matrix(3, width, rank)}
        return super().own_fields(config, blank) | {
            "linear": blank.matrix(hidden, hidden),
            "gate_up_down": blank.matrix(rank, hidden),
            "gate_up_up": blank.matrix(2 * config.intermediate_size, rank),
            **own,
        }

    def named(self, config: Zamba2Config, prefix: str) -> dict[str, Tensor]:
        tensors = super().named(config, prefix) | {f"{prefix}linear.weight": dense(self.linear)}
        block = f"model.layers.{config.owner_of(self.index)}.shared_transformer."
        number = config.number_of(self.index)
        places = {"feed_forward.gate_up_proj": (dense(self.gate_up_down), dense(self.gate_up_up))}
        if config.has_own_heads:
            parts = zip("qkv", dense(self.heads_down).split(config.rank), dense(self.heads_up), strict=True)
            places |= {f"self_attn.linear_{name}": (down, up) for name, down, up in parts}
        for name, pair in places.items():
            tensors |= {f"{block}{name}_adapter_list.{number}.{step}.weight": of for step, of in enumerate(pair)}
        return tensors

    def compute_recurrence(self, shape: Mamba2Shape) -> None:
        super().compute_recurrence(shape)
        self._turns: dict[int, Tensor] = {}  # by rows, which of the three matrices of heads_up each is for

    def shared(self, x: Tensor, block: OwningLayer, config: Zamba2Config, cache, numbers) -> Tensor:
        """[R, H] fp32: what the block and the layer's own matrices make of normed rows [R, 2 H]."""
        dtype, wide = x.dtype, {"out_dtype": torch.float32}
        projected = linear(x, block.qkv, **wide)
        if config.has_own_heads:
            rows = 3 * len(x)
            if rows not in self._turns:
                self._turns[rows] = (torch.arange(rows, dtype=torch.int32, device=x.device) % 3)[:, None]
            low = linear(x, self.heads_down, out_dtype=dtype).view(rows, -1)
            own = expert_linear(low, self._turns[rows], self.heads_up, **wide).view(rows, -1)
            projected = rms_norm(projected.view(rows, -1), None, 0.0, delta=own).view(len(x), -1)  # their sum
        mixed = attend(projected, block, config, cache, config.number_of(self.index), numbers, dtype)
        x = rms_norm(mixed, block.scales.feed_forward, config.norm_epsilon, out_dtype=dtype)
        own = linear(linear(x, self.gate_up_down, out_dtype=dtype), self.gate_up_up, **wide)
        gates = rms_norm(linear(x, block.gate_up, **wide), None, 0.0, delta=own)
        inner = swiglu(gates, activation=config.activation, out_dtype=dtype)
        return linear(linear(inner, block.down, out_dtype=dtype), self.linear, **wide)


@dataclass
class OwningLayer(SharingLayer, LayerWeights):
    """A layer by whose name checkpoints have a block, and which uses it first."""

    MATRICES = (*LayerWeights.MATRICES, *SharingLayer.MATRICES)

    @classmethod
    def own_fields(cls, config: Zamba2Config, blank: Blank) -> dict[str, Any]:
        block = vars(LayerWeights.empty(config, blank))
        block["qkv"] = blank.matrix(len(block["qkv"]), 2 * config.hidden_size)
        block["norms"]["attention"] = blank.vector(2 * config.hidden_size)
        return super().own_fields(config, blank) | block

    def named(self, config: Zamba2Config, prefix: str) -> dict[str, Tensor]:
        return super().named(config, prefix) | LayerWeights.named(self, config, f"{prefix}shared_transformer.")

    def prepare(self, config: Zamba2Config) -> None:
        super().prepare(config)
        LayerWeights.prepare(self, config)


class Zamba2Weights(LlamaWeights):
    """All weights, by the names of Hugging Face's Zamba2, but for those of parts that other families have too."""

    NORM = "model.final_layernorm.weight"

    @staticmethod
    def checkpoint(stored, config: Zamba2Config) -> Zamba2Checkpoint:
        return Zamba2Checkpoint(stored, config)

    def embeds_by_op(self, config: Zamba2Config) -> bool:
        return False

    def embed(self, config: Zamba2Config, tokens: Tensor) -> Tensor:
        """[R, 2 H] fp32: the residual stream, and beside it what it begins with, which stays."""
        rows = super().embed(config, tokens)
        return torch.cat((rows, rows), 1)

    def forward(
        self, config: Zamba2Config, hidden: Tensor, cache, numbers, dtype, layers=None, taps=()
    ) -> list[Tensor]:
        both, hidden = hidden, hidden[:, : config.hidden_size]
        delta, tapped, epsilon = None, [], config.norm_epsilon
        for index, layer in enumerate(self.layers):
            stream = hidden
            if config.is_attention[index]:
                if delta is not None:
                    rms_norm(hidden, None, 0.0, delta=delta)
                block = self.layers[config.owner_of(index)]
                x = rms_norm(both, block.scales.attention, epsilon, out_dtype=dtype)
                stream, delta = tap(hidden), layer.shared(x, block, config, cache, numbers)
            x = rms_norm(stream, layer.norm, epsilon, delta=delta, out_dtype=dtype)
            if index in taps:
                tapped.append(tap(hidden))
            delta = layer.recur(x, config.recurrence, cache.layer(index), numbers.round)
        normed = rms_norm(hidden, self.last_scale, epsilon, delta=delta, out_dtype=dtype)
        return [normed, *tapped, *([tap(hidden)] if config.layers in taps else [])]


class Zamba2Checkpoint(ExpertCheckpoint):
    """A checkpoint of Zamba2, where a block may be there once more for each layer that uses it, which is left out."""

    NAMES = ((r"\.feed_forward\.(gate_up|down)_proj\.", r".mlp.\1_proj."),)

    def __init__(self, stored, config: Zamba2Config):
        users = [index for index, attends in enumerate(config.is_attention) if attends]
        self._dropped = tuple(
            f"model.layers.{index}.shared_transformer." for index in users if config.owner_of(index) != index
        )
        super().__init__(stored)

    def _split(self, name: str, shape: tuple[int, ...]) -> dict[str, tuple | None]:
        return {} if name.startswith(self._dropped) else super()._split(name, shape)


# ==== config.json ====

_KINDS = {"mamba": False, "linear_attention": False, "hybrid": True}
_RECURRENT = ["linear_attention"]
_DEFAULTS = DEFAULTS | {"vocab_size": 32000, "hidden_size": 2560, "num_hidden_layers": 54, "hidden_act": "gelu"}
_DEFAULTS |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
_DEFAULTS |= {"mamba_d_state": 64, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_ngroups": 1, "n_mamba_heads": 8}
_DEFAULTS |= {"add_bias_linear": False, "num_mem_blocks": 1, "use_shared_attention_adapter": False}
_DEFAULTS |= {"adapter_rank": 128, "use_mem_rope": False}
_DEFAULTS |= {
    "layers_block_type": _RECURRENT
    + [*_RECURRENT * 5, "hybrid"] * 7
    + [*_RECURRENT * 4, "hybrid", *_RECURRENT * 3, "hybrid", *_RECURRENT * 2]
}


def _read(source: Path | str, entries: Entries, architecture: str) -> Zamba2Config:
    hidden, heads = entries.whole("hidden_size"), entries.whole("num_attention_heads")
    if entries.flag("add_bias_linear"):
        raise Unsupported(f"{source} has add_bias_linear True, HybridRunner has no such biases")
    if not entries.flag("tie_word_embeddings"):  # transformers' class has a block for each layer then
        raise Unsupported(f"{source} has tie_word_embeddings False, by which its layers share no blocks")
    own = {"head_dim": 2 * hidden // heads, "intermediate_size": entries.get("intermediate_size") or 4 * hidden}
    shape = read_shape(source, entries.with_own(own), architecture)
    layers = shape["layers"]
    kinds = entries.array("layer_types" if "layer_types" in entries else "layers_block_type", str)
    if len(kinds) != layers or not set(kinds) <= _KINDS.keys() or "hybrid" not in kinds:
        raise entries.wrong("layers_block_type", kinds, f"{layers} of {', '.join(_KINDS)}, some of them hybrid")
    if 2 * hidden % heads:
        raise entries.wrong("num_attention_heads", heads, f"a divisor of {2 * hidden}")
    is_attention, has_own_heads = tuple(_KINDS[kind] for kind in kinds), entries.flag("use_shared_attention_adapter")
    if has_own_heads and shape["kv_heads"] != heads:
        raise entries.wrong("num_key_value_heads", shape["kv_heads"], f"{heads} beside use_shared_attention_adapter")
    if not entries.flag("use_mem_rope"):
        shape["turns"] = ("none",) * layers
    shape["rope_base"], shape["rope_scaling"] = read_rope(source, entries, 10000.0)
    blocks = entries.whole("num_mem_blocks")
    if blocks > sum(is_attention):
        raise entries.wrong("num_mem_blocks", blocks, f"at most the {sum(is_attention)} layers that use them")
    return Zamba2Config(
        **shape,
        activation=read_activation(source, entries),
        attention_scale=(shape["head_dim"] / 2) ** -0.5,
        blocks=blocks,
        rank=entries.whole("adapter_rank"),
        has_own_heads=has_own_heads,
        is_attention=is_attention,
        is_recurrent=(True,) * layers,
        recurrence=_read_recurrence(entries, layers),
    )


def _read_recurrence(entries: Entries, layers: int) -> Mamba2Shape:
    channels, heads = entries.whole("mamba_expand") * entries.whole("hidden_size"), entries.whole("n_mamba_heads")
    if channels % heads:
        raise entries.wrong("n_mamba_heads", heads, f"heads that share {channels} channels")
    return Mamba2Shape(
        hidden_size=entries.whole("hidden_size"),
        layers=layers,
        heads=heads,
        head_dim=channels // heads,
        groups=entries.whole("mamba_ngroups"),
        state_size=entries.whole("mamba_d_state"),
        conv_taps=entries.whole("mamba_d_conv"),
        norm_epsilon=1e-5,
    )


_FAMILY = Family({"Zamba2ForCausalLM": _DEFAULTS}, _read, Zamba2Weights, HybridRunner)
FAMILIES.register("zamba2", _FAMILY, "Zamba2, Mamba-2 with shared blocks of attention")
