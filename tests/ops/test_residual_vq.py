"""residual_vq: the quantised format read bit by bit, nearest codewords, and attention by float64 and the row rule."""

import os

import numpy as np
import pytest
import torch

import pyspec
from pyspec.ops import residual_vq_attention, residual_vq_decode, residual_vq_encode, rotary_of_blocks
from pyspec.ops.gear import BLOCK
from pyspec.ops.residual_vq import ResidualVqFormat, format_of, turn_keys
from tests.helpers.every_backend import KERNELS, each_runner
from tests.helpers.gear_formats import relative_error
from tests.helpers.quantisers import BOOKS, QUANTISERS, codebooks_of, frequencies_of, turned

HEAD_DIMS = (64, 96, 128, 256)
on_backend = each_runner("residual_vq", "residual_vq_encode")


def keys_values(tokens=2 * BLOCK, batch=1, heads=2, head_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, heads, tokens, head_dim, generator=generator).unbind(0)
    sizes = torch.randn(batch, heads, tokens, 1, generator=generator).exp()
    return (k * sizes).to(dtype), (v / sizes).to(dtype)


# ==== the format, read by its description in kernels/params/residual_vq.h and nothing else ====


def read_record(record: bytes, books: np.ndarray, head_dim: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Keys and values [128, D] in float64 of one record, and their codes [128, groups, depth]."""
    _, depth, count, _ = books.shape
    groups, at, found, all_codes = head_dim // 32, 0, [], []
    for side in range(2):
        scale = np.frombuffer(record[at : at + 256], "<f2").astype(float)
        at += 256
        x, codes = np.zeros((128, head_dim)), np.zeros((128, groups, depth), int)
        for group in range(groups):
            channels = range(32 * group, 32 * group + 32) if side else range(group, head_dim, groups)
            for level in range(depth):
                planes = {256: 0, 2048: 3}[count]
                size = 128 + 16 * planes
                part, at = record[at : at + size], at + size
                for token in range(128):
                    code = part[token]
                    for plane in range(planes):
                        code |= (part[128 + 16 * plane + token // 8] >> token % 8 & 1) << 8 + plane
                    codes[token, group, level] = code
                    x[token, list(channels)] += books[side, level, code]
        found.append(x * scale[:, None])
        all_codes.append(codes)
    assert 0 <= len(record) - at < 64 and len(record) % 64 == 0 and not any(record[at:])
    return found, all_codes


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_records_are_as_described(name, head_dim):
    k, v = keys_values(BLOCK, heads=1, head_dim=head_dim)
    quantised = residual_vq_encode(k, v, BOOKS[name])
    assert quantised.shape == (1, 1, 1, format_of(BOOKS[name]).record_bytes(head_dim))
    expected, _ = read_record(quantised.numpy().tobytes(), BOOKS[name].double().numpy(), head_dim)
    for found, x in zip(residual_vq_decode(quantised, BOOKS[name], head_dim), expected, strict=True):
        np.testing.assert_allclose(found[0, 0].double().numpy(), x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["256", "2048"])
def test_each_code_is_the_nearest(on_backend, name):
    """Brute force in float64 over what the codes before left; a tie in fp32 may go either way."""
    books, (k, v) = BOOKS[name], keys_values(BLOCK, heads=1)
    record = on_backend(residual_vq_encode, k, v, books).numpy().tobytes()
    _, codes = read_record(record, books.double().numpy(), 64)
    for side, x in enumerate((k, v)):
        scale = np.frombuffer(record, "<f2", 128, side * (len(record) // 2)).astype(float)
        assert np.allclose(scale, x[0, 0].std(-1).half().double().numpy(), rtol=1e-3)
        left = x[0, 0].double().numpy() / scale[:, None]
        left = left.reshape(128, 2, 32) if side else left.reshape(128, 32, 2).transpose(0, 2, 1)
        for level, words in enumerate(books[side].double().numpy()):
            distances = np.square(left[:, :, None] - words).sum(-1)
            code = codes[side][:, :, level]
            own = np.take_along_axis(distances, code[..., None], -1)[..., 0]
            assert (own <= distances.min(-1) * (1 + 1e-5) + 1e-6).all()
            assert (code == distances.argmin(-1)).mean() > 0.995
            left = left - words[code]


@pytest.mark.parametrize("head_dim, dtype", [*((d, torch.float32) for d in HEAD_DIMS), (64, torch.bfloat16)], ids=str)
def test_backends_lay_out_the_same(on_backend, head_dim, dtype):
    """But for ties, which sums of another order decide otherwise."""
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in keys_values(BLOCK, 2, 1, head_dim, dtype))
    for books in (BOOKS["256"], codebooks_of(3, 2048, batch=2)):
        found = on_backend(residual_vq_encode, k, v, books)
        with pyspec.backend("reference"):
            expected = residual_vq_encode(k, v, books)
        assert (found == expected).float().mean() > 0.995
        decoded = [residual_vq_decode(quantised, books, head_dim) for quantised in (found, expected)]
        for ours, theirs, x in zip(*decoded, (k, v), strict=True):
            assert relative_error(ours, x) < relative_error(theirs, x) * 1.005


def test_the_error_falls_with_depth(on_backend):
    k, v = keys_values(BLOCK)
    errors = []
    for depth in range(1, 7):
        books = codebooks_of(6)[:, :depth]
        found = residual_vq_decode(on_backend(residual_vq_encode, k, v, books), books, 64)
        errors.append([relative_error(x, exact) for x, exact in zip(found, (k, v), strict=True)])
    for before, after in zip(errors, errors[1:], strict=False):
        assert after[0] < before[0] and after[1] < before[1]


def test_a_vector_without_deviation_has_scale_one(on_backend):
    k = torch.zeros(1, 1, BLOCK, 64)
    k[0, 0, 1] = 3.0
    quantised = on_backend(residual_vq_encode, k, k, BOOKS["256"])
    scale = quantised[0, 0, 0, :256].view(torch.float16)
    assert (scale == 1).all()


def test_large_values_stay_finite(on_backend):
    k = torch.full((1, 1, BLOCK, 64), 65504.0)
    k[..., ::2] = -65504.0
    quantised = on_backend(residual_vq_encode, k, k, BOOKS["256"])
    assert all(x.isfinite().all() for x in residual_vq_decode(quantised, BOOKS["256"], 64))


def test_tokens_do_not_depend_on_each_other(on_backend):
    k, v = keys_values(2 * BLOCK, batch=2)
    books = codebooks_of(4, batch=2)
    quantised = on_backend(residual_vq_encode, k, v, books)
    for b, head, block in ((0, 0, 1), (1, 1, 0)):
        parts = [x[b, head, block * BLOCK :][:BLOCK][None, None] for x in (k, v)]
        alone = on_backend(residual_vq_encode, *parts, books[b])
        if os.environ.get("PYSPEC_ISA"):
            assert torch.equal(alone[0, 0, 0], quantised[b, head, block])
            parts[0][..., 3, :] = 7.0
            other = on_backend(residual_vq_encode, *parts, books[b])
            codes = [x[0, 0, 0, 256 : 256 + 1024].view(8, 128) for x in (other, alone)]
            assert torch.equal(codes[0][:, 4:], codes[1][:, 4:])


# ==== keys before rotary embedding ====


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_keys_are_turned_to_their_positions_and_back(head_dim):
    """Against pairs as complex numbers in float64, whatever part of a text they are."""
    k = torch.randn(2, 5 * BLOCK, head_dim, generator=torch.Generator().manual_seed(head_dim))
    rotary = rotary_of_blocks(frequencies_of(head_dim), 6)
    torch.testing.assert_close(turn_keys(k, rotary).double(), turned(k), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(turn_keys(k, rotary, back=True).double(), turned(k, back=True), atol=2e-6, rtol=2e-6)
    for block in (0, 3):
        part = k[:, block * BLOCK :][:, : BLOCK + 7]
        assert torch.equal(turn_keys(part, rotary, block), turn_keys(k, rotary)[:, block * BLOCK :][:, : BLOCK + 7])


def test_attention_to_keys_of_the_other_kind_is_another(on_backend):
    """The op cannot know what records hold: rotary says it, and it counts."""
    quantiser = QUANTISERS["pre-rope codes 256"]
    case, quantised, k, v = quantiser.case([700], [3])
    right = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens)
    wrong = on_backend(residual_vq_attention, case.q, quantised, k, v, case.bits, case.lens, BOOKS["256"])
    assert (right - wrong).abs().max() > 0.05


def test_rotary_that_does_not_fit_is_named():
    case, quantised, k, v = QUANTISERS["pre-rope codes 256"].case([600], [2])
    good = rotary_of_blocks(frequencies_of(64), quantised.shape[2])
    args = (case.q, quantised, k, v, case.bits, case.lens, BOOKS["256"])
    residual_vq_attention(*args, rotary=good)
    for wrong, error, message in (
        (good.double(), TypeError, "rotary must be float32, got torch.float64"),
        (good[:-1], ValueError, r"rotary must be contiguous \[128 \+ blocks, 2, 32\] for 4 blocks and head_dim 64"),
        (rotary_of_blocks(frequencies_of(128), 9), ValueError, "rotary must be .* got shape .137, 2, 64."),
        (good.transpose(0, 1).contiguous().transpose(0, 1), ValueError, "rotary must be contiguous"),
        (good[:, 0], ValueError, "rotary must be"),
    ):
        with pytest.raises(error, match=message):
            residual_vq_attention(*args, rotary=wrong)
    if KERNELS:
        seen = torch.ones(1, 2, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="rotary must be contiguous float32"):
            torch.ops.pyspec.residual_vq(case.q, quantised, seen, BOOKS["256"], 0.125, good[:-1])


# ==== the ops as torch sees them ====


@pytest.mark.parametrize("name", ["256", "2048"])
def test_opcheck(name):
    books, (k, v) = BOOKS[name], keys_values()
    torch.library.opcheck(torch.ops.pyspec.residual_vq_encode.default, (k, v, books[None]))
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    quantised = residual_vq_encode(k, v, books)
    torch.library.opcheck(torch.ops.pyspec.residual_vq.default, (q, quantised, seen, books, 0.125))
    rotary = rotary_of_blocks(frequencies_of(64), 2)
    torch.library.opcheck(torch.ops.pyspec.residual_vq.default, (q, quantised, seen, books, 0.125, rotary))


def test_compiles_as_one_graph():
    books, (k, v) = BOOKS["256"], keys_values()
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)

    def step(q, k, v, seen):
        quantised = torch.ops.pyspec.residual_vq_encode(k * 1, v, books[None])
        return torch.ops.pyspec.residual_vq(q * 2, quantised, seen, books, 0.125)[0].sum(-1)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, seen), step(q, k, v, seen))


# ==== bad input ====


def test_formats_that_do_not_exist():
    k, v = keys_values()
    for fields, message in (
        ({"depth": 0}, r"depth must be in \[1, 16\], got 0"),
        ({"depth": 17}, "depth"),
        ({"codes": 512}, r"codes must be one of \(256, 2048\), got 512"),
    ):
        with pytest.raises(ValueError, match=message):
            ResidualVqFormat(**fields)
    with pytest.raises(ValueError, match="head_dim must be one of .64, 96, 128, 256., got 80"):
        residual_vq_encode(torch.zeros(1, 1, BLOCK, 80), torch.zeros(1, 1, BLOCK, 80), BOOKS["256"])
    for books, error, message in (
        (BOOKS["256"].float(), TypeError, "codebooks must be float16"),
        (BOOKS["256"][:1], ValueError, r"codebooks must be \[2, depth, codes, 32\], got shape"),
        (BOOKS["256"][..., :16], ValueError, "codebooks must be"),
        (BOOKS["256"][:, :, :100], ValueError, "codes must be one of"),
        (codebooks_of(batch=3), ValueError, "one for all, or one for each of 1, got 3"),
    ):
        with pytest.raises(error, match=message):
            residual_vq_encode(k, v, books)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e5])
@pytest.mark.parametrize("name", ["k", "v"])
def test_values_that_cannot_be_quantised_are_named(value, name):
    tensors = dict(zip("kv", keys_values(batch=2), strict=True))
    tensors[name][1, 1, 200, 7] = value
    with pytest.raises(ValueError, match=f"{name} must hold values .* sequence 1, head 1, position 200, channel 7"):
        residual_vq_encode(tensors["k"], tensors["v"], BOOKS["256"])


def test_records_of_other_codebooks_are_refused():
    case, quantised, k, v = QUANTISERS["codes 256"].case([300], [4])
    for books, field in ((codebooks_of(5), "depth=5"), (BOOKS["2048"], "codes=2048")):
        with pytest.raises(ValueError, match=f"quantised must be .*{field}"):
            residual_vq_attention(case.q, quantised, k, v, case.bits, case.lens, books)
