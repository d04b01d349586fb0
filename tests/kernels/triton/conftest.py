"""Triton kernels run on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is first imported, so it needs processes of its own:
test_interpreter.py starts them with TRITON_INTERPRET=1 and runs the tests of this folder there.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def ordered_dot(builder, a, b, d, *precision):
    """tl.dot of the interpreter: a @ b + d, each element's products added one by one in ascending order, in d's dtype.

    The interpreter's own is NumPy's product, whose order of summation, so a row's bits, depends on the processor's
    BLAS and on the rows beside it.
    """
    left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
    total = np.zeros(d.data.shape, d.data.dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN are among what is tested
        for k in range(left.shape[-1]):
            total += left[..., :, k, None] * right[..., k, None, :]
        return type(d)(total + d.data, d.dtype.scalar)


def fused(builder, x, y, z):
    """tl.fma of the interpreter, rounded once: an early one multiplies, rounds, adds and rounds."""
    exact = x.data.astype(np.longdouble) * y.data + z.data
    return type(z)(exact.astype(z.data.dtype), z.dtype.scalar)


if INTERPRETED:
    from triton._C.libtriton import interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = ordered_dot
    if not hasattr(interpreter, "fma_fp32"):
        InterpreterBuilder.create_fma = fused


@pytest.fixture(autouse=INTERPRETED)
def no_product_of_numpy(monkeypatch):
    def refuse(*operands, **options):
        raise AssertionError("a kernel's test must not hang on NumPy's product")

    monkeypatch.setattr(np, "matmul", refuse)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or INTERPRETED:
        return
    for item in items:
        if "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="run by test_interpreter.py"))


@pytest.fixture
def kernel_device() -> str:
    """Where tensors for a Triton kernel live."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=[1, 2], ids=["blocks of 64", "blocks of 128"])
def words_per_block(request, monkeypatch):
    """A mask's blocks have this many words of 64 rows."""
    from pyspec.masks import tiles

    monkeypatch.setattr(tiles, "words_per_block", lambda rows, device: request.param)
