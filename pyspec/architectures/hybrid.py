"""HybridConfig: models in which some layers are attention and the others have a recurrent state.

A path is committed to both: attention layers compact their keys and values, recurrent layers replay it at the
beginning of the next round. All layers run the same nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pyspec.architectures import Unsupported
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.llama import DecoderLayer
from pyspec.architectures.rotary import Rope
from pyspec.architectures.weights import Blank
from pyspec.entries import Entries

__all__ = ["HybridConfig", "read_attention_layers"]


@dataclass(frozen=True)
class HybridConfig(DecoderConfig):
    """The shape of a hybrid. What a DecoderConfig says of heads is of the attention layers.

    Attributes:
        recurrence: the shape of the recurrent layers, with what pyspec.caches.state.StateCache.of asks for.
        is_attention: of every layer.
    """

    recurrence: Any = None
    is_attention: tuple[bool, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        count = sum(self.is_attention)
        if len(self.is_attention) != self.layers or self.recurrence.layers != self.layers - count:
            raise ValueError(
                f"is_attention must be of {self.layers} layers, {self.layers - self.recurrence.layers} of them "
                f"attention, got {count} of {len(self.is_attention)}"
            )
        if any(self.windows):
            raise Unsupported(f"{self.architecture} has attention with windows, HybridRunner has none")

    @property
    def attention_layers(self) -> int:
        return sum(self.is_attention)

    @property
    def places(self) -> Sequence[int]:
        return [self.is_attention[:layer].count(kind) for layer, kind in enumerate(self.is_attention)]

    def kind_of(self, layer: int) -> type[DecoderLayer]:
        """What holds the weights of a layer."""
        raise NotImplementedError  # abstract: each family has its own

    def empty_layers(self, blank: Blank) -> list[DecoderLayer]:
        return [self.kind_of(layer).empty(self, blank) for layer in range(self.layers)]

    def ropes(self, positions: int, device: torch.device) -> list[Rope]:
        """Of the attention layers."""
        ropes = zip(super().ropes(positions, device), self.is_attention, strict=True)
        return [rope for rope, is_attention in ropes if is_attention]


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
