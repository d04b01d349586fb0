"""Ops on every backend: the reference, and each instruction set that this processor has.

Where a test runs once for each of them, all but the reference and one instruction set are marked slow: the one that
PYSPEC_ISA names when the tests start, else the best. Sets that run an op's kernel of another set are left out. Inside
of a test PYSPEC_ISA is set where a kernel runs, and only there.
"""

import functools
import os
import re
from contextlib import contextmanager
from pathlib import Path

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
CMAKE = Path(__file__).parents[2] / "CMakeLists.txt"


@functools.cache
def sets_of(kernel: str) -> list[str]:
    """The instruction sets that a kernel is compiled for, of those that are here; all of them where nothing tells."""
    text = CMAKE.read_text() if CMAKE.exists() else ""
    lists = dict(re.findall(r"^ *set\((\w+) (kernels/cpu/[^)]+)\)$", text, re.MULTILINE))
    given = re.findall(r"^ *add_instruction_set\((\w+) KERNELS ([^)]*)", text, re.MULTILINE)
    sources = {
        name: re.sub(r"\$\{(\w+)\}", lambda found: lists.get(found[1], found[0]), files) for name, files in given
    }
    needed = f"kernels/cpu/{kernel}.cpp", "${CPU_KERNELS}"
    chosen = [name for name in KERNELS if any(files in sources.get(name, "") for files in needed)]
    return chosen if (CMAKE.parent / needed[0]).exists() else KERNELS


def usual_ones(names: list[str]) -> list:
    """As params of a test: all but the reference and one instruction set are slow."""
    asked = os.environ.get("PYSPEC_ISA")
    usual = ("reference", asked if asked in names else names[-1])
    return [name if name in usual else pytest.param(name, marks=pytest.mark.slow) for name in names]


def each_set(*kernels: str) -> list:
    """Params: the instruction sets that differ in what these kernels are."""
    names = [name for name in KERNELS if any(name in sets_of(kernel) for kernel in kernels)]
    return usual_ones(names) if names else []


EACH_BACKEND = usual_ones(BACKENDS)


def backend_runner(request, monkeypatch):
    """Of a fixture with backends as params: runs any function on one of them."""
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


def stem_of(op) -> str:
    return op.__module__.rpartition(".")[2]


def each_runner(*kernels: str):
    """A fixture: runs any function on one backend after another."""
    return pytest.fixture(params=["reference", *each_set(*kernels)])(backend_runner)


def each_backend(op, *kernels: str):
    """A fixture: the op on one backend after another. An instruction set stays in use for all of a test. The op's
    kernels are named where they are not the one with the name of its module."""

    @pytest.fixture(params=["reference", *each_set(*(kernels or [stem_of(op)]))])
    def run(request, monkeypatch):
        runner = backend_runner(request, monkeypatch)
        return op if request.param != "reference" else functools.partial(runner, op)

    return run


def each_kernel(op, *kernels: str):
    """The same for the kernels only: the reference promises values, not bits."""

    @pytest.fixture(params=each_set(*(kernels or [stem_of(op)])))
    def kernel(request, monkeypatch):
        monkeypatch.setenv("PYSPEC_ISA", request.param)
        return op

    return kernel
