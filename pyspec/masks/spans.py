"""Masks whose rows each see a few spans of keys: documents, windows, prefixes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["Span", "dense_of_spans"]

# low [N], high [N] and step: row i sees keys low[i], low[i] + step, ... below high[i], as far as there are such keys
Span = tuple[np.ndarray, np.ndarray, int]


def dense_of_spans(spans: list[Span], keys: int) -> Tensor:
    """The mask [N, M] bool that pyspec._host.span_tiles makes tiles of."""
    key = np.arange(keys)
    seen = [
        (key >= low[:, None]) & (key < high[:, None]) & ((key - low[:, None]) % step == 0) for low, high, step in spans
    ]
    return torch.from_numpy(np.logical_or.reduce(seen))
