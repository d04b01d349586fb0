"""HybridConfig: models in which some layers are attention, and some, often the others, have a recurrent state.

A path is committed to both: attention layers compact their keys and values, recurrent layers replay it at the
beginning of the next round. All layers run the same nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import DecoderLayer
from pyspec.architectures.mamba2 import Mamba2Part
from pyspec.architectures.rotary import Rope
from pyspec.architectures.shapes import read_gguf_shape
from pyspec.architectures.state_space import RecurrentPart
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = ["HybridConfig", "HybridMamba2Layer", "RecurrentLayer", "read_attention_layers", "read_gguf_kinds"]


@dataclass(frozen=True)
class HybridConfig(DecoderConfig):
    """The shape of a hybrid. What a DecoderConfig says of heads is of the attention layers.

    Attributes:
        recurrence: the shape of the recurrent layers, with what pyspec.caches.state.StateCache.of asks for.
        is_attention: of every layer.
        is_recurrent: of every layer; those that are not attention where it is empty. Layers may be neither, or all of
            them both.
    """

    some_have_both = False  # whether layers with both may be among others; `places` are those of the recurrence then

    recurrence: Any = None
    is_attention: tuple[bool, ...] = ()
    is_recurrent: tuple[bool, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        if not self.is_recurrent:
            object.__setattr__(self, "is_recurrent", tuple(not attends for attends in self.is_attention))
        for name, layers in (("is_attention", self.is_attention), ("is_recurrent", self.is_recurrent)):
            if len(layers) != self.layers:
                raise ValueError(f"{name} must be of {self.layers} layers, got {len(layers)}")
        if (count := sum(self.is_recurrent)) != self.recurrence.layers:
            raise ValueError(f"is_recurrent must be {self.recurrence.layers} layers of {self.layers}, got {count}")
        if not any(self.is_attention):
            raise ValueError("is_attention must be some layer, got none")
        is_parallel = [*map(all, zip(self.is_attention, self.is_recurrent, strict=True))]
        if any(is_parallel) and not all(is_parallel) and not self.some_have_both:
            raise Unsupported(f"{self.architecture} has both in some layers, HybridRunner in all or none")
        if any(self.windows):
            raise Unsupported(f"{self.architecture} has attention with windows, HybridRunner has none")

    @property
    def attention_layers(self) -> int:
        return sum(self.is_attention)

    @property
    def places(self) -> Sequence[int]:
        kinds = (self.is_recurrent if recurs else self.is_attention for recurs in self.is_recurrent)
        return [sum(kind[:layer]) for layer, kind in enumerate(kinds)]

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        """What holds the weights of a layer."""
        raise NotImplementedError  # abstract: each family has its own

    def empty_layers(self, blank: Blank) -> list[DecoderLayer]:
        return [self.kind_of(layer).empty(self, blank) for layer in range(self.layers)]

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """Of the attention layers."""
        ropes = zip(super().ropes(positions, device), self.is_attention, strict=True)
        return [rope for rope, is_attention in ropes if is_attention]


@dataclass
class RecurrentLayer(RecurrentPart, DecoderLayer):
    """A layer with a recurrence in the place of attention; the kind of recurrence comes before this among the bases."""

    RECURRENCE_NAME = "mamba."  # what names of the recurrence begin with

    @classmethod
    def empty(cls, config: HybridConfig, blank: Blank) -> RecurrentLayer:
        return cls(**cls.empty_recurrence(config.recurrence, blank), **cls.empty_parts(config, blank))

    def named(self, config: HybridConfig, prefix: str) -> dict[str, Tensor]:
        tensors = self.named_norms(config) | self.named_recurrence(self.RECURRENCE_NAME)
        tensors |= {f"mlp.{name}.weight": tensor for name, tensor in self.named_feed_forward(config).items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def compute(self, config: HybridConfig) -> None:
        self.compute_recurrence(config.recurrence)

    def mix(self, x: Tensor, config: HybridConfig, cache, place: int, numbers) -> Tensor:
        return self.recur(x, config.recurrence, cache.layer(place), numbers.round)


@dataclass
class HybridMamba2Layer(Mamba2Part, RecurrentLayer):
    """A layer with a recurrence of Mamba-2."""

    MATRICES = (*Mamba2Part.RECURRENCE, *DecoderLayer.MATRICES)


def read_gguf_kinds(file: GGUFFile, entries: Entries) -> tuple[dict[str, Any], tuple[bool, ...]]:
    """The sizes of the hybrid in a GGUF file, see read_gguf_shape, and whether each layer is attention.

    What is not has no key heads there, and maybe no feed-forward part.
    """
    layers = entries.whole("block_count") - entries.whole("nextn_predict_layers", 0, least=0)
    sizes = {"block_count": layers}
    for key in ("attention.head_count_kv", "feed_forward_length"):
        stated = entries.get(key)
        if isinstance(stated, list):
            sizes[key] = max(entries.array(key, int)[:layers])
            if key == "attention.head_count_kv" and len(stated) < layers:
                raise entries.wrong(key, stated, f"a number for each of {layers} layers")
    heads = entries.array("attention.head_count_kv", int)
    shape = read_gguf_shape(file, entries.with_own(sizes), is_mixture=True)
    for name, end in (("qkv_bias", "attn_q.bias"), ("output_bias", "attn_output.bias")):
        shape[name] = any(tensor.endswith(end) for tensor in file.shapes)
    return shape, tuple(count > 0 for count in heads[:layers])


def read_attention_layers(entries: Entries, layers: int, recurrent: str, period: int | None = None) -> tuple[bool, ...]:
    """Whether each layer is attention, by layer_types, or where these are left out, the last of every period is.

    Args:
        recurrent: what layer_types calls the other layers.
    """
    kinds = entries.get("layer_types")
    if kinds is None and period is not None:
        return tuple((layer + 1) % period == 0 for layer in range(layers))
    kinds = entries.array("layer_types", str)
    if len(kinds) != layers or set(kinds) != {"full_attention", recurrent}:
        raise entries.wrong("layer_types", kinds, f"{layers} of full_attention and {recurrent}, both there")
    return tuple(kind == "full_attention" for kind in kinds)
