"""What a quantised block keeps of its tokens and of the channels of its keys, where it does not keep all."""

from __future__ import annotations

import torch
from torch import Tensor

from pyspec.ops.gear import BLOCK


def shortest_keys(part: Tensor) -> Tensor:
    """Picks from keys and values [layers, 2, Hkv, span, D] each head's BLOCK tokens with the shortest keys, in order.

    Keys are turned to their positions already, so nothing else knows where they were (Devoto et al., arXiv:2406.11430).
    """
    lengths = part[:, 0].float().square().sum(-1)  # [layers, Hkv, span]
    kept = lengths.sort(dim=-1, stable=True).indices[..., :BLOCK].sort(dim=-1).values
    return part.gather(3, kept[:, None, :, :, None].expand(-1, 2, -1, -1, part.shape[-1]))


def best_channels(queries: Tensor, k: Tensor, count: int) -> Tensor:
    """The channels [layers, Hkv, count] uint8, ascending, that matter most to squared queries [layers, Hkv, RECENT, D].

    Leaving a channel of keys k [layers, Hkv, span, D] out takes the product of the lengths of the two columns from the
    scores (ThinK, Xu et al., arXiv:2407.21018).
    """
    score = queries.contiguous().sum(2) * k.float().square().contiguous().sum(2)
    kept = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return kept.sort(dim=-1).values.to(torch.uint8)
