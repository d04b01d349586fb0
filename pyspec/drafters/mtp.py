"""Trees from the layer of the target's own checkpoint that guesses further tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pyspec.drafters import DRAFTERS, NamedDrafter
from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.heads.mtp import MtpHead
from pyspec.drafters.shapes import GrowthPolicy
from pyspec.drafters.table_drafter import Table
from pyspec.runners import Runner

__all__ = ["Mtp"]


class Mtp(Eagle3):
    """Grows trees as Eagle3 does, from the laws of the checkpoint's own layer.

    Args:
        target: the runner to draft for.
        growth, tables, temperature, top_k, top_p, seed: see Eagle3.
        weights: dtype of the layer's matrices; by default int8 on a CPU, bfloat16 elsewhere.

    Raises:
        ValueError: see MtpHead; or as for Eagle3.
    """

    def __init__(
        self,
        target: Runner,
        growth: GrowthPolicy | None = None,
        *,
        tables: Sequence[Table] | None = None,
        weights: torch.dtype | str | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        laws = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        super().__init__(MtpHead(target, weights), target, growth, tables=tables, **laws)


DRAFTERS.register(
    "mtp",
    NamedDrafter(Mtp, fits=lambda runner: getattr(getattr(runner, "weights", None), "mtp", None) is not None),
    "the layer of the target's checkpoint that guesses further tokens (Qwen3.5, Qwen3-Next)",
)
