"""gear_ragged and residual_vq_ragged: kernels that run together give the bits of those of each tree."""

import itertools

import pytest
import torch

from pyspec.ops import gear_decode, gear_encode, residual_vq_decode, residual_vq_encode, rotary_of_blocks
from pyspec.ops.gear_format import GearFormat
from pyspec.ops.quantised_ragged import (
    gear_ragged,
    gear_ragged_reference,
    residual_vq_ragged,
    residual_vq_ragged_reference,
)
from pyspec.ops.residual_vq import turn_keys
from tests.helpers.every_backend import each_kernel
from tests.helpers.quantisers import TOLERANCE, codebooks_of
from tests.helpers.rounds import random_tree

FORMAT = GearFormat(2, 64, rank=2, outliers=2)
SIZES = (9, 0, 40, 1)
gear = each_kernel(gear_ragged, "gear")
codes = each_kernel(residual_vq_ragged, "residual_vq")


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


# ==== windows ====


def in_float64(q, decoded, keys_values, numbers, window):
    """Attention of ragged rows within a window, by decoded and exact keys in one row of positions."""
    bits, seen, starts, lens = numbers
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        base = int(seen[first]) * 128 if end > first else 0
        for row in range(first, end):
            ancestors = [node for node in range(end - first) if int(bits[row, node // 32]) >> node % 32 & 1]
            position, blocks = base + int(lens[b]) + len(ancestors) - 1, int(seen[row]) * 128
            # where the keys lie, and at which positions
            exact = [(slot, base + slot) for slot in range(int(lens[b])) if base + slot >= blocks]
            exact += [(int(lens[b]) + node, base + int(lens[b]) + depth) for depth, node in enumerate(ancestors)]
            slots = [slot for slot, at in exact if at > position - window]
            begin = min(max(position - window + 1, 0), blocks)
            for head in range(q.shape[1]):
                k, v = (
                    torch.cat([quantised[b, head // 2, begin:blocks], x[b, head // 2, slots].double()])
                    for quantised, x in zip(decoded, keys_values, strict=True)
                )
                out[row, head] = (k @ q[row, head].double() * 0.125).softmax(0) @ v
    return out


WINDOWS = (1, 60, 130, 190, 260, 10**6)  # of some, a row sees no block, or a part of one; the last hides nothing


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gear_within_a_window(gear, dtype, window):
    q, blocks, keys_values, numbers = rows_of(dtype)
    quantised = gear_encode(*blocks, FORMAT)
    found = gear(q, quantised, *keys_values, *numbers, FORMAT, span=128, records=1, scale=0.125, window=window)
    expected = gear_ragged_reference(q, quantised, *keys_values, *numbers, 128, 1, *FORMAT.layout, 0.125, window)
    assert torch.equal(found, expected)
    decoded = [x.double() for x in gear_decode(quantised, FORMAT, 64)]
    right = in_float64(q, decoded, keys_values, numbers, window)
    torch.testing.assert_close(found.double(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pre_rope", [False, True])
def test_codes_within_a_window(codes, window, pre_rope):
    q, blocks, keys_values, numbers = rows_of(torch.float32)
    codebooks, rotary = codebooks_of(), rotary_of_blocks(1e4 ** -torch.arange(0, 1, 1 / 32), 2) if pre_rope else None
    quantised = residual_vq_encode(*blocks, codebooks)
    options = {"span": 128, "records": 1, "scale": 0.125, "rotary": rotary, "window": window}
    found = codes(q, quantised, *keys_values, *numbers, codebooks, **options)
    arguments = (q, quantised, *keys_values, *numbers, 128, 1, codebooks, 0.125, rotary, window)
    assert torch.equal(found, residual_vq_ragged_reference(*arguments))
    k, v = residual_vq_decode(quantised, codebooks, 64)
    decoded = [(turn_keys(k, rotary) if pre_rope else k).double(), v.double()]
    right = in_float64(q, decoded, keys_values, numbers, window)
    torch.testing.assert_close(found.double(), right, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("blocks, oldest", [(70, 40 * 128 + 5), (70, 69 * 128 + 127), (9, 1000), (40, 31 * 128)])
def test_blocks_outside_of_a_window_do_not_count(blocks, oldest):
    """A row has the bits of one beside others, and those of a text without what it does not see."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, tokens, 64, generator=generator) for tokens in (9, blocks * 128, blocks * 128))
    for encode, attend, format in (
        (gear_encode, lambda *a: torch.ops.pyspec.gear(*a[:3], *FORMAT.layout, 0.125, *a[3:]), FORMAT),
        (residual_vq_encode, lambda *a: torch.ops.pyspec.residual_vq(*a[:3], codebooks_of(), 0.125, None, *a[3:]),
         codebooks_of()),
    ):  # fmt: skip
        quantised = encode(k, v, format)
        seen = torch.full((1, 9), blocks, dtype=torch.int32)
        all_oldest = torch.tensor([[oldest, 0, 7, oldest // 2, oldest, 0, 128, 10**7, oldest - 1]], dtype=torch.int32)
        found = attend(q, quantised, seen, all_oldest)
        for row in range(9):
            alone = attend(q[:, :, row, None], quantised, seen[:, :1], all_oldest[:, row, None])
            assert all(torch.equal(x[:, :, row], y[:, :, 0]) for x, y in zip(found, alone, strict=True))
        assert not found[0][:, :, 7].any() and (found[1][:, :, 7] == -torch.inf).all()
        broken = quantised.clone()
        broken[:, :, : oldest // 128] = 255
        there = attend(q[:, :, :1], broken, seen[:, :1], all_oldest[:, :1])
        assert all(torch.equal(x[:, :, 0], y[:, :, 0]) for x, y in zip(found, there, strict=True))


def test_a_window_that_does_not_fit_is_refused(gear):
    q, blocks, keys_values, numbers = rows_of(torch.float32)
    quantised = gear_encode(*blocks, FORMAT)
    for window, span in ((0, 128), (-1, 128), (7, 256)):
        with pytest.raises(ValueError, match=f"window must be positive, .*, got {window} over blocks of {span} tokens"):
            gear(q, quantised, *keys_values, *numbers, FORMAT, span=span, records=1, scale=0.125, window=window)


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
