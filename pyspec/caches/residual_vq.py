"""ResidualVqSettings: keys and values as codes of a model's codebooks, by the commit rule of QuantisedCache."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from pyspec.caches.blocks import QuantisedSettings
from pyspec.caches.codebooks import Codebooks, demo_codebooks
from pyspec.caches.names import CACHES
from pyspec.ops.gear import BLOCK, TreeRows, join_exact
from pyspec.ops.quantised_ragged import residual_vq_ragged
from pyspec.ops.residual_vq import attend_codes, encode_codes, rotary_of_blocks, turn_keys


@dataclass(frozen=True)
class ResidualVqSettings(QuantisedSettings):
    """How a runner keeps keys and values as codes.

    Args:
        codebooks: of the runner's model; those of the demo model, which come with the package, by default.
        window: how many positions behind a block's end a row must be to see it quantised, as for GearSettings.
    """

    codebooks: Codebooks = field(default_factory=demo_codebooks)
    window: int = 64
    is_of_model: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.codebooks, Codebooks):
            raise TypeError(f"codebooks must be Codebooks, got {type(self.codebooks).__name__}: see Codebooks.load")
        self.check_window()

    _rotary: ClassVar[Tensor | None] = None  # of a started cache's blocks, where keys are coded before it

    def check_head_dim(self, head_dim: int) -> None:
        """Raises ValueError unless the codebooks are those of heads of this size."""
        if head_dim != self.codebooks.head_dim:
            raise ValueError(f"head_dim must be that of {self.codebooks}, {self.codebooks.head_dim}, got {head_dim}")

    def check_model(self, layers: int, kv_heads: int, head_dim: int, fingerprint: str, frequencies: Tensor) -> None:
        """Raises ValueError unless the codebooks are those of this model."""
        self.codebooks.check_model(layers, kv_heads, head_dim, fingerprint, frequencies)

    def record_bytes(self, head_dim: int) -> int:
        """Bytes of one record: keys and values of 128 tokens of one head."""
        return self.codebooks.format.record_bytes(head_dim)

    def effective_bits(self, head_dim: int, length: int) -> float:
        """Bits for each number, as for QuantisedSettings, with the codebooks, which all heads of a layer share."""
        numbers = 2 * self.codebooks.kv_heads * head_dim * length
        return super().effective_bits(head_dim, length) + self.codebooks.tables[0].nbytes * 8 / numbers

    def ready(self, capacity: int, device: torch.device) -> ResidualVqSettings:
        """The settings with codebooks on a device, and with cosines and sines where keys are coded before these."""
        settings = replace(self, codebooks=self.codebooks.to(device))
        if settings.codebooks.frequencies is not None:
            rotary = rotary_of_blocks(settings.codebooks.frequencies, capacity // BLOCK)
            object.__setattr__(settings, "_rotary", rotary)
        return settings

    def encode(self, k: Tensor, v: Tensor, channels: None, block: int) -> Tensor:
        if self._rotary is not None:
            k, v = turn_keys(k, self._rotary, block, back=True), v.float()
        return encode_codes(k, v, self.codebooks.tables)

    def attend(
        self, layer: int, q, quantised, k, v, rows: TreeRows, scale: float, records: int
    ) -> tuple[Tensor, Tensor]:
        quantised_part = attend_codes(q, quantised, rows, self.codebooks.tables[layer], scale, self._rotary)
        return join_exact(quantised_part, q, k, v, rows, scale)

    def attend_ragged(self, layer: int, q, quantised, k, v, numbers: tuple, **settings) -> Tensor:
        settings |= {"span": self.span, "rotary": self._rotary}
        return residual_vq_ragged(q, quantised, k, v, *numbers, self.codebooks.tables[layer], **settings)


CACHES.register("rvq", ResidualVqSettings, "codes of the model's codebooks; those of the demo model come with pyspec")
