"""residual_vq: the packed format read bit by bit, nearest codewords, and attention by float64 and the row rule."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tree_attention import available_instruction_sets, make_case, path_to

import pyspec
from pyspec.ops import residual_vq_attention, residual_vq_decode, residual_vq_encode, tree_attention
from pyspec.ops.gear import BLOCK, blocks_seen
from pyspec.ops.residual_vq import ResidualVqFormat, format_of

BACKENDS = ["reference", *available_instruction_sets()]
HEAD_DIMS = (64, 96, 128, 256)


@pytest.fixture(params=BACKENDS)
def on_backend(request, monkeypatch):
    """Runs a function on one backend or instruction set."""
    if request.param == "reference":

        def call(function, *args, **options):
            with pyspec.backend("reference"):
                return function(*args, **options)

        return call
    monkeypatch.setenv("PYSPEC_ISA", request.param)
    return lambda function, *args, **options: function(*args, **options)


def codebooks_of(depth=4, codes=256, batch=None, seed=0):
    """Random codewords that shrink with their level, as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    front = () if batch is None else (batch,)
    words = torch.randn(*front, 2, depth, codes, 32, generator=generator)
    return (words * 0.8 * 0.8 ** torch.arange(depth)[:, None, None]).half()


BOOKS = {"256": codebooks_of(), "deep": codebooks_of(9), "2048": codebooks_of(3, 2048)}


def keys_values(tokens=2 * BLOCK, batch=1, heads=2, head_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, batch, heads, tokens, head_dim, generator=generator).unbind(0)
    sizes = torch.randn(batch, heads, tokens, 1, generator=generator).exp()
    return (k * sizes).to(dtype), (v / sizes).to(dtype)


def relative_error(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


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
    packed = residual_vq_encode(k, v, BOOKS[name])
    assert packed.shape == (1, 1, 1, format_of(BOOKS[name]).record_bytes(head_dim))
    expected, _ = read_record(packed.numpy().tobytes(), BOOKS[name].double().numpy(), head_dim)
    for found, x in zip(residual_vq_decode(packed, BOOKS[name], head_dim), expected, strict=True):
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
def test_backends_pack_the_same(on_backend, head_dim, dtype):
    """But for ties, which sums of another order decide otherwise."""
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in keys_values(BLOCK, 2, 1, head_dim, dtype))
    for books in (BOOKS["256"], codebooks_of(3, 2048, batch=2)):
        found = on_backend(residual_vq_encode, k, v, books)
        with pyspec.backend("reference"):
            expected = residual_vq_encode(k, v, books)
        assert (found == expected).float().mean() > 0.995
        decoded = [residual_vq_decode(packed, books, head_dim) for packed in (found, expected)]
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
    packed = on_backend(residual_vq_encode, k, k, BOOKS["256"])
    scale = packed[0, 0, 0, :256].view(torch.float16)
    assert (scale == 1).all()


def test_large_values_stay_finite(on_backend):
    k = torch.full((1, 1, BLOCK, 64), 65504.0)
    k[..., ::2] = -65504.0
    packed = on_backend(residual_vq_encode, k, k, BOOKS["256"])
    assert all(x.isfinite().all() for x in residual_vq_decode(packed, BOOKS["256"], 64))


def test_tokens_do_not_depend_on_each_other(on_backend):
    k, v = keys_values(2 * BLOCK, batch=2)
    books = codebooks_of(4, batch=2)
    packed = on_backend(residual_vq_encode, k, v, books)
    for b, head, block in ((0, 0, 1), (1, 1, 0)):
        parts = [x[b, head, block * BLOCK :][:BLOCK][None, None] for x in (k, v)]
        alone = on_backend(residual_vq_encode, *parts, books[b])
        if os.environ.get("PYSPEC_ISA"):
            assert torch.equal(alone[0, 0, 0], packed[b, head, block])
            parts[0][..., 3, :] = 7.0
            other = on_backend(residual_vq_encode, *parts, books[b])
            codes = [x[0, 0, 0, 256 : 256 + 1024].view(8, 128) for x in (other, alone)]
            assert torch.equal(codes[0][:, 4:], codes[1][:, 4:])


# ==== attention ====


def packed_case(lens, nodes, books, window=64, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0):
    """A case of tree_attention with everything in full precision, its packed blocks and what lies behind them."""
    case = make_case(lens, nodes, heads, kv_heads, head_dim, dtype, seed)
    blocks = max(case.k.shape[2] // BLOCK, 1)
    room = blocks * BLOCK - case.k.shape[2]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, max(room, 0)))[:, :, : blocks * BLOCK] for x in (case.k, case.v))
    packed = residual_vq_encode(k, v, books)
    starts = [blocks_seen(n, window) * BLOCK for n in lens]
    longest = case.k.shape[2] - min(starts)
    dense = [torch.zeros(len(lens), kv_heads, longest, head_dim, dtype=dtype) for _ in range(2)]
    for to, x in zip(dense, (case.k, case.v), strict=True):
        for b, start in enumerate(starts):
            to[b, :, : x.shape[2] - start] = x[b, :, start:]
    return case, packed, *dense


def oracle(case, packed, books, window):
    """Row by row in float64, on rebuilt keys: a row's position alone decides what it sees packed."""
    heads, head_dim, kv_heads = case.q.shape[1], case.q.shape[3], case.k.shape[1]
    decoded = [x.double() for x in residual_vq_decode(packed, books, head_dim)]
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    lse = torch.full(case.q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, n in enumerate(case.lens.tolist()):
        for node in range(len(case.parents[b])):
            path = path_to(case.parents[b], node)
            start = max(0, (n + len(path) - 1 - window) // BLOCK * BLOCK)
            slots = [*range(start, n), *(n + j for j in path)]
            for head in range(heads):
                of = head // (heads // kv_heads)
                k, v = (
                    torch.cat((x[b, of, :start], exact[b, of, slots].double()))
                    for x, exact in zip(decoded, (case.k, case.v), strict=True)
                )
                scores = k @ case.q[b, head, node].double() * head_dim**-0.5
                lse[b, head, node] = scores.logsumexp(0)
                out[b, head, node] = scores.softmax(0) @ v
    return out, lse


TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check_attention(on_backend, books, lens, nodes, window=64, dtype=torch.float32, **shape):
    """Tables and masses against keys and values that were rebuilt."""
    case, packed, k, v = packed_case(lens, nodes, books, window, dtype=dtype, **shape)
    out, lse = on_backend(
        residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, books, window=window, return_lse=True
    )
    expected, expected_lse = oracle(case, packed, books, window)
    assert out.dtype == dtype and out.shape == case.q.shape
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", BOOKS)
def test_attention_matches_float64(on_backend, name):
    check_attention(on_backend, BOOKS[name], [330, 0, 700], [5, 9, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_in_16_bits(on_backend, dtype):
    check_attention(on_backend, BOOKS["256"], [330, 0], [5, 9], dtype=dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_head_dims(on_backend, head_dim):
    check_attention(on_backend, BOOKS["256"], [300], [3], head_dim=head_dim)


@pytest.mark.parametrize("prefix, nodes", [(0, 1), (127, 33), (191, 1), (192, 1), (192, 33), (319, 33), (4400, 3)])
def test_prefix_and_tree_sizes(on_backend, prefix, nodes):
    check_attention(on_backend, BOOKS["256"], [prefix], [nodes], heads=3, kv_heads=1, seed=prefix + nodes)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 1), (9, 3), (8, 8), (40, 1)])
def test_groups(on_backend, heads, kv_heads):
    check_attention(on_backend, BOOKS["256"], [250, 200], [7, 6], heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("window", [1, 20, 200])
def test_windows(on_backend, window):
    nodes = min(window + 1, 20)
    check_attention(on_backend, BOOKS["256"], [127 + window, 400], [nodes, 1], window=window)


def test_padding_rows_give_zero(on_backend):
    books = BOOKS["256"]
    case, packed, k, v = packed_case([300, 300], [2, 6], books)
    out, lse = on_backend(residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, books, return_lse=True)
    assert (out[0, :, 2:] == 0).all() and (lse[0, :, 2:] == -torch.inf).all()
    assert (out[0, :, :2] != 0).any()


def test_without_packed_blocks_it_is_tree_attention(on_backend):
    case, packed, k, v = packed_case([100], [6], BOOKS["256"])
    found = on_backend(residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, BOOKS["256"])
    torch.testing.assert_close(found, tree_attention(case.q, k, v, case.bits, case.lens))


def test_blocks_that_no_row_sees_may_hold_anything(on_backend):
    case, packed, k, v = packed_case([330], [4], BOOKS["256"])
    args = (case.q, packed, k, v, case.bits, case.lens, BOOKS["256"])
    expected = on_backend(residual_vq_attention, *args)
    packed[:, :, blocks_seen(333, 64) :] = 255  # NaN scales
    assert torch.equal(on_backend(residual_vq_attention, *args), expected)


def test_nan_is_not_hidden(on_backend):
    case, packed, k, v = packed_case([330], [2], BOOKS["256"])
    case.q[0, 1, 1] = torch.nan
    out = on_backend(residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, BOOKS["256"])
    assert out[0, 1, 1].isnan().all() and out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()


def test_large_scores_do_not_overflow(on_backend):
    books = BOOKS["256"]
    case, packed, k, v = packed_case([400], [3], books)
    case.q *= 300
    found = on_backend(residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, books)
    torch.testing.assert_close(found.double(), oracle(case, packed, books, 64)[0], atol=2e-3, rtol=2e-3)


def test_strides_and_guards(on_backend):
    """Any strides; records between guard bytes are only read, whole records are written."""
    books = BOOKS["256"]
    case, packed, k, v = packed_case([330], [6], books)
    expected = on_backend(residual_vq_attention, case.q, packed, k, v, case.bits, case.lens, books)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((1, 2, packed.shape[2] + 2, packed.shape[3]), 171, dtype=torch.uint8)
    wide[:, :, 1:-1] = packed
    before = wide.clone()
    found = on_backend(residual_vq_attention, q, wide[:, :, 1:-1], k, v, case.bits, case.lens, books)
    assert torch.equal(found, expected) and torch.equal(wide, before)


# ==== the row rule ====


def plain_decode(case, packed, b, node, books, window):
    """The node's row as plain decoding computes it: its path committed, one row."""
    n, path = int(case.lens[b]), path_to(case.parents[b], node)
    slots = [*range(n), *(n + j for j in path)]
    start = blocks_seen(len(slots) - 1, window) * BLOCK
    return residual_vq_attention(
        case.q[b : b + 1, :, node : node + 1],
        packed[b : b + 1],
        case.k[b : b + 1, :, slots[start:]],
        case.v[b : b + 1, :, slots[start:]],
        torch.ones(1, 1, 1, dtype=torch.int32),
        torch.tensor([len(slots) - 1], dtype=torch.int32),
        books,
        window=window,
        return_lse=True,
    )


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_row_rule(data):
    if not BACKENDS[1:]:
        pytest.skip("no compiled kernel to test")
    heads, kv_heads = data.draw(st.sampled_from([(3, 1), (4, 2), (8, 1), (17, 1)]))
    batch = data.draw(st.integers(1, 2))
    edge = st.sampled_from([0, 128, 192, 320, 448, 1216, 4288])  # where nodes of one tree see different blocks
    lens = [max(0, data.draw(edge) - data.draw(st.integers(0, 12))) for _ in range(batch)]
    nodes = data.draw(st.lists(st.integers(1, 30), min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    books = BOOKS[data.draw(st.sampled_from(list(BOOKS)))]
    seed = data.draw(st.integers(0, 99))
    os.environ["PYSPEC_ISA"] = data.draw(st.sampled_from(BACKENDS[1:]))
    try:
        case, packed, k, v = packed_case(lens, nodes, books, 64, heads, kv_heads, 64, dtype, seed)
        out, lse = residual_vq_attention(case.q, packed, k, v, case.bits, case.lens, books, return_lse=True)
        for b, parents in enumerate(case.parents):
            for node in range(len(parents)):
                row, row_lse = plain_decode(case, packed, b, node, books, 64)
                assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
                assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)
    finally:
        del os.environ["PYSPEC_ISA"]


# ==== the ops as torch sees them ====


@pytest.mark.parametrize("name", ["256", "2048"])
def test_opcheck(name):
    books, (k, v) = BOOKS[name], keys_values()
    torch.library.opcheck(torch.ops.pyspec.residual_vq_encode.default, (k, v, books[None]))
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    packed = residual_vq_encode(k, v, books)
    torch.library.opcheck(torch.ops.pyspec.residual_vq.default, (q, packed, seen, books, 0.125))


def test_compiles_as_one_graph():
    books, (k, v) = BOOKS["256"], keys_values()
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)

    def step(q, k, v, seen):
        packed = torch.ops.pyspec.residual_vq_encode(k * 1, v, books[None])
        return torch.ops.pyspec.residual_vq(q * 2, packed, seen, books, 0.125)[0].sum(-1)

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
def test_values_that_cannot_be_packed_are_named(value, name):
    tensors = dict(zip("kv", keys_values(batch=2), strict=True))
    tensors[name][1, 1, 200, 7] = value
    with pytest.raises(ValueError, match=f"{name} must hold values .* sequence 1, head 1, position 200, channel 7"):
        residual_vq_encode(tensors["k"], tensors["v"], BOOKS["256"])


def test_attention_names_what_does_not_fit():
    books = BOOKS["256"]
    case, packed, k, v = packed_case([300], [4], books)
    good = dict(q=case.q, packed=packed, k=k, v=v, ancestor_bits=case.bits, prefix_lens=case.lens, codebooks=books)
    residual_vq_attention(**good)
    for change, error, message in (
        ({"q": case.q.double()}, TypeError, "q must be float32"),
        ({"packed": packed.to(torch.int8)}, TypeError, "packed must be uint8"),
        ({"packed": packed[..., :-64]}, ValueError, r"packed must be \[batch, kv_heads, blocks, .* ResidualVqFormat"),
        ({"codebooks": codebooks_of(5)}, ValueError, "packed must be .*depth=5"),
        ({"packed": packed[:, :0]}, ValueError, "packed must have batch 1"),
        ({"k": k[:, :1], "v": v[:, :1]}, ValueError, "k must have the 2 heads"),
        ({"prefix_lens": case.lens.long()}, ValueError, "prefix_lens must be int32"),
        ({"window": 2}, ValueError, r"q must have at most window \+ 1 = 3 nodes, got 4"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
    ):
        with pytest.raises(error, match=message):
            residual_vq_attention(**good | change)


@pytest.mark.skipif(not BACKENDS[1:], reason="no compiled kernel to test")
def test_rows_that_see_blocks_that_are_not_there_are_refused():
    case, packed, k, v = packed_case([600], [2], BOOKS["256"])
    with pytest.raises(RuntimeError, match=r"seen\[0\]\[\d\] is 4, packed has 2 blocks"):
        residual_vq_attention(case.q, packed[:, :, :2], k, v, case.bits, case.lens, BOOKS["256"])
