"""Trees from a head in the style of Chimera, which looks at the last three tokens. arXiv 2402.15758."""

from __future__ import annotations

from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.heads import HEADS
from pyspec.drafters.heads.chimera import ChimeraHead
from pyspec.drafters.heads.context_batch import ContextBatch

__all__ = ["Chimera"]


class Chimera(Eagle3):
    """Grows trees as Eagle3 does, from the laws of a head of three tokens.

    Args:
        head: a folder, as python -m training.chimera writes it; or a ChimeraHead.
        target, growth, tables, weights, taps, temperature, top_k, top_p, seed: see Eagle3.

    Raises:
        FileNotFoundError, ValueError: as for Eagle3.
    """

    heads, batches = ChimeraHead, ContextBatch


HEADS.register("chimera", Chimera, ChimeraHead.title)
