"""`pyspec bench kernels` on the GPU, kept case by case: graph replays over more inputs than the cache can hold.

Then attention over quantised caches behind a long text, where the fewer bytes can pay for the unpacking.
"""

import sys

import where
from rich.console import Console

from pyspec import measure
from pyspec.measure import cases
from pyspec.measure.kernels import run, show

MODELS = ("Llama-3.1-8B", "Mamba-2 2.7B")
LONG_TEXT = 400 if where.IS_DRY else 32768  # tokens


def main() -> None:
    cases.MODELS = {name: parts for name, parts in cases.MODELS.items() if name in MODELS}
    found = run(cases.OPS, where.DEVICE, keep=lambda result: measure.save("kernels_cuda", result))
    show(found, Console(width=190))
    cases.CONTEXT = LONG_TEXT

    def keep(long: dict) -> None:
        measure.save("kernels_cuda", found | {"rows": found["rows"] + long["rows"]})

    show(run(("gear", "residual_vq"), where.DEVICE, keep=keep), Console(width=190))


if __name__ == "__main__":
    sys.exit(main())
