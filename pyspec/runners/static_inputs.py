"""What changes from round to round for a recorded graph: numbers at fixed addresses, filled by one copy."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["StaticInputs"]


class StaticInputs:
    """int32 tensors on the device, attributes of these names and views of one buffer.

    The host writes to arrays (`host`) in pinned memory and sends them in one copy (`send`). It never waits for the
    device: memory is written to again when its copy has been read, and until then there is more.

    Args:
        device: where they lie.
        shapes: by name.
    """

    def __init__(self, device: torch.device, **shapes: tuple[int, ...]):
        self._shapes = shapes
        self.buffer = torch.zeros(sum(map(_aligned, shapes.values())), dtype=torch.int32, device=device)
        vars(self).update(_views(self.buffer, shapes))
        self._hosts: deque[_Host] = deque()  # those that were sent first come first

    def host(self) -> dict[str, np.ndarray]:
        """Arrays of zeros by name, to be written to and sent."""
        if self._hosts and self._hosts[0].is_read():
            self._next = self._hosts.popleft()
            self._next.memory.numpy().fill(0)
        else:
            memory = torch.zeros(len(self.buffer), dtype=torch.int32, device="cpu", pin_memory=self.buffer.is_cuda)
            event = torch.cuda.Event() if self.buffer.is_cuda else None
            self._next = _Host(memory, _views(memory.numpy(), self._shapes), event)
        return self._next.arrays

    def send(self) -> None:
        """Copies what was written to the device, behind all that was launched before."""
        self.buffer.copy_(self._next.memory, non_blocking=True)
        if self._next.read is not None:
            self._next.read.record(torch.cuda.current_stream(self.buffer.device))
        self._hosts.append(self._next)


class _Host(NamedTuple):
    memory: torch.Tensor
    arrays: dict[str, np.ndarray]
    read: torch.cuda.Event | None  # behind the copy

    def is_read(self) -> bool:
        return self.read is None or self.read.query()


def _aligned(shape: tuple[int, ...]) -> int:
    """Numbers that a shape takes: to 16 bytes, for Triton would compile a kernel again for another alignment."""
    return math.prod(shape) + -math.prod(shape) % 4


def _views(buffer, shapes: dict[str, tuple[int, ...]]) -> dict:
    views, start = {}, 0
    for name, shape in shapes.items():
        views[name] = buffer[start : start + math.prod(shape)].reshape(shape)
        start += _aligned(shape)
    return views
