"""Programmatic dependent launch: a kernel is set up on the GPU while the one before it still runs.

A step is some four hundred short launches, each of which would otherwise wait for the last to leave before anything of
it begins. Every kernel of this package calls wait_for_inputs before it touches memory, and lets the next one be set up
from then on; so when a kernel passes its wait, all that were launched before it are over, and no memory is read or
written too early. Where the hardware has no such launches (before Hopper) both are nothing.
"""

import functools

import torch

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # the interpreter of a Triton that was built without CUDA
    gdc_launch_dependents = gdc_wait = None

__all__ = ["overlap", "wait_for_inputs"]


@triton.jit
def wait_for_inputs():
    """Waits for the kernels launched before this one. Every program must come here before it leaves."""
    if tl.target_info.cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Options of every launch on a device."""
    return {"launch_pdl": True} if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) else {}
