"""Ops on every backend: the reference, and each instruction set that this processor has.

Where a test runs once for each of them, all but the reference and one instruction set are marked slow: the one that
PYSPEC_ISA names when the tests start, else the best. Inside of a test PYSPEC_ISA is set where a kernel runs, and only
there.
"""

import functools
import os
from contextlib import contextmanager

import pytest
import torch

import pyspec
from pyspec.ops._library import compiled_library


def available_instruction_sets() -> list[str]:
    """What this processor can run and the library has; none without the compiled library."""
    library, _ = compiled_library()
    return [] if library is None else library.pyspec_isa_available().decode().split(", ")


@contextmanager
def on_backend(name: str):
    """What ops run on inside."""
    if name == "reference":
        with pyspec.backend(name):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYSPEC_ISA", name)
        yield


KERNELS = available_instruction_sets()
BACKENDS = ["reference", *KERNELS]
USUAL = ("reference", os.environ.get("PYSPEC_ISA") or BACKENDS[-1])
EACH_BACKEND = [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS]
EACH_KERNEL = EACH_BACKEND[1:]


def backend_runner(request, monkeypatch):
    """Of a fixture with EACH_BACKEND as params: runs any function on one of them."""
    if request.param != "reference":
        monkeypatch.setenv("PYSPEC_ISA", request.param)
        return lambda function, *args, **options: function(*args, **options)
    monkeypatch.delenv("PYSPEC_ISA", raising=False)

    def call(function, *args, **options):
        with on_backend("reference"):
            return function(*args, **options)

    return call


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit: -0 is not 0, and a NaN equals itself."""
    is_alike = a.dtype == b.dtype and a.shape == b.shape
    return is_alike and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, where a kernel runs; the reference promises values: torch adds in another order on other machines,
    for other strides and in other company."""
    if os.environ.get("PYSPEC_ISA"):
        assert same_bits(found, expected)
    else:
        torch.testing.assert_close(found, expected)


def each_backend(op):
    """A fixture: the op on one backend after another. An instruction set stays in use for all of a test."""

    @pytest.fixture(params=EACH_BACKEND)
    def run(request, monkeypatch):
        runner = backend_runner(request, monkeypatch)
        return op if request.param != "reference" else functools.partial(runner, op)

    return run


def each_kernel(op):
    """The same for the kernels only: the reference promises values, not bits."""

    @pytest.fixture(params=EACH_KERNEL)
    def kernel(request, monkeypatch):
        monkeypatch.setenv("PYSPEC_ISA", request.param)
        return op

    return kernel
