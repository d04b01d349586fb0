"""Trees from a DSpark block drafter: one call of it says what may follow for eight tokens. arXiv 2607.05147."""

from __future__ import annotations

from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.heads import HEADS
from pyspec.drafters.heads.block_batch import BlockBatch
from pyspec.drafters.heads.dspark import DSparkHead

__all__ = ["DSpark"]


class DSpark(Eagle3):
    """Grows trees as Eagle3 does, from the laws of a block drafter.

    Each round is one call for all sequences of a batch, however deep their trees are. Where the head says how sure it
    is, drafting stops below nodes whose drafts have hardly a chance.

    Args:
        head: a folder, or a hub id, with the config.json and safetensors of the speculators library; or a DSparkHead.
        target, growth, tables, weights, taps, temperature, top_k, top_p, seed: see Eagle3.

    Raises:
        FileNotFoundError, ValueError: as for Eagle3; or the head is of a kind that is not supported.
    """

    heads, batches = DSparkHead, BlockBatch
    depth = 8  # of one call


HEADS.register("dspark", DSpark, DSparkHead.title)
