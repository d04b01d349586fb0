"""How runners are made and called: one call at a time, without gradients, in the model's own arithmetic always."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

from pyspec.runners.exclusive import lock_of


@contextlib.contextmanager
def as_stored() -> Iterator[None]:
    """Weights are moved and laid out in the dtypes that they have, whatever autocast the caller is in."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def inference(method: Callable) -> Callable:
    """A method of a runner in inference mode and outside of the caller's autocast, which would change the bits.

    It waits while another thread uses the runner.
    """

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        device = self.device.type
        with lock_of(self), torch.inference_mode():
            if not torch.is_autocast_enabled(device):  # a context costs as much as a small kernel
                return method(self, *args, **kwargs)
            with torch.autocast(device, enabled=False):
                return method(self, *args, **kwargs)

    return call
