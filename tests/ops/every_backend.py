"""Ops on every backend: the reference, and each instruction set that this processor has."""

import os
from contextlib import contextmanager

import pytest
import torch

import pyspec
from pyspec.ops import backends, swiglu


def available_instruction_sets() -> list[str]:
    """What this processor can run, by asking for each; none without the compiled library."""
    on_cpu = next(row for row in backends() if row["op"] == "swiglu" and row["device"] == "cpu")
    if on_cpu["backend"] != "compiled":
        return []
    found = []
    for name in ("portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16"):
        try:
            with on_backend(name):
                swiglu(torch.zeros(1, 2))
            found.append(name)
        except RuntimeError:
            pass
    return found


@contextmanager
def on_backend(name: str):
    """What ops run on inside."""
    if name == "reference":
        with pyspec.backend(name):
            yield
        return
    os.environ["PYSPEC_ISA"] = name
    try:
        yield
    finally:
        del os.environ["PYSPEC_ISA"]


KERNELS = available_instruction_sets()
BACKENDS = ["reference", *KERNELS]


def each_backend(op):
    """A fixture: the op on one backend after another. An instruction set stays in use for all of a test."""

    @pytest.fixture(params=BACKENDS)
    def run(request, monkeypatch):
        if request.param != "reference":
            monkeypatch.setenv("PYSPEC_ISA", request.param)
            return op

        def call(*args, **options):
            with on_backend("reference"):
                return op(*args, **options)

        return call

    return run


def each_kernel(op):
    """The same for the kernels only: the reference promises values, not bits."""

    @pytest.fixture(params=KERNELS)
    def kernel(request, monkeypatch):
        monkeypatch.setenv("PYSPEC_ISA", request.param)
        return op

    return kernel
