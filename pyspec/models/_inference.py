"""How a runner's calls are run: without gradients, and in the model's own arithmetic whatever the caller has set."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["inference"]


def inference(method: Callable) -> Callable:
    """A method of a runner in inference mode and outside of the caller's autocast, which would change the bits."""

    @functools.wraps(method)
    def call(self, *args, **kwargs):
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return call
