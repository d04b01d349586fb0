"""Where the steps of gpu.sh run: on the GPU, or, in a dry run, tiny and on the CPU."""

import os

import torch

from pyspec.measure import cases, kernels

IS_DRY = os.environ.get("PYSPEC_DRY") == "1"
DEVICE = "cpu" if IS_DRY else "cuda"
TINY = {
    "Llama-3.1-8B": (cases.Attention(64, 96, 4, 2, 64, 200),),
    "Mamba-2 2.7B": (cases.StateSpace(64, 2, 64, 16),),
}


def make_tiny() -> None:
    """Makes the cases of every op small: for a dry run, and for what checks every access to memory."""
    cases.MODELS, cases.CONTEXT, cases.PROMPT = TINY, 300, 256


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if IS_DRY:
    make_tiny()
    kernels.SECONDS = 0.01
