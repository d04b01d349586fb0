"""GearSettings: keys and values quantised to 2, 3, 4 or 8 bits, with GEAR's corrections."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from pyspec.caches.blocks import QuantisedSettings
from pyspec.caches.names import CACHES
from pyspec.ops.gear import TreeRows, attend_tree
from pyspec.ops.gear_encode import encode_records
from pyspec.ops.gear_format import GearFormat
from pyspec.ops.quantised_ragged import gear_ragged

KEEPS = (1.0, 0.5, 0.25, 0.125)


@dataclass(frozen=True)
class GearSettings(GearFormat, QuantisedSettings):
    """How a runner keeps keys and values; see GearFormat for the fields before window.

    Args:
        window: how many positions behind a block's end a row must be to see it quantised. A tree has at most window + 1
            nodes, for a deeper node would need a block that is not committed yet.
        keep: share of the tokens that each head keeps, 1, 1/2, 1/4 or 1/8: a block is then 128 / keep tokens, and the
            128 with the shortest keys go into its record (L2-norm eviction).
        whole_layers: how many layers, from the first on, keep all tokens nevertheless.
    """

    window: int = 64
    keep: float = 1.0
    whole_layers: int = 2

    def __post_init__(self):
        super().__post_init__()
        self.check_window()
        if self.keep not in KEEPS:
            raise ValueError(f"keep must be one of {KEEPS}, got {self.keep!r}")
        if isinstance(self.whole_layers, bool) or not isinstance(self.whole_layers, int) or self.whole_layers < 0:
            raise ValueError(f"whole_layers must be an integer of at least 0, got {self.whole_layers!r}")

    def encode(self, k: Tensor, v: Tensor, channels: Tensor | None, block: int) -> Tensor:
        return encode_records(k, v, self, channels)

    def attend(
        self, layer: int, q, quantised, k, v, rows: TreeRows, scale: float, records: int
    ) -> tuple[Tensor, Tensor]:
        return attend_tree(q, quantised, k, v, rows, self, scale, records)

    def attend_ragged(self, layer: int, q, quantised, k, v, numbers: tuple, **settings) -> Tensor:
        return gear_ragged(q, quantised, k, v, *numbers, self, span=self.span, **settings)


for _name, _fields, _summary in (
    ("int8", dict(bits=8, group=128), "8 bits, groups of 128"),
    ("int4", dict(bits=4, group=128), "4 bits, groups of 128"),
    ("kivi-2bit", dict(bits=2, group=64), "2 bits, groups of 64 (KIVI)"),
    ("gear-l-2bit", dict(bits=2, group=64, rank=4, fitted=True), "2 bits, fitted, rank 4 (GEAR-L)"),
    (
        "gear-2bit",
        dict(bits=2, group=64, rank=4, outliers=2, fitted=True),
        "2 bits, fitted, rank 4, outliers (GEAR)",
    ),
    (
        "gear-4bit",
        dict(bits=4, group=128, rank=4, outliers=2, fitted=True),
        "4 bits, fitted, rank 4, outliers (GEAR)",
    ),
):
    CACHES.register(_name, partial(GearSettings, **_fields), _summary)
