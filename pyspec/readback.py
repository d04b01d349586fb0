"""What the host reads of logits: a few numbers of every row, which on a GPU arrive in one copy for a whole round.

A runner on a GPU sends them as soon as it has launched the verify (`send_statistics`), so that they are there when
the logits are. Acceptance and drafters then ask for the same ones (`read_statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyspec.ops.row_statistics import TOP, row_statistics
from pyspec.ops.topk import topk

__all__ = ["HostStatistics", "pack_statistics", "read_statistics", "read_top_tokens", "send_statistics", "wait_for"]


class HostStatistics(NamedTuple):
    """Some of RowStatistics, of logits [R, V], as NumPy arrays."""

    top_tokens: np.ndarray  # [R, 8] int32
    top_logits: np.ndarray  # [R, 8] float32
    log_sum_exp: np.ndarray  # [R] float32


class _Sent(NamedTuple):
    numbers: Tensor  # as pack_statistics has them, in pinned memory where they come from a GPU
    arrived: torch.cuda.Event | None
    rows: slice


_sent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of logits what was sent, then what was read


def pack_statistics(logits: Tensor) -> Tensor:
    """[17 R] int32: the bits of all that HostStatistics has of logits [R, V], in its order."""
    statistics = row_statistics(logits.detach())
    numbers = (statistics.top_tokens.int(), statistics.top_logits, statistics.log_sum_exp)
    return torch.cat([values.view(torch.int32).flatten() for values in numbers])


def send_statistics(statistics: Tensor, parts: Sequence[Tensor], places: Sequence[slice] | None = None) -> None:
    """Starts sending what `read_statistics` of each part will want. Does not wait for the device.

    Args:
        statistics: pack_statistics of logits, which may be overwritten afterwards.
        parts: some of their rows, which must not be changed.
        places: of each part's rows; None if they are all rows, part after part.
    """
    host = statistics.to("cpu", non_blocking=True, copy=True)  # pinned
    arrived = None
    if statistics.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(statistics.device))
    if places is None:
        ends = accumulate(map(len, parts))
        places = [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
    for part, place in zip(parts, places, strict=True):
        _sent[part] = _Sent(host, arrived, place)


def read_statistics(logits: Tensor) -> HostStatistics:
    """Statistics of logits [R, V] on the host: what was sent, or is now; on a GPU once for each tensor."""
    found = _sent.get(logits)
    if found is None:
        if not logits.is_cuda:
            return _unpacked(pack_statistics(logits), slice(None))
        send_statistics(pack_statistics(logits), [logits])
        found = _sent[logits]
    if isinstance(found, _Sent):
        if found.arrived is not None:
            found.arrived.synchronize()
        found = _sent[logits] = _unpacked(found.numbers, found.rows)
    return found


def read_top_tokens(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """top_tokens and top_logits of `read_statistics`; on the CPU found alone, which takes less than half as long."""
    if logits.is_cuda:
        statistics = read_statistics(logits)
        return statistics.top_tokens, statistics.top_logits
    best = topk(logits.detach(), min(TOP, logits.shape[1]), sorted=True)
    top_tokens, top_logits = best.indices.int().numpy(), best.values.float().numpy()
    if np.isnan(top_logits[:, 0]).any():  # topk says where NaN is, row_statistics what is best beside it
        statistics = read_statistics(logits)
        return statistics.top_tokens, statistics.top_logits
    if top_logits.shape[1] < TOP:
        missing = ((0, 0), (0, TOP - top_logits.shape[1]))
        top_tokens, top_logits = np.pad(top_tokens, missing), np.pad(top_logits, missing, constant_values=-np.inf)
    return np.where(top_logits > -np.inf, top_tokens, np.int32(-1)), top_logits


def wait_for(parts: Sequence[Tensor | None]) -> None:
    """Waits until a device has computed what a verify gave."""
    logits = next(part for part in parts if part is not None)
    found = _sent.get(logits) if logits.is_cuda else None
    if isinstance(found, _Sent):
        found.arrived.synchronize()
    elif logits.is_cuda:
        torch.cuda.synchronize(logits.device)


def _unpacked(statistics: Tensor, rows: slice) -> HostStatistics:
    numbers = statistics.numpy()
    count = len(numbers) // (2 * TOP + 1)
    top_tokens, top_logits = numbers[: 2 * TOP * count].reshape(2, count, TOP)
    log_sum_exp = numbers[2 * TOP * count :]
    return HostStatistics(top_tokens[rows], top_logits.view(np.float32)[rows], log_sum_exp.view(np.float32)[rows])
