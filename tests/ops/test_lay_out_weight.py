"""lay_out_weight: every byte of a laid out weight, and what it gives back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops.linear import (
    LinearWeight,
    _lay_out_int8,
    lay_out_weight,
    linear,
    linear_reference,
    linear_rows_reference,
)
from tests.helpers.every_backend import each_kernel
from tests.helpers.linear_cases import FLOATS, PACKED, SIZES, random, rounded_weight

kernel = each_kernel(linear)


@pytest.mark.parametrize("outputs, inputs", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_float_format(outputs, inputs, dtype):
    """Place by place as kernels/params/linear.h says, and zeros between."""
    weight = random(outputs, inputs)
    laid_out = lay_out_weight(weight, dtype)
    assert (laid_out.outputs, laid_out.inputs, laid_out.dtype) == (outputs, inputs, dtype)
    steps = inputs + inputs % 2 if dtype == torch.bfloat16 else inputs
    assert laid_out.nbytes == (outputs + 31) // 32 * 32 * steps * dtype.itemsize
    found = laid_out.data.flatten().clone()
    rounded = weight.to(dtype)
    for n in range(outputs):
        panel, lane = n // 32 * 32 * steps, n % 32
        for k in range(inputs):
            step = k // 2 * 64 + lane * 2 + k % 2 if dtype == torch.bfloat16 else k * 32 + lane
            assert found[panel + step] == rounded[n, k]
            found[panel + step] = 0
    assert not found.any()
    assert torch.equal(laid_out.unpack(), rounded.float())


@pytest.mark.parametrize("outputs, inputs", SIZES)
def test_int8_format(outputs, inputs):
    weight = random(outputs, inputs)
    laid_out = lay_out_weight(weight, torch.int8)
    groups = (inputs + 31) // 32
    assert (laid_out.outputs, laid_out.inputs, laid_out.dtype) == (outputs, inputs, torch.int8)
    assert laid_out.nbytes == (outputs + 31) // 32 * groups * 32 * 34
    scales, integers = rounded_weight(weight.numpy())
    data = laid_out.data.flatten().numpy()
    for panel in range((outputs + 31) // 32):
        for g in range(groups):
            start = (panel * groups + g) * 32 * 34
            for lane in range(32):
                n = panel * 32 + lane
                scale = data[start + 2 * lane : start + 2 * lane + 2].view(np.float16)[0]
                places = [start + 64 + k // 4 * 128 + lane * 4 + k % 4 for k in range(32)]
                assert scale == (scales[n, g] if n < outputs else 0)
                assert (data[places] == (integers[n, g] + 128 if n < outputs else 128)).all()
    values = (scales[..., None].astype(np.float32) * integers).reshape(outputs, -1)[:, :inputs]
    assert torch.equal(laid_out.unpack(), torch.from_numpy(values))


@pytest.mark.parametrize("outputs, inputs", SIZES)
@pytest.mark.parametrize("dtype", PACKED, ids=str)
def test_rows(kernel, outputs, inputs, dtype):
    laid_out = lay_out_weight(random(outputs, inputs), dtype)
    index = torch.cat((torch.arange(outputs).flip(0), torch.randint(outputs, (40,)), torch.zeros(2, dtype=torch.int64)))
    found = laid_out.rows(index)
    assert found.dtype == torch.float32 and torch.equal(found, laid_out.unpack()[index])
    assert torch.equal(found, linear_rows_reference(index, laid_out.data, outputs, inputs))
    assert laid_out.rows(index[:0]).shape == (0, inputs)
    torch.library.opcheck(torch.ops.pyspec.linear_rows.default, (index[::2], laid_out.data, outputs, inputs))


@pytest.mark.parametrize("wrong", [-1, 45, 2**40])
def test_rows_outside_of_the_weight(wrong):
    laid_out = lay_out_weight(random(45, 77))
    with pytest.raises(RuntimeError, match=rf"index must be in \[0, 45\), got {wrong} at 1"):
        laid_out.rows(torch.tensor([0, wrong]))


@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
def test_packing_takes_any_float_and_any_strides(weight_dtype):
    weight = random(70, 90, dtype=weight_dtype)
    assert lay_out_weight(weight).dtype == weight_dtype
    for dtype in PACKED:
        expected = lay_out_weight(weight, dtype).data
        wide = random(90, 200, dtype=weight_dtype).T[10:150:2]
        wide.copy_(weight)
        assert wide.stride() == (2, 200) and torch.equal(lay_out_weight(wide, dtype).data, expected)
        assert torch.equal(lay_out_weight(weight.float(), dtype).data, expected)


@pytest.mark.parametrize("outputs, inputs", SIZES)
def test_formats_of_other_devices(outputs, inputs):
    """Tiles of int8 hold the same values as panels; floats are left in rows."""
    weight = random(outputs, inputs)
    in_panels = lay_out_weight(weight, torch.int8)
    in_tiles = LinearWeight(_lay_out_int8(weight, False), outputs, inputs)
    assert in_tiles.data.shape == ((outputs + 63) // 64, (inputs + 127) // 128, 64 * 4 * 34)
    assert torch.equal(in_tiles.unpack(), in_panels.unpack())
    index = torch.tensor([outputs - 1, 0])
    assert torch.equal(in_tiles.rows(index), in_panels.rows(index))
    assert in_tiles.rows(index).is_contiguous()
    x = random(3, inputs)
    found = [linear_reference(x, w.data, None, outputs, torch.float32) for w in (in_tiles, in_panels)]
    assert torch.equal(*found)
    for dtype in FLOATS:
        on_meta = lay_out_weight(weight.to("meta"), dtype)
        assert on_meta.data.shape == (outputs, inputs) and on_meta.dtype == dtype


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 999), st.sampled_from([1e-2, 1.0, 300.0, 1e6]))
def test_int8_error_is_half_a_step(seed, size):
    weight = random(33, 75, seed=seed) * size
    error = F.pad((lay_out_weight(weight, torch.int8).unpack() - weight).abs(), (0, 21)).unflatten(1, (-1, 32))
    largest = F.pad(weight.abs(), (0, 21)).unflatten(1, (-1, 32)).amax(-1, keepdim=True)
    # the scale is rounded to fp16, which widens a step by up to 2^-11
    assert (error <= largest / 254 * (1 + 2**-10)).all()


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.integers(0, 999))
def test_int8_keeps_what_was_int8(seed):
    """Scales times integers, the largest of which is 127, as in a Q8_0 file: packing changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(-127, 128, (35, 3, 32), generator=generator)
    largest = torch.randint(0, 32, (35, 3, 1), generator=generator)
    integers.scatter_(2, largest, 127 - 254 * torch.randint(0, 2, (35, 3, 1), generator=generator))
    # every positive fp16, subnormal ones too, whose product with 127 is one
    bits = torch.randint(1, 0x7C00, (35, 3, 1), generator=generator, dtype=torch.int16)
    scales = bits.view(torch.float16).float()
    weight = (scales * integers).flatten(1)
    laid_out = lay_out_weight(weight, torch.int8)
    assert torch.equal(laid_out.unpack(), weight)
    assert torch.equal(lay_out_weight(laid_out.unpack(), torch.int8).data, laid_out.data)


def test_int8_of_zeros_and_of_tiny_values():
    weight = torch.zeros(3, 70)
    weight[1, 40], weight[2] = 1.0, 1e-9  # a scale of 1e-9 / 127 is 0 in fp16
    expected = torch.zeros(3, 70)
    expected[1, 40] = torch.tensor(1 / 127).half().float() * 127
    assert torch.equal(lay_out_weight(weight, torch.int8).unpack(), expected)


@pytest.mark.parametrize(
    "error, message, weight, dtype",
    [
        (
            TypeError,
            "weight must be float32, float16 or bfloat16, or become int8 or int4",
            torch.ones(2, 3).double(),
            None,
        ),
        (
            TypeError,
            "weight must be float32, float16 or bfloat16, or become int8 or int4",
            torch.ones(2, 3).char(),
            None,
        ),
        (TypeError, ".* got torch.float32 to torch.uint8", torch.ones(2, 3), torch.uint8),
        (ValueError, r"weight must be \[outputs, inputs\] and not empty, got shape \(3,\)", torch.ones(3), None),
        (ValueError, r"weight must be .* got shape \(1, 2, 3\)", torch.ones(1, 2, 3), None),
        (ValueError, r"weight must be .* got shape \(0, 3\)", torch.ones(0, 3), None),
        (ValueError, r"weight must be .* got shape \(3, 0\)", torch.ones(3, 0), torch.int8),
        (ValueError, r"weight must be at most 8.32e\+06 for int8, got 9e\+06", torch.full((2, 3), -9e6), torch.int8),
        (ValueError, "weight must be at most .* got inf", torch.tensor([[1.0, torch.inf]]), torch.int8),
        (ValueError, "weight must be at most .* got nan", torch.tensor([[1.0, torch.nan]]), torch.int8),
    ],
)
def test_bad_weights_are_not_laid_out(error, message, weight, dtype):
    with pytest.raises(error, match=f"^{message}"):
        lay_out_weight(weight, dtype)
