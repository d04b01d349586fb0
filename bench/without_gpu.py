"""Launches of Triton kernels without a GPU: CPU tensors that say they are on one, and a driver that has a kernel
compiled and notes the launch instead. Nobody looks at the tensors' numbers, so torch.empty of any size takes no memory.

So a launcher of kernels/triton runs as it is, and which variant of a kernel it gets is for Triton's own binder to say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

MULTIPROCESSORS = 132  # an H100's
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have


@dataclass(frozen=True)
class Launch:
    """One launch: of which variant, and with what."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    shared: int  # bytes of dynamic shared memory
    cubin: bytes  # one object for each variant
    arguments: tuple


class Driver:
    """What triton.runtime.JITFunction asks of a driver, for one GPU that is not there."""

    def __init__(self, architecture: int):
        self._target = GPUTarget("cuda", architecture, 32)
        self.launches: list[Launch] = []
        self.utils = self

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return self._target  # by which a JITFunction keeps its variants

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": SHARED[self._target.arch]}

    def load_binary(self, name, cubin, shared, device):
        return object(), cubin, 0, 0, 1024

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, cubin, packed, launch_metadata, enter, leave, *arguments):
            # A JITFunction keeps a launcher as long as the variant, so it may have been another driver's.
            launches = triton.runtime.driver.active.launches
            launches.append(Launch(metadata.name, (x, y, z), metadata.num_warps, metadata.shared, cubin, arguments))

        return launch


@contextlib.contextmanager
def launches(architecture: int = 90) -> Iterator[list[Launch]]:
    """The list to which every launch of a Triton kernel is added; CPU tensors say that they are on a GPU."""
    driver = Driver(architecture)
    device = torch.device("cuda", architecture)  # of its own, by which launchers may remember what they asked of it
    properties = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with contextlib.ExitStack() as stack:
        before = triton.runtime.driver._active
        stack.callback(triton.runtime.driver.set_active, before)
        triton.runtime.driver.set_active(driver)
        for owner, name, value in (
            (Tensor, "is_cuda", property(lambda tensor: True)),
            (Tensor, "device", property(lambda tensor: device)),
            (torch.cuda, "get_device_properties", lambda device: properties),
            (torch.cuda, "get_device_capability", lambda device: divmod(architecture, 10)),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield driver.launches
