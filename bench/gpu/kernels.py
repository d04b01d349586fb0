"""`pyspec bench kernels` on the GPU, kept case by case: graph replays over more inputs than the cache can hold."""

import sys

import where
from rich.console import Console

from pyspec import measure
from pyspec.measure import cases
from pyspec.measure.kernels import run, show

MODELS = ("Llama-3.1-8B", "Mamba-2 2.7B")


def main() -> None:
    cases.MODELS = {name: parts for name, parts in cases.MODELS.items() if name in MODELS}
    show(run(cases.OPS, where.DEVICE, keep=lambda result: measure.save("kernels_cuda", result)), Console(width=190))


if __name__ == "__main__":
    sys.exit(main())
