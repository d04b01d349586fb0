"""gear_ragged and residual_vq_ragged: kernels that run together give the bits of those of each tree."""

import itertools

import pytest
import torch

from pyspec.ops import gear_encode, residual_vq_encode
from pyspec.ops.gear_format import GearFormat
from pyspec.ops.quantised_ragged import (
    gear_ragged,
    gear_ragged_reference,
    residual_vq_ragged,
    residual_vq_ragged_reference,
)
from tests.helpers.every_backend import each_kernel
from tests.helpers.quantisers import codebooks_of
from tests.helpers.rounds import random_tree

FORMAT = GearFormat(2, 64, rank=2, outliers=2)
SIZES = (9, 0, 40, 1)
gear = each_kernel(gear_ragged)
codes = each_kernel(residual_vq_ragged)


def rows_of(dtype, records=1):
    """Trees behind prefixes whose blocks their deeper nodes see quantised, one more than the root does."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, starts = sum(SIZES), [0, *itertools.accumulate(SIZES)]
    bits, seen = torch.zeros(rows, 2, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    for index, size in enumerate(SIZES):
        if size:
            tree = random_tree(size, index)
            words = torch.as_tensor(tree.ancestor_bits)
            bits[starts[index] : starts[index] + size, : words.shape[1]] = words
            seen[starts[index] : starts[index] + size] = 1 + (torch.as_tensor(tree.depths) > 2).int()
    numbers = (bits, seen, torch.tensor(starts, dtype=torch.int32), torch.tensor([150, 3, 200, 77], dtype=torch.int32))
    blocks = normal(2, len(SIZES), 2, 2 * records * 128, 64)
    return normal(rows, 4, 64), blocks, (normal(len(SIZES), 2, 300, 64), normal(len(SIZES), 2, 300, 64)), numbers


@pytest.mark.parametrize("records", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gear_has_the_bits_of_each_tree(gear, dtype, records):
    q, blocks, keys_values, numbers = rows_of(dtype, records)
    quantised = gear_encode(*blocks, FORMAT)
    found = gear(q, quantised, *keys_values, *numbers, FORMAT, span=128, records=records, scale=0.125)
    expected = gear_ragged_reference(q, quantised, *keys_values, *numbers, 128, records, *FORMAT.layout, 0.125)
    assert found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_have_the_bits_of_each_tree(codes, dtype):
    q, blocks, keys_values, numbers = rows_of(dtype)
    codebooks = codebooks_of()
    quantised = residual_vq_encode(*blocks, codebooks)
    found = codes(q, quantised, *keys_values, *numbers, codebooks, span=128, records=1, scale=0.125)
    expected = residual_vq_ragged_reference(q, quantised, *keys_values, *numbers, 128, 1, codebooks, 0.125)
    assert found.isfinite().all() and torch.equal(found, expected)


def test_what_does_not_fit(gear):
    q, blocks, keys_values, (bits, seen, starts, lens) = rows_of(torch.float32)
    quantised = gear_encode(*blocks, FORMAT)
    settings = {"format": FORMAT, "span": 128, "records": 1, "scale": 0.125}
    for wrong, message in (
        ((bits, seen + 2, starts, lens), r"seen\[0\] is 3, quantised has 2 records"),
        ((bits, seen, starts + 1, lens), "starts must go from 0 to 50"),
        ((bits, seen, starts, lens + 200), "tree 0 of 9 nodes does not fit at 350 in 300 slots"),
        ((bits[:, :1].contiguous(), seen, starts, lens), "tree 2 of 40 nodes does not fit"),
    ):
        with pytest.raises(ValueError, match=message):
            gear(q, quantised, *keys_values, *wrong, **settings)


def test_opcheck():
    q, blocks, keys_values, numbers = rows_of(torch.float32)
    quantised = gear_encode(*blocks, FORMAT)
    given = (q, quantised, *keys_values, *numbers, 128, 1, *FORMAT.layout, 0.125)
    torch.library.opcheck(torch.ops.pyspec.gear_ragged.default, given)
