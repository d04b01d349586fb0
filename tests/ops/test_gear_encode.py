"""gear_encode: records read bit by bit, their errors, what is refused."""

import os

import numpy as np
import pytest
import torch

import pyspec
from pyspec.ops import GearFormat, gear_decode, gear_encode
from pyspec.ops.gear_format import BLOCK
from pyspec.ops.tree_attention import HEAD_DIMS
from tests.helpers.every_backend import each_runner
from tests.helpers.gear_formats import FORMATS, KIVI, PRUNED, channels_of, formats_for, keys_values, relative_error

on_backend = each_runner("gear_encode")


# ==== the format, read by its description in kernels/params/gear.h and nothing else ====


TOKENS = range(0, BLOCK, 9)  # that are read so: it is slow


def read_record(record: bytes, f: GearFormat, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values [TOKENS, D] in float64 of one record, bit by bit."""
    at = 0

    def take(dtype, *shape):
        nonlocal at
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        at += size
        return np.frombuffer(record[at - size : at], dtype).reshape(shape)

    found = []
    whole_head = head_dim
    for values in (False, True):
        head_dim = whole_head if values or not f.key_channels else f.key_channels
        width = min(f.group, head_dim)
        vectors = BLOCK if values else head_dim
        groups = head_dim // width if values else BLOCK // f.group
        scale, zero = take("<f2", groups, vectors).astype(float), take("<f2", groups, vectors).astype(float)
        halves = []
        for _ in range(2):
            planes = {}
            for plane in (2, 1) if f.bits == 3 else (f.bits,):
                share = 16 // plane
                planes[plane] = share, take("<u2", 2 * head_dim // share, 32)
            halves.append(planes)
        factor, a, b = take("<f4", f.rank), take("i1", f.rank, BLOCK), take("i1", f.rank, head_dim)
        outliers = (take("<u2", f.outliers, vectors).astype(np.uint32) << 16).view(np.float32)
        indices = take("u1", f.outliers, vectors)
        channels = take("u1", 0 if values else f.key_channels)
        x = np.empty((len(TOKENS), head_dim))
        for row, token in enumerate(TOKENS):
            for channel in range(head_dim):
                t = token % 64
                if values:
                    vector, lane = t // 2 * (head_dim // 16) + channel // 16, 2 * (channel % 16) + t % 2
                    where = channel // width, token
                else:
                    vector, lane = channel // 2 * 4 + t // 16, 2 * (t % 16) + channel % 2
                    where = token // f.group, channel
                code, low = 0, 0
                for plane, (share, words) in halves[token // 64].items():
                    bits = int(words[vector // share, lane]) >> plane * (vector % share) & (1 << plane) - 1
                    code, low = code | bits << low, low + plane
                own, other = (token, channel) if values else (channel, token)
                for o in range(f.outliers):
                    if indices[o, own] == other:
                        code = ((1 << f.bits) - 1) / 2 + float(outliers[o, own])
                x[row, channel] = zero[where] + scale[where] * code
                x[row, channel] += sum(
                    float(factor[r]) * float(a[r, token]) * float(b[r, channel]) for r in range(f.rank)
                )
        if len(channels):
            kept, x = x, np.zeros((len(TOKENS), whole_head))
            x[:, channels] = kept
        found.append(x)
    assert 0 <= len(record) - at < 64 and len(record) % 64 == 0 and not any(record[at:])
    return found[0], found[1]


@pytest.mark.parametrize("head_dim", [64, 80])
def test_records_are_as_described(head_dim):
    k, v = keys_values(head_dim=head_dim, heads=1, tokens=BLOCK)
    for name, format in formats_for(head_dim):
        quantised = gear_encode(k, v, format)
        assert quantised.shape == (1, 1, 1, format.record_bytes(head_dim))
        keys, values = read_record(quantised.numpy().tobytes(), format, head_dim)
        for found, expected in zip(gear_decode(quantised, format, head_dim), (keys, values), strict=True):
            found = found[0, 0, list(TOKENS)].double().numpy()
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=name)
        error = relative_error(torch.from_numpy(keys), k[0, 0, list(TOKENS)])
        assert error < {2: 0.5, 3: 0.2, 4: 0.1, 8: 0.01}[format.bits], name


@pytest.mark.parametrize("name", PRUNED)
def test_records_of_some_channels(on_backend, name):
    """Smaller, not emptier: the keys that are kept are quantised as if there were no others."""
    format, (k, v) = PRUNED[name], keys_values(BLOCK, heads=1)
    channels = channels_of(k, format)
    quantised = on_backend(gear_encode, k, v, format, channels)
    whole = GearFormat(format.bits, format.group, format.rank, format.outliers, fitted=format.fitted)
    assert quantised.shape[3] <= whole.record_bytes(64) - (64 - format.key_channels) * 16 * format.bits + 128
    keys, values = read_record(quantised.numpy().tobytes(), format, 64)
    for found, expected in zip(gear_decode(quantised, format, 64), (keys, values), strict=True):
        np.testing.assert_allclose(found[0, 0, list(TOKENS)].numpy(), expected, rtol=1e-5, atol=1e-5)
    kept = channels[0, 0, 0].long()
    rest = [c for c in range(64) if c not in kept.tolist()]
    assert not keys[:, rest].any() and len(rest) == 64 - format.key_channels
    error = relative_error(torch.from_numpy(keys[:, kept]), k[0, 0, list(TOKENS)][:, kept])
    assert error < {2: 0.4, 3: 0.25, 4: 0.1, 8: 0.01}[format.bits]
    if not format.rank and not format.fitted:
        with pyspec.backend("reference"):
            assert torch.equal(quantised, gear_encode(k, v, format, channels))


@pytest.mark.parametrize(
    "head_dim, dtype", [*((d, torch.float32) for d in HEAD_DIMS), (64, torch.float16), (64, torch.bfloat16)], ids=str
)
def test_backends_lay_out_the_same(on_backend, head_dim, dtype):
    """Backbone and outliers to the byte; what is fitted, whose sums have an order of their own, in its error."""
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in keys_values(BLOCK, 2, 1, head_dim, dtype))
    for name, format in formats_for(head_dim):
        found = on_backend(gear_encode, k, v, format)
        with pyspec.backend("reference"):
            expected = gear_encode(k, v, format)
        if not format.rank and not format.fitted:
            assert torch.equal(found, expected), name
        decoded = [gear_decode(quantised, format, head_dim) for quantised in (found, expected)]
        for ours, theirs, x in zip(*decoded, (k, v), strict=True):
            assert relative_error(ours, x) < relative_error(theirs, x) * 1.01 + 1e-4, name


# ==== errors ====

GAUSSIAN = {  # specs: relative errors of min-max quantisation on N(0, 1)
    2: {32: 0.393, 64: 0.450, 128: 0.501},
    3: {32: 0.168, 64: 0.193, 128: 0.214},
    4: {32: 0.078, 64: 0.090, 128: 0.100},
    8: {32: 0.0046, 64: 0.0053, 128: 0.0059},
}


@pytest.mark.parametrize("bits", GAUSSIAN)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_gaussian_errors(bits, group):
    k, v = torch.randn(2, 1, 4, 8 * BLOCK, 128, generator=torch.Generator().manual_seed(bits)).unbind(0)
    format = GearFormat(bits, group)
    for found, x in zip(gear_decode(gear_encode(k, v, format), format, 128), (k, v), strict=True):
        assert relative_error(found, x) == pytest.approx(GAUSSIAN[bits][group], rel=0.03)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("scale, offset", [(1, 0), (1e-3, 0), (1e4, 0), (0.01, 100), (1, -3e4)])
def test_the_backbone_is_half_a_step_off_at_most(bits, scale, offset):
    k, v = (x * scale + offset for x in torch.randn(2, 1, 2, BLOCK, 64).unbind(0))
    format = GearFormat(bits, 64)
    found_k, found_v = gear_decode(gear_encode(k, v, format), format, 64)
    levels = (1 << bits) - 1
    for found, x, dim in ((found_k, k, 2), (found_v, v, 3)):
        groups, found = x.unflatten(dim, (-1, 64)), found.unflatten(dim, (-1, 64))
        extent = groups.amax(dim + 1, keepdim=True) - groups.amin(dim + 1, keepdim=True)
        zero_step = groups.abs().amax(dim + 1, keepdim=True) * 2.0**-10  # fp16
        step = ((extent + zero_step) / levels * (1 + 2.0**-10)).clamp_min(2.0**-14)
        assert ((found - groups).abs() <= step / 2 + 1e-5 * groups.abs()).all()


def test_values_that_are_all_the_same_stay(on_backend):
    k = torch.tensor([0.0, -0.0, 1.5, -3.0]).repeat(16).expand(1, 1, BLOCK, 64).contiguous()
    v = k.transpose(2, 3).repeat(1, 1, 2, 1)[..., :64].contiguous()  # each token is one number
    k[0, 0, 77, 2] = 40.0  # an outlier where the backbone has no range
    for name, format in formats_for(64):
        found_k, found_v = gear_decode(on_backend(gear_encode, k, v, format), format, 64)
        torch.testing.assert_close(found_v, v, atol=1e-3, rtol=0, msg=name)
        if format.outliers:
            torch.testing.assert_close(found_k, k, atol=1e-3, rtol=4e-3, msg=name)


def test_outliers_are_the_largest_and_smallest_of_a_vector(on_backend):
    generator = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 1, 1, BLOCK, 64, generator=generator).unbind(0)
    spikes = [(5, 3, 90.0), (100, 3, -80.0), (64, 3, -70.0), (0, 3, 60.0), (127, 63, 50.0), (9, 63, -50.0)]
    for token, channel, value in spikes:
        k[0, 0, token, channel] = v[0, 0, token, channel] = value
    format = GearFormat(2, 64, outliers=4)
    for found, x in zip(gear_decode(on_backend(gear_encode, k, v, format), format, 64), (k, v), strict=True):
        for token, channel, value in spikes:
            assert float(found[0, 0, token, channel]) == pytest.approx(value, rel=5e-3)
        rest = torch.ones(BLOCK, 64, dtype=torch.bool)
        for token, channel, _ in spikes:
            rest[token, channel] = False
        # and the others as if the spikes were not there
        assert (found - x)[0, 0][rest].abs().max() < 1.1


def test_low_rank_is_the_best_of_its_rank(on_backend):
    """Against numpy's singular values of what the backbone leaves."""
    generator = torch.Generator().manual_seed(1)
    planted = torch.randn(BLOCK, 3, generator=generator) @ torch.randn(3, 64, generator=generator)
    k, v = planted + torch.randn(2, 1, 1, BLOCK, 64, generator=generator)
    for rank in (1, 2, 4, 8):
        plain, format = GearFormat(2, 64), GearFormat(2, 64, rank=rank)
        without = gear_decode(on_backend(gear_encode, k, v, plain), plain, 64)
        found = gear_decode(on_backend(gear_encode, k, v, format), format, 64)
        for x, base, ours in zip((k, v), without, found, strict=True):
            singular = np.linalg.svd((x - base)[0, 0].double().numpy(), compute_uv=False)
            best = np.sqrt((singular[rank:] ** 2).sum())
            assert best <= float((x - ours).norm()) * (1 + 1e-3) and float((x - ours).norm()) < best * 1.05


def test_a_residual_of_lower_rank_is_not_counted_twice(on_backend):
    k = torch.zeros(1, 1, BLOCK, 64)
    k[0, 0, :, ::3] = torch.where(torch.arange(BLOCK) % 2 == 0, 1.0, 0.4)[:, None]
    k[0, 0, :2, ::3] = torch.tensor([[0.0], [3.0]])
    format = GearFormat(2, 64, rank=4)
    found, _ = gear_decode(on_backend(gear_encode, k, k, format), format, 64)
    without, _ = gear_decode(on_backend(gear_encode, k, k, KIVI), KIVI, 64)
    assert relative_error(without, k) > 0.1 and relative_error(found, k) < 0.02


def test_structured_keys():
    """The specs' synthetic keys: outlier channels, low rank and spikes. Each part of GEAR must help."""
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(1, 1, 8 * BLOCK, 128, generator=generator)
    k += torch.randn(8 * BLOCK, 4, generator=generator) @ torch.randn(4, 128, generator=generator)
    k[..., ::32] *= 8
    k += 12 * torch.randn(k.shape, generator=generator) * (torch.rand(k.shape, generator=generator) < 0.002)
    error = {
        (rank, outliers): relative_error(gear_decode(gear_encode(k, k, f), f, 128)[0], k)
        for rank in (0, 4)
        for outliers in (0, 2)
        for f in [GearFormat(2, 64, rank, outliers)]
    }
    assert error[4, 2] < error[4, 0] < error[0, 0] and error[4, 2] < error[0, 2] < error[0, 0]
    assert error[4, 2] < 0.8 * error[0, 0]


@pytest.mark.parametrize("bits, group, most", [(2, 64, 0.80), (3, 64, 0.90), (4, 128, 0.95), (8, 128, 1.0)])
def test_fitted_ranges_err_less(on_backend, bits, group, most):
    """On Gaussians, where 2 bits can have at best 0.343 of the length (Lloyd-Max) and min-max has 0.45."""
    k, v = torch.randn(2, 1, 2, 2 * BLOCK, 64, generator=torch.Generator().manual_seed(1)).unbind(0)
    plain, fitted = GearFormat(bits, group), GearFormat(bits, group, fitted=True)
    for found, other, x in zip(
        gear_decode(on_backend(gear_encode, k, v, fitted), fitted, 64),
        gear_decode(on_backend(gear_encode, k, v, plain), plain, 64),
        (k, v),
        strict=True,
    ):
        assert relative_error(found, x) <= most * relative_error(other, x)


def test_low_rank_and_backbone_are_fitted_to_each_other(on_backend):
    k, v = keys_values(BLOCK)
    errors = {}
    for rank, outliers in ((0, 0), (4, 0), (4, 2)):
        for fitted in (False, True):
            f = GearFormat(2, 64, rank, outliers, fitted=fitted)
            decoded = gear_decode(on_backend(gear_encode, k, v, f), f, 64)
            errors[rank, outliers, fitted] = [relative_error(x, y) for x, y in zip(decoded, (k, v), strict=True)]
    for side in (0, 1):
        backbone = errors[0, 0, False][side]
        assert errors[4, 0, True][side] < 0.65 * backbone and errors[4, 2, True][side] < 0.57 * backbone
        assert errors[4, 0, True][side] < 0.92 * errors[0, 0, True][side]


@pytest.mark.parametrize("scale, offset", [(1e-5, 0), (3e4, 0), (1e-3, 6e4), (1, -6.4e4)])
def test_fitted_ranges_stay_in_fp16(on_backend, scale, offset):
    k, v = (x.clamp(-2, 2) * scale + offset for x in torch.randn(2, 1, 1, BLOCK, 64).unbind(0))
    format = GearFormat(2, 64, rank=2, outliers=2, fitted=True)
    for found, x in zip(gear_decode(on_backend(gear_encode, k, v, format), format, 64), (k, v), strict=True):
        assert found.isfinite().all() and (found - x).abs().max() <= 1.5 * scale + 2e-3 * abs(offset) + 1e-4


@pytest.mark.parametrize("name", ["kivi", "gear", "gear-3bit"])
def test_blocks_do_not_depend_on_each_other(on_backend, name):
    """The published CUDA code gives every batch item the low-rank part of the first."""
    format, (k, v) = FORMATS[name], keys_values(tokens=2 * BLOCK, batch=2)
    quantised = on_backend(gear_encode, k, v, format)
    for b, head, block in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1)):
        parts = [x[b, head, block * BLOCK :][:BLOCK][None, None] for x in (k, v)]
        alone = on_backend(gear_encode, *parts, format)
        if os.environ.get("PYSPEC_ISA"):
            assert torch.equal(alone[0, 0, 0], quantised[b, head, block])
        record = quantised[b, head, block][None, None, None]
        for found, expected in zip(gear_decode(alone, format, 64), gear_decode(record, format, 64), strict=True):
            assert relative_error(found, expected) < 1e-2


# ==== bad input ====


@pytest.mark.parametrize(
    "fields, error, message",
    [
        ({"bits": 5}, ValueError, r"bits must be one of \(2, 3, 4, 8\), got 5"),
        ({"bits": 4.0}, TypeError, "bits must be an integer, got 4.0"),
        ({"bits": True}, TypeError, "bits must be an integer"),
        ({"group": 48}, ValueError, r"group must be one of .*, got 48"),
        ({"rank": -1}, ValueError, r"rank must be in \[0, 16\], got -1"),
        ({"rank": 17}, ValueError, "rank"),
        ({"outliers": 3}, ValueError, r"outliers must be an even number in \[0, 16\], got 3"),
        ({"outliers": 18}, ValueError, "outliers"),
        ({"key_channels": 24}, ValueError, "key_channels must be 0 or a multiple of 16, got 24"),
        ({"key_channels": -16}, ValueError, "key_channels must be 0 or a multiple of 16"),
        ({"fitted": None}, TypeError, "fitted must be True or False, got None"),
    ],
)
def test_formats_that_do_not_exist(fields, error, message):
    with pytest.raises(error, match=message):
        GearFormat(**fields)


def test_formats_that_do_not_fit_the_head():
    k, v = keys_values(head_dim=96)
    with pytest.raises(ValueError, match="group must divide the head_dim 96 or be at least as large, got 64"):
        gear_encode(k, v, GearFormat(4, 64))
    with pytest.raises(ValueError, match="key_channels must be below the head_dim 96, got 96"):
        gear_encode(k, v, GearFormat(4, 32, key_channels=96))
    with pytest.raises(ValueError, match="head_dim must be one of"):
        gear_encode(k[..., :48].contiguous(), v[..., :48].contiguous(), KIVI)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e5])
@pytest.mark.parametrize("name", ["k", "v"])
def test_values_that_cannot_be_quantised_are_named(value, name):
    tensors = dict(zip("kv", keys_values(batch=2), strict=True))
    tensors[name][1, 1, 200, 7] = value
    with pytest.raises(ValueError, match=f"{name} must hold values .* sequence 1, head 1, position 200, channel 7"):
        gear_encode(tensors["k"], tensors["v"], KIVI)
    tensors[name][1, 1, 200, 7] = 65504
    gear_encode(tensors["k"], tensors["v"], KIVI)


def test_channels_that_do_not_fit_are_named():
    (k, v), format = keys_values(), PRUNED["channels"]
    channels = channels_of(k, format)
    gear_encode(k, v, format, channels)
    for wrong, message in (
        (None, r"channels must have shape \(1, 2, 2, 48\) for GearFormat.*, got None"),
        (channels[..., :32], r"channels must have shape .*, got \(1, 2, 2, 32\)"),
        (channels.int(), "channels must be uint8 below the head_dim 64, got torch.int32"),
        (channels + 1, "channels must be uint8 below the head_dim 64"),
    ):
        with pytest.raises(ValueError, match=message):
            gear_encode(k, v, format, wrong)
    with pytest.raises(ValueError, match=r"channels must have shape \(1, 2, 2, 0\)"):
        gear_encode(k, v, KIVI, channels)


def test_encode_names_what_does_not_fit():
    k, v = keys_values()
    for args, error, message in (
        ((k.double(), v), TypeError, "k must be float32"),
        ((k, v.half()), ValueError, "v must be like k"),
        ((k, v[:, :1]), ValueError, "v must be like k"),
        ((k[:, :, :100], v[:, :, :100]), ValueError, "k must have a multiple of 128 tokens, got 100"),
        ((k.transpose(2, 3), v.transpose(2, 3)), ValueError, "k must have 4 dimensions, the last contiguous"),
    ):
        with pytest.raises(error, match=message):
            gear_encode(*args, KIVI)
