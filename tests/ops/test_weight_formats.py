"""weight_formats: every value of a weight taken apart is the one that gguf's own dequantize gives."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.ops.weight_formats import FORMATS, GGUF_KINDS, from_gguf, quantise
from tests.helpers.linear_cases import random
from tests.helpers.weight_formats import gguf_bytes

gguf = pytest.importorskip("gguf")
INT4 = [name for name in FORMATS if name.startswith("int4_")]


def dequantised(kind: str, data: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    found = gguf.quants.dequantize(data.view(shape[0], -1).numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return torch.from_numpy(np.ascontiguousarray(found))


def test_formats_are_consistent():
    for name, format in FORMATS.items():
        assert format.name == name and len(format.levels) == 2**format.bits
        assert all(-128 <= level <= 127 for level in format.levels)
        assert format.block % format.group == 0 and 256 % format.block == 0
        assert format.has_floors or not format.has_minimums
        assert format.has_scales or format.group == format.block


@pytest.mark.parametrize("kind", GGUF_KINDS)
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 9999), outputs=st.integers(1, 9), blocks=st.integers(1, 4))
def test_every_value_of_a_gguf_tensor(kind, seed, outputs, blocks):
    """Any bytes are a tensor, as long as the factors are numbers."""
    format = FORMATS[kind]
    shape = (outputs, blocks * format.block)
    data = gguf_bytes(kind, shape, seed)
    codes = from_gguf(kind, data, shape)
    assert torch.equal(codes.values(), dequantised(kind, data, shape))
    assert codes.codes.dtype == torch.uint8 and codes.codes.shape == shape
    assert int(codes.codes.max()) < 2**format.bits
    per_block, per_group = (outputs, shape[1] // format.block), (outputs, shape[1] // format.group)
    assert codes.factors.shape == per_block and codes.factors.dtype == format.factor_dtype
    for part, expected, dtype in (
        (codes.scales, per_group if format.has_scales else None, torch.int8),
        (codes.floors, per_block if format.has_floors else None, format.factor_dtype),
        (codes.minimums, per_group if format.has_minimums else None, torch.uint8),
    ):
        assert (part is None) == (expected is None)
        assert part is None or (part.shape, part.dtype) == (expected, dtype)


@pytest.mark.parametrize(
    "message, kind, data, shape",
    [
        ("kind must be one of q4_0, .*, got 'iq2_xxs'", "iq2_xxs", torch.zeros(66, dtype=torch.uint8), (1, 256)),
        ("data must be the 36 bytes of 2 rows", "q4_0", torch.zeros(35, dtype=torch.uint8), (2, 32)),
        ("data must be .* whole blocks of 256 inputs for q4_k", "q4_k", torch.zeros(144, dtype=torch.uint8), (2, 128)),
        ("data must be .* got torch.int8 36", "q4_0", torch.zeros(36, dtype=torch.int8), (2, 32)),
    ],
)
def test_bad_bytes_are_refused(message, kind, data, shape):
    with pytest.raises(ValueError, match=f"^{message}"):
        from_gguf(kind, data, shape)


# ==== rounding to int4 ====


@pytest.mark.parametrize("name", INT4)
@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(seed=st.integers(0, 999), inputs=st.integers(16, 300), size=st.sampled_from([0.1, 1.0, 300.0]))
def test_int4_is_nearest_of_its_scale(name, seed, inputs, size):
    """No other code is nearer; and the scale is not worse than the one of the block's range."""
    format = FORMATS[name]
    weight = random(5, inputs, seed=seed) * size
    codes = quantise(weight, format)
    values, filled = codes.values(), -inputs % format.block
    assert values.shape == weight.shape and codes.codes.shape == (5, inputs + filled)
    scale = codes.factors.float().repeat_interleave(format.block, 1)[:, :inputs]
    error = (values - weight).abs()
    inside = (codes.codes[:, :inputs] > 0) & (codes.codes[:, :inputs] < 15)
    assert (error <= scale * 0.501)[inside].all()
    blocks = F.pad(weight, (0, filled)).unflatten(1, (-1, format.block))
    step = (blocks.amax(-1).clamp(min=0) - blocks.amin(-1).clamp(max=0)) / 15
    zero = (-blocks.amin(-1).clamp(max=0) / step).round()
    plain = ((blocks / step[..., None]).round() + zero[..., None]).clamp(0, 15) - zero[..., None]
    plain_error = (plain * step[..., None] - blocks).square().sum()
    assert error.square().sum() <= plain_error * (1 + 1e-2) + 1e-6 * size**2


@pytest.mark.parametrize("name", INT4)
def test_int4_keeps_what_was_int4(name):
    format = FORMATS[name]
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (6, 3, format.block), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 15  # a whole range
    zero = torch.randint(0, 16, (6, 3, 1), generator=generator)
    weight = ((codes - zero) * (torch.rand(6, 3, 1, generator=generator) + 0.1).half().float()).flatten(1)
    assert torch.equal(quantise(weight, format).values(), weight)
    zeros = torch.zeros(2, 70)
    assert torch.equal(quantise(zeros, format).values(), zeros)


@pytest.mark.parametrize("value", [1e6, torch.inf, torch.nan])
def test_int4_of_values_without_a_scale(value):
    with pytest.raises(ValueError, match="^weight must be finite and at most 4.91e[+]05 for int4_32, got"):
        quantise(torch.full((2, 40), value), FORMATS["int4_32"])
    with pytest.raises(ValueError, match="^format must be int4_32, int4_64 or int4_128, got q4_k"):
        quantise(torch.zeros(2, 40), FORMATS["q4_k"])
