"""How a runner's calls are run: one at a time, without gradients, in the model's own arithmetic whatever is set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from pyspec.models.exclusive import lock_of

__all__ = ["inference"]


def inference(method: Callable) -> Callable:
    """A method of a runner in inference mode and outside of the caller's autocast, which would change the bits.

    It waits while another thread uses the runner.
    """

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with lock_of(self), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call
