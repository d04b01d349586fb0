"""Verified: what a model gives after every node of a tree, and what the host reads of it.

The host needs a few numbers of every row of logits. On a GPU they arrive in one copy for a whole round, which a runner
starts as soon as it has launched the verify, so that they are there when the logits are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyspec.ops.row_statistics import TOP, row_statistics
from pyspec.ops.topk import topk

ALL = slice(None)


class HostStatistics(NamedTuple):
    """Some of RowStatistics, of logits [R, V], as NumPy arrays."""

    top_tokens: np.ndarray  # [R, 8] int32
    top_logits: np.ndarray  # [R, 8] float32
    log_sum_exp: np.ndarray  # [R] float32
    entropy: np.ndarray  # [R] float32, nats


class Verified:
    """The rows of a verified tree: logits after every node, and their statistics.

    Args:
        logits: [T, V] floating point, on the model's device; not to be written to.
        sent: statistics of these rows and perhaps of others, on their way to the host; None to compute them when they
            are asked for.
        rows: those of the T nodes among the rows that were sent.
        taps: [T, taps, hidden] fp32 of the layers that the batch was asked for, see Runner.prefill; None if of none.
    """

    __slots__ = ("logits", "taps", "_sent", "_rows", "_statistics")

    def __init__(
        self, logits: Tensor, sent: SentStatistics | None = None, rows: slice = ALL, taps: Tensor | None = None
    ):
        self.logits = logits
        self.taps = taps
        self._sent, self._rows = sent, rows
        self._statistics: HostStatistics | None = None

    @property
    def statistics(self) -> HostStatistics:
        """Statistics of the logits. Waits for the device."""
        if self._statistics is None:
            if self._sent is None:
                self._sent = SentStatistics(pack_statistics(self.logits))
            self._statistics = HostStatistics(*(values[self._rows] for values in self._sent.read()))
        return self._statistics

    def top_tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The 8 best tokens [T, 8] int32 of each row and their logits [T, 8] float32; -1 and -inf where there are less.

        They are those of the statistics. On a CPU they are found alone, which takes less than half as long.
        """
        if self._statistics is None and self._sent is None and not self.logits.is_cuda:
            best = topk(_readable(self.logits), min(TOP, self.logits.shape[1]), sorted=True)
            top_tokens, top_logits = best.indices.int().numpy(), best.values.float().numpy()
            if not np.isnan(top_logits[:, 0]).any():  # topk says where NaN is, row_statistics what is best beside it
                return _padded(top_tokens, top_logits)
        return self.statistics[:2]

    def wait(self) -> None:
        """Waits until the device has computed the logits."""
        if self._sent is not None:
            self._sent.wait()
        elif self.logits.is_cuda:
            torch.cuda.synchronize(self.logits.device)


class SentStatistics:
    """Statistics of logits [R, V] on their way to the host. Making it does not wait for the device.

    Args:
        joined: pack_statistics of the logits, which may be overwritten afterwards.
    """

    def __init__(self, joined: Tensor):
        self._numbers = joined.to("cpu", non_blocking=True, copy=True)  # pinned
        self._arrived = None
        if joined.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(joined.device))

    def wait(self) -> None:
        """Waits until they have arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()

    def read(self) -> HostStatistics:
        """The statistics of all R rows, when they have arrived."""
        self.wait()
        numbers = self._numbers.numpy()
        count = len(numbers) // (2 * TOP + 2)
        top_tokens, top_logits = numbers[: 2 * TOP * count].reshape(2, count, TOP)
        log_sum_exp, entropy = numbers[2 * TOP * count :].view(np.float32).reshape(2, count)
        return HostStatistics(top_tokens, top_logits.view(np.float32), log_sum_exp, entropy)


def pack_statistics(logits: Tensor) -> Tensor:
    """The bits [18 R] int32 of all that HostStatistics has of logits [R, V], in its order."""
    statistics = row_statistics(_readable(logits))
    numbers = (statistics.top_tokens.int(), statistics.top_logits, statistics.log_sum_exp, statistics.entropy)
    return torch.cat([values.view(torch.int32).flatten() for values in numbers])


def _readable(logits: Tensor) -> Tensor:
    """Logits as our kernels read them: no float64, contiguous in a row."""
    logits = logits.detach()
    logits = logits.float() if logits.dtype == torch.float64 else logits
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _padded(top_tokens: np.ndarray, top_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of 8 columns; -1 for tokens whose logits are -inf."""
    if top_logits.shape[1] < TOP:
        missing = ((0, 0), (0, TOP - top_logits.shape[1]))
        top_tokens, top_logits = np.pad(top_tokens, missing), np.pad(top_logits, missing, constant_values=-np.inf)
    return np.where(top_logits > -np.inf, top_tokens, np.int32(-1)), top_logits
