"""lay_out: rows of a file in their place in a laid out weight, as lay_out_weight has them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops.lay_out import StoredMatrix, empty_weight, laid_out_shape, lay_out
from pyspec.ops.linear import lay_out_weight
from pyspec.ops.weight_formats import FORMATS, GGUF_KINDS, quantise
from tests.helpers.every_backend import each_set, on_backend
from tests.helpers.weight_formats import gguf_bytes

EACH = ["reference", *each_set("lay_out")]
FLOATS = ("float32", "float16", "bfloat16")
ROUNDED = (*FLOATS, "int8", "int4_32")


def stored(kind: str, outputs: int, inputs: int, seed: int = 0, order=None) -> StoredMatrix:
    """Random rows: any bits in codes and scales, factors of a sensible size."""
    rng = np.random.default_rng(seed)
    if kind in FLOATS:
        values = torch.from_numpy(rng.normal(size=(outputs, inputs)).astype(np.float32))
        data = values.to(getattr(torch, kind)).view(torch.uint8).flatten()
        return StoredMatrix(kind, data, outputs, inputs, order)
    return StoredMatrix(kind, gguf_bytes(kind, (outputs, inputs), seed), outputs, inputs, order)


def blank(format: str, outputs: int, inputs: int):
    dtype, shape = laid_out_shape(format, outputs, inputs)
    return empty_weight(format, outputs, inputs, torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8))


def expected(format: str, matrix: StoredMatrix):
    if format == matrix.kind and format not in FLOATS:
        return lay_out_weight(matrix.codes())
    if format == "int8" and matrix.kind == "q8_0":
        return lay_out_weight(matrix.codes())
    if format.startswith("int4"):
        return lay_out_weight(quantise(matrix.values(), FORMATS[format]))
    return lay_out_weight(matrix.values(), getattr(torch, format))


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("kind", [*GGUF_KINDS, *FLOATS])
def test_rows_lie_as_lay_out_weight_puts_them(kind, backend):
    for format in (*ROUNDED, *({kind} - {*ROUNDED, "q8_0"})):
        order = torch.randperm(75, generator=torch.Generator().manual_seed(1))
        first, second = stored(kind, 37, 512), stored(kind, 75, 512, 1, order)
        weight = blank(format, 112, 512)
        with on_backend(backend):
            lay_out(weight, 37, second)  # in any order, from any row on
            lay_out(weight, 0, first)
        for start, matrix in ((0, first), (37, second)):
            found = weight.unpack()[start : start + matrix.outputs]
            assert torch.equal(found, expected(format, matrix).unpack()), format
        whole = blank(format, 64, 512)
        with on_backend(backend):
            lay_out(whole, 0, stored(kind, 64, 512))
        assert torch.equal(whole.data, expected(format, stored(kind, 64, 512)).data), format


@pytest.mark.parametrize("backend", EACH)
@settings(max_examples=15, deadline=None)
@given(outputs=st.integers(1, 70), inputs=st.integers(1, 300), first=st.integers(0, 40), seed=st.integers(0, 9))
def test_any_shape_of_floats(backend, outputs, inputs, first, seed):
    for kind in FLOATS:
        matrix = stored(kind, outputs, inputs, seed)
        for format in ROUNDED:
            weight = blank(format, first + outputs, inputs)
            with on_backend(backend):
                lay_out(weight, first, matrix)
            assert torch.equal(weight.unpack()[first:], expected(format, matrix).unpack())
            assert not first or not weight.unpack()[:first].any() or format == "int8"


@pytest.mark.parametrize("backend", EACH)
@pytest.mark.parametrize("kind", ["q4_k", "q5_1", "float32", "bfloat16"])
def test_what_is_not_finite_is_refused(kind, backend):
    for format in (kind, *ROUNDED):
        matrix = stored(kind, 40, 256)
        bad = np.float32(np.nan) if kind == "float32" else np.uint16(0x7F80 if kind == "bfloat16" else 0x7E00)
        matrix.data[: bad.nbytes] = torch.from_numpy(np.frombuffer(bad.tobytes(), np.uint8).copy())
        with on_backend(backend), pytest.raises(ValueError, match="source has values that are NaN or infinite"):
            lay_out(blank(format, 40, 256), 0, matrix)


@pytest.mark.parametrize("backend", EACH)
def test_values_too_large_for_a_scale_are_refused(backend):
    data = torch.full((32, 32), 1e9).view(torch.uint8).flatten()
    for format in ("int8", "int4_32"):
        with on_backend(backend), pytest.raises(ValueError, match="too large for a scale in fp16"):
            lay_out(blank(format, 32, 32), 0, StoredMatrix("float32", data, 32, 32))
    with on_backend(backend), pytest.raises(ValueError, match="NaN or infinite"):
        lay_out(blank("float16", 32, 32), 0, StoredMatrix("float32", data, 32, 32))


@pytest.mark.parametrize("backend", EACH)
def test_bad_arguments_are_refused_by_name(backend):
    matrix, weight = stored("float32", 8, 16), blank("float32", 32, 16)
    with on_backend(backend):
        with pytest.raises(ValueError, match="weight must have 16 inputs and room for 8 outputs from 30 on"):
            lay_out(weight, 30, matrix)
        with pytest.raises(ValueError, match="got 32 of 16"):
            lay_out(weight, 0, stored("float32", 8, 17))
        order = torch.tensor([0, 8])
        with pytest.raises(ValueError, match="order"):
            lay_out(weight, 0, StoredMatrix("float32", matrix.data, 2, 16, order))


def test_rows_and_values_of_a_stored_matrix():
    order = torch.tensor([3, 1, 0, 2])
    for kind in ("q4_k", "q8_0", "bfloat16"):
        plain, turned = stored(kind, 4, 256), stored(kind, 4, 256, order=order)
        assert torch.equal(turned.values(), plain.values()[order])
        assert torch.equal(turned.rows(slice(None, None, 2)).values(), plain.values()[order[::2]])
        assert torch.equal(turned.rows(slice(None, None, 2)).columns(3), plain.values()[order[::2], ::3])
