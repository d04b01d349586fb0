"""What the small kernels of a layer share: their programs get onto the GPU before the kernel in front of them ends.

Programmatic dependent launch, of GPUs since Hopper: a layer is a dozen kernels of a few microseconds, and starting one
takes as long as some of them run. A kernel that is launched so calls `wait_for_earlier` before it writes, or reads
what others write: before that it may ask for weights. What comes behind it and knows nothing of this waits for its end
as ever.
"""

import functools

import torch

import triton
import triton.language as tl

__all__ = ["launch_options", "wait_for_earlier"]


@triton.jit
def wait_for_earlier(IS_EARLY: tl.constexpr):
    """Waits until the kernels in front are finished and what they wrote can be read, then lets the next one in.

    In this order, or kernels further behind would come in too and fill the multiprocessors with programs that wait: a
    step in int8 took a quarter longer so.
    """
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def launch_options(device: torch.device) -> dict:
    """Of a kernel that calls `wait_for_earlier`."""
    is_early = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"IS_EARLY": is_early, "launch_pdl": is_early}
