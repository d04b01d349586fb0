"""gear_attention: over packed blocks against float64, and by the row rule."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gear_encode import BACKENDS, FORMATS, KIVI, PRUNED, backend_runner, channels_of, formats_for, keys_values
from test_tree_attention import make_case, path_to

import pyspec
from pyspec.ops import GearFormat, gear_attention, gear_decode, gear_encode, tree_attention
from pyspec.ops.gear import BLOCK, blocks_seen
from pyspec.ops.tree_attention import HEAD_DIMS

on_backend = pytest.fixture(params=BACKENDS)(backend_runner)


# ==== attention ====


def packed_case(lens, nodes, format, window=64, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0):
    """A case of tree_attention with everything in full precision, its packed blocks and what lies behind them."""
    case = make_case(lens, nodes, heads, kv_heads, head_dim, dtype, seed)
    blocks = max(case.k.shape[2] // BLOCK, 1)
    room = blocks * BLOCK - case.k.shape[2]
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, max(room, 0)))[:, :, : blocks * BLOCK] for x in (case.k, case.v))
    packed = gear_encode(k, v, format, channels_of(k, format))
    starts = [blocks_seen(n, window) * BLOCK for n in lens]
    longest = case.k.shape[2] - min(starts)
    dense = [torch.zeros(len(lens), kv_heads, longest, head_dim, dtype=dtype) for _ in range(2)]
    for to, x in zip(dense, (case.k, case.v), strict=True):
        for b, start in enumerate(starts):
            to[b, :, : x.shape[2] - start] = x[b, :, start:]
    return case, packed, *dense


def oracle(case, packed, format, window):
    """Row by row in float64: what a row at position p sees is decoded or not by its position alone."""
    heads, head_dim, kv_heads = case.q.shape[1], case.q.shape[3], case.k.shape[1]
    decoded = [x.double() for x in gear_decode(packed, format, head_dim)]
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


def check_attention(on_backend, format, lens, nodes, window=64, dtype=torch.float32, **shape):
    case, packed, k, v = packed_case(lens, nodes, format, window, dtype=dtype, **shape)
    out, lse = on_backend(
        gear_attention, case.q, packed, k, v, case.bits, case.lens, format, window=window, return_lse=True
    )
    expected, expected_lse = oracle(case, packed, format, window)
    assert out.dtype == dtype and out.shape == case.q.shape
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", FORMATS)
def test_attention_matches_float64(on_backend, name):
    check_attention(on_backend, FORMATS[name], [330, 0, 700], [5, 9, 3])


@pytest.mark.parametrize("name", PRUNED)
def test_attention_to_some_channels(on_backend, name):
    check_attention(on_backend, PRUNED[name], [330, 0, 700], [5, 9, 3])
    check_attention(on_backend, PRUNED[name], [330], [9], dtype=torch.bfloat16, heads=9, kv_heads=1, head_dim=128)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["int8", "3 bits", "gear", "gear-4bit"])
def test_attention_in_16_bits(on_backend, name, dtype):
    check_attention(on_backend, FORMATS[name], [330, 0], [5, 9], dtype=dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_attention_head_dims(on_backend, head_dim):
    for _, format in formats_for(head_dim):
        check_attention(on_backend, format, [300], [3], head_dim=head_dim)


@pytest.mark.parametrize("prefix, nodes", [(0, 1), (127, 33), (191, 1), (192, 1), (192, 33), (319, 33), (2600, 9)])
def test_prefix_and_tree_sizes(on_backend, prefix, nodes):
    check_attention(on_backend, FORMATS["gear"], [prefix], [nodes], heads=3, kv_heads=1, seed=prefix + nodes)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 1), (9, 3), (8, 8), (40, 1)])
def test_groups(on_backend, heads, kv_heads):
    check_attention(on_backend, KIVI, [250, 200], [7, 6], heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("window", [1, 20, 64, 200])
def test_windows(on_backend, window):
    nodes = min(window + 1, 20)
    check_attention(on_backend, FORMATS["gear"], [127 + window, 400], [nodes, 1], window=window)


def test_a_window_of_several_blocks(on_backend):
    """A deep chain whose nodes see one, two and three more blocks than the root."""
    format = KIVI
    case, packed, k, v = packed_case([700], [300], format, window=300, heads=2, kv_heads=1)
    case.parents = [list(range(-1, 299))]
    case.bits = pyspec.DraftTree([0] * 300, case.parents[0]).ancestor_bits[None]
    out = on_backend(gear_attention, case.q, packed, k, v, case.bits, case.lens, format, window=300)
    torch.testing.assert_close(out.double(), oracle(case, packed, format, 300)[0], atol=5e-6, rtol=5e-6)


def test_padding_rows_give_zero(on_backend):
    case, packed, k, v = packed_case([300, 300], [2, 6], KIVI)
    out, lse = on_backend(gear_attention, case.q, packed, k, v, case.bits, case.lens, KIVI, return_lse=True)
    assert (out[0, :, 2:] == 0).all() and (lse[0, :, 2:] == -torch.inf).all()
    assert (out[0, :, :2] != 0).any()


def test_without_packed_blocks_it_is_tree_attention(on_backend):
    case, packed, k, v = packed_case([100], [6], KIVI)
    found = on_backend(gear_attention, case.q, packed, k, v, case.bits, case.lens, KIVI)
    torch.testing.assert_close(found, tree_attention(case.q, k, v, case.bits, case.lens))


def test_blocks_that_no_row_sees_may_hold_anything(on_backend):
    case, packed, k, v = packed_case([330], [4], FORMATS["gear"])
    args = (case.q, packed, k, v, case.bits, case.lens, FORMATS["gear"])
    expected = on_backend(gear_attention, *args)
    packed[:, :, blocks_seen(333, 64) :] = 255  # NaN scales
    assert torch.equal(on_backend(gear_attention, *args), expected)


def test_nan_is_not_hidden(on_backend):
    case, packed, k, v = packed_case([330], [2], FORMATS["gear"])
    case.q[0, 1, 1] = torch.nan
    out = on_backend(gear_attention, case.q, packed, k, v, case.bits, case.lens, FORMATS["gear"])
    assert out[0, 1, 1].isnan().all() and out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()


def test_large_scores_do_not_overflow(on_backend):
    case, packed, k, v = packed_case([400], [3], FORMATS["int8"])
    case.q *= 300
    found = on_backend(gear_attention, case.q, packed, k, v, case.bits, case.lens, FORMATS["int8"])
    torch.testing.assert_close(found.double(), oracle(case, packed, FORMATS["int8"], 64)[0], atol=2e-3, rtol=2e-3)


def test_strides(on_backend):
    case, packed, k, v = packed_case([330], [6], FORMATS["gear"])
    args = (case.bits, case.lens, FORMATS["gear"])
    expected = on_backend(gear_attention, case.q, packed, k, v, *args)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.zeros(*packed.shape[:2], packed.shape[2] + 3, packed.shape[3], dtype=torch.uint8)
    wide[:, :, : packed.shape[2]] = packed
    assert torch.equal(on_backend(gear_attention, q, wide[:, :, : packed.shape[2]], k, v, *args), expected)


# ==== the row rule ====


def plain_decode(case, packed, b, node, format, window):
    """The node's row as plain decoding computes it: its path committed, one row."""
    n, path = int(case.lens[b]), path_to(case.parents[b], node)
    slots = [*range(n), *(n + j for j in path)]
    start = blocks_seen(len(slots) - 1, window) * BLOCK
    return gear_attention(
        case.q[b : b + 1, :, node : node + 1],
        packed[b : b + 1],
        case.k[b : b + 1, :, slots[start:]],
        case.v[b : b + 1, :, slots[start:]],
        torch.ones(1, 1, 1, dtype=torch.int32),
        torch.tensor([len(slots) - 1], dtype=torch.int32),
        format,
        window=window,
        return_lse=True,
    )


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_row_rule(data):
    if not BACKENDS[1:]:
        pytest.skip("no compiled kernel to test")
    heads, kv_heads = data.draw(st.sampled_from([(3, 1), (4, 2), (8, 1), (17, 1)]))
    batch = data.draw(st.integers(1, 2))
    # around block boundaries, where nodes of one tree see different blocks
    edge = st.sampled_from([0, 128, 192, 320, 448, 1216, 2240])
    lens = [max(0, data.draw(edge) - data.draw(st.integers(0, 12))) for _ in range(batch)]
    nodes = data.draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    format = (FORMATS | PRUNED)[data.draw(st.sampled_from([*FORMATS, *PRUNED]))]
    head_dim = data.draw(st.sampled_from([64, 128]))
    seed = data.draw(st.integers(0, 99))
    os.environ["PYSPEC_ISA"] = data.draw(st.sampled_from(BACKENDS[1:]))
    try:
        case, packed, k, v = packed_case(lens, nodes, format, 64, heads, kv_heads, head_dim, dtype, seed)
        out, lse = gear_attention(case.q, packed, k, v, case.bits, case.lens, format, return_lse=True)
        for b, parents in enumerate(case.parents):
            for node in range(len(parents)):
                row, row_lse = plain_decode(case, packed, b, node, format, 64)
                assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
                assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)
    finally:
        del os.environ["PYSPEC_ISA"]


def test_thread_count_changes_no_bit(on_backend):
    if not os.environ.get("PYSPEC_ISA"):
        pytest.skip("the reference promises values, not bits")
    case, packed, k, v = packed_case([1500, 40], [30, 7], FORMATS["gear"], dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(gear_attention(case.q, packed, k, v, case.bits, case.lens, FORMATS["gear"]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# ==== the ops as torch sees them ====


@pytest.mark.parametrize("name", ["kivi", "gear-3bit, rotated"])
def test_opcheck(name):
    f = FORMATS[name]
    k, v = keys_values()
    none = k.new_empty((1, 2, 2, 0), dtype=torch.uint8)
    torch.library.opcheck(torch.ops.pyspec.gear_encode.default, (k, v, none, *f.layout, f.fitted))
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    packed = gear_encode(k, v, f)
    torch.library.opcheck(torch.ops.pyspec.gear_packed_attention.default, (q, packed, seen, *f.layout, 0.125))


def test_compiles_as_one_graph():
    format = FORMATS["gear"]
    k, v = keys_values()
    q, seen = torch.randn(1, 4, 3, 64), torch.tensor([[1, 2, 0]], dtype=torch.int32)
    none = k.new_empty((1, 2, 2, 0), dtype=torch.uint8)

    def step(q, k, v, seen):
        packed = torch.ops.pyspec.gear_encode(k * 1, v, none, *format.layout, False)
        return torch.ops.pyspec.gear_packed_attention(q * 2, packed, seen, *format.layout, 0.125)[0].sum(-1)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, k, v, seen), step(q, k, v, seen))


# ==== bad input ====


def test_attention_names_what_does_not_fit():
    case, packed, k, v = packed_case([300], [4], KIVI)
    good = dict(q=case.q, packed=packed, k=k, v=v, ancestor_bits=case.bits, prefix_lens=case.lens, format=KIVI)
    gear_attention(**good)
    for change, error, message in (
        ({"q": case.q.double()}, TypeError, "q must be float32"),
        ({"packed": packed.to(torch.int8)}, TypeError, "packed must be uint8"),
        ({"packed": packed[..., :-64]}, ValueError, r"packed must be \[batch, kv_heads, blocks, "),
        ({"format": GearFormat(4, 64)}, ValueError, "packed must be .* GearFormat"),
        ({"packed": packed[:, :0]}, ValueError, "packed must have batch 1"),
        ({"packed": packed.expand(2, -1, -1, -1)}, ValueError, "packed must have batch 1"),
        ({"k": k[:, :1], "v": v[:, :1]}, ValueError, "k must have the 2 heads"),
        ({"prefix_lens": case.lens.long()}, ValueError, "prefix_lens must be int32"),
        ({"ancestor_bits": case.bits[:, :2]}, ValueError, "ancestor_bits must be int32"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2}, ValueError, r"q must have at most window \+ 1 = 3 nodes, got 4"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
    ):
        with pytest.raises(error, match=message):
            gear_attention(**good | change)


@pytest.mark.skipif(not BACKENDS[1:], reason="no compiled kernel to test")
def test_rows_that_see_blocks_that_are_not_there_are_refused():
    case, packed, k, v = packed_case([600], [2], KIVI)
    with pytest.raises(RuntimeError, match=r"seen\[0\]\[\d\] is 4, packed has 2 blocks"):
        gear_attention(case.q, packed[:, :, :2], k, v, case.bits, case.lens, KIVI)


def test_nothing_but_the_records_is_written(on_backend):
    """Records between guard bytes stay what they are when attention reads them; encoding writes whole records."""
    format = FORMATS["gear"]
    case, packed, k, v = packed_case([330], [4], format)
    guarded = torch.full((1, 2, packed.shape[2] + 2, packed.shape[3]), 171, dtype=torch.uint8)
    guarded[:, :, 1:-1] = packed
    before, inputs = guarded.clone(), [x.clone() for x in (case.q, k, v)]
    on_backend(gear_attention, case.q, guarded[:, :, 1:-1], k, v, case.bits, case.lens, format)
    on_backend(gear_encode, case.k[:, :, :BLOCK], case.v[:, :, :BLOCK], format)
    assert torch.equal(guarded, before)
    for x, kept in zip((case.q, k, v), inputs, strict=True):
        assert torch.equal(x, kept)
