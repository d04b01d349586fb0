"""Masks whose rows each see a few spans of keys: documents, windows, prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyspec.arguments import described, read_integer

# low [N], high [N] and step: row i sees keys low[i], low[i] + step, ... below high[i], as far as there are such keys
Span = tuple[np.ndarray, np.ndarray, int]


def dense_of_spans(spans: list[Span], keys: int) -> Tensor:
    """The mask [N, M] bool that pyspec._host.span_tiles makes tiles of."""
    key = np.arange(keys)
    seen = [
        (key >= low[:, None]) & (key < high[:, None]) & ((key - low[:, None]) % step == 0) for low, high, step in spans
    ]
    return torch.from_numpy(np.logical_or.reduce(seen))


def document_spans(lengths: Sequence[int], causal: bool, inputs: Sequence[int] | None, prefix: int) -> list[Span]:
    """The spans of BlockMask.from_documents.

    Raises:
        ValueError: a length is negative or does not fit.
    """
    lengths = _lengths("lengths", lengths)
    inputs = np.zeros_like(lengths) if inputs is None else _lengths("inputs", inputs)
    if inputs.shape != lengths.shape or (inputs > lengths).any():
        raise ValueError(f"inputs must be one for each document and at most its length, got {inputs.tolist()}")
    ends = lengths.cumsum()
    rows = int(lengths.sum())
    starts, ends, input_ends = (
        np.repeat(places, lengths) for places in (ends - lengths, ends, ends - lengths + inputs)
    )
    high = np.maximum(np.arange(1, rows + 1), input_ends) if causal else ends
    spans = [(starts + prefix, high + prefix, 1)]
    if prefix:
        spans.append((np.zeros(rows, np.int64), np.full(rows, prefix), 1))
    return spans


def window_spans(
    rows: int, keys: int, window: int | None, dilation: int, global_tokens: int, causal: bool
) -> list[Span]:
    """The spans of BlockMask.from_window."""
    most = -(-keys // dilation)
    reach = (most if window is None else min(window - 1, most)) * dilation
    position = np.arange(keys - rows, keys)
    spans = [(position - reach, position + (1 if causal else reach + 1), dilation)]
    if global_tokens:
        high = np.full(rows, global_tokens)
        high = np.minimum(high, position + 1) if causal else np.where(position < global_tokens, keys, high)
        spans.append((np.zeros(rows, np.int64), high, 1))
    return spans


def read_sizes(**sizes: int) -> list[int]:
    """The sizes; raises TypeError or ValueError unless they are integers that are not negative."""
    found = [read_integer(name, size) for name, size in sizes.items()]
    for name, size in zip(sizes, found, strict=True):
        if size < 0:
            raise ValueError(f"{name} must not be negative, got {size}")
    return found


def _lengths(name: str, values: Sequence[int]) -> np.ndarray:
    lengths = np.asarray(values)
    if lengths.ndim != 1 or (lengths.size and lengths.dtype.kind not in "iu") or (lengths < 0).any():
        raise ValueError(f"{name} must be a list of integers that are not negative, got {described(values)}")
    return lengths.astype(np.int64)
