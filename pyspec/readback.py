"""What the host reads of logits: a few numbers of every row, which on a GPU arrive in one copy for a whole round.

A runner on a GPU sends them as soon as it has launched the verify (`send_statistics`), so that they are there when
the logits are. Acceptance and drafters then ask for the same ones (`read_statistics`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyspec.ops.row_statistics import TOP, row_statistics
from pyspec.ops.topk import topk

__all__ = ["HostStatistics", "read_statistics", "read_top_tokens", "send_statistics"]


class HostStatistics(NamedTuple):
    """Some of RowStatistics, of logits [R, V], as NumPy arrays."""

    top_tokens: np.ndarray  # [R, 8] int32
    top_logits: np.ndarray  # [R, 8] float32
    log_sum_exp: np.ndarray  # [R] float32


# logits on a GPU: their rows of a copy [R, 17] int32 in pinned memory, and what happens when it is complete
_sent: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def send_statistics(logits: Tensor, parts: Sequence[Tensor]) -> None:
    """Starts sending what `read_statistics` of each part will want; parts are the rows of logits, split.

    Does not wait for the device. The logits must not be changed afterwards.
    """
    statistics = row_statistics(logits.detach())
    numbers = (statistics.top_logits, statistics.log_sum_exp[:, None])
    packed = torch.cat([statistics.top_tokens.int(), *(values.view(torch.int32) for values in numbers)], 1)
    host = packed.to("cpu", non_blocking=True)  # pinned
    arrived = None
    if logits.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(logits.device))
    for part, rows in zip(parts, host.split([len(part) for part in parts]), strict=True):
        _sent[part] = rows, arrived


def read_statistics(logits: Tensor) -> HostStatistics:
    """Statistics of logits [R, V] on the host; on a GPU, what was sent, or is now, once for each tensor."""
    if not logits.is_cuda:
        statistics = row_statistics(logits.detach())
        top_tokens = statistics.top_tokens.int()
        return HostStatistics(top_tokens.numpy(), statistics.top_logits.numpy(), statistics.log_sum_exp.numpy())
    if logits not in _sent:
        send_statistics(logits, [logits])
    return _received(*_sent[logits])


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


def _received(rows: Tensor, arrived: torch.cuda.Event | None) -> HostStatistics:
    if arrived is not None:
        arrived.synchronize()
    top_tokens, top_logits, log_sum_exp = map(np.ascontiguousarray, np.split(rows.numpy(), (TOP, 2 * TOP), axis=1))
    return HostStatistics(top_tokens, top_logits.view(np.float32), log_sum_exp.view(np.float32)[:, 0])
