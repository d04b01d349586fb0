"""Attention to quantised keys and values, whatever they are quantised as: against float64, and by the row rule."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyspec
from pyspec.ops import tree_attention
from pyspec.ops.gear import blocks_seen
from pyspec.ops.tree_attention import HEAD_DIMS
from tests.helpers import every_backend
from tests.helpers.every_backend import KERNELS, assert_same, each_runner
from tests.helpers.gear_formats import formats_for
from tests.helpers.quantisers import BOOKS, QUANTISERS, TOLERANCE, codes, gear

on_backend = each_runner("gear", "residual_vq")
EACH = ["gear", "codes 256", "pre-rope codes 256"]  # one of each kind


@pytest.mark.parametrize("name", QUANTISERS)
def test_attention_matches_float64(on_backend, name):
    QUANTISERS[name].check(on_backend, [330, 0, 700], [5, 9, 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*EACH, "int8", "3 bits", "gear-4bit", "pre-rope codes 2048"])
def test_attention_in_16_bits(on_backend, name, dtype):
    QUANTISERS[name].check(on_backend, [330, 0], [5, 9], dtype=dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(on_backend, head_dim):
    quantisers = [gear(format) for _, format in formats_for(head_dim)]
    if head_dim % 32 == 0:
        quantisers += [codes(BOOKS["256"]), codes(BOOKS["256"], pre_rope=True)]
    for quantiser in quantisers:
        quantiser.check(on_backend, [300], [3], head_dim=head_dim)


@pytest.mark.parametrize(
    "prefix, nodes", [(0, 1), (127, 33), (191, 1), (192, 1), (192, 33), (319, 33), (2600, 9), (4400, 3)]
)
@pytest.mark.parametrize("name", EACH)
def test_prefix_and_tree_sizes(on_backend, name, prefix, nodes):
    QUANTISERS[name].check(on_backend, [prefix], [nodes], heads=3, kv_heads=1, seed=prefix + nodes)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (5, 1), (9, 3), (8, 8), (40, 1)])
@pytest.mark.parametrize("name", ["kivi", "codes 256", "pre-rope codes 256"])
def test_groups(on_backend, name, heads, kv_heads):
    QUANTISERS[name].check(on_backend, [250, 200], [7, 6], heads=heads, kv_heads=kv_heads)


def test_groups_of_some_channels(on_backend):
    QUANTISERS["channels"].check(on_backend, [330], [9], dtype=torch.bfloat16, heads=9, kv_heads=1, head_dim=128)


@pytest.mark.parametrize("window", [1, 20, 64, 200])
@pytest.mark.parametrize("name", EACH)
def test_windows(on_backend, name, window):
    nodes = min(window + 1, 20)
    QUANTISERS[name].check(on_backend, [127 + window, 400], [nodes, 1], window=window)


@pytest.mark.parametrize("name", ["kivi", "pre-rope codes 256"])
def test_a_window_of_several_blocks(on_backend, name):
    """A deep chain whose nodes see one, two and three more blocks than the root."""
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([700], [300], window=300, heads=2, kv_heads=1)
    case.parents = [list(range(-1, 299))]
    case.bits = torch.from_numpy(pyspec.DraftTree([0] * 300, case.parents[0]).ancestor_bits)[None]
    out = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens, window=300)
    torch.testing.assert_close(out.double(), quantiser.oracle(case, quantised, 300)[0], atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("name", EACH)
def test_padding_rows_give_zero(on_backend, name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([300, 300], [2, 6])
    out, lse = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens, return_lse=True)
    assert (out[0, :, 2:] == 0).all() and (lse[0, :, 2:] == -torch.inf).all()
    assert (out[0, :, :2] != 0).any()


@pytest.mark.parametrize("name", EACH)
def test_without_quantised_blocks_it_is_tree_attention(on_backend, name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([100], [6])
    found = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens)
    torch.testing.assert_close(found, tree_attention(case.q, k, v, case.bits, case.lens))


@pytest.mark.parametrize("name", EACH)
def test_blocks_that_no_row_sees_may_hold_anything(on_backend, name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([330], [4])
    args = (case.q, quantised, k, v, case.bits, case.lens)
    expected = on_backend(quantiser.attend, *args)
    quantised[:, :, blocks_seen(333, 64) :] = 255  # NaN scales
    assert_same(on_backend(quantiser.attend, *args), expected)


@pytest.mark.parametrize("name", EACH)
def test_nan_is_not_hidden(on_backend, name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([330], [2])
    case.q[0, 1, 1] = torch.nan
    out = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens)
    assert out[0, 1, 1].isnan().all() and out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()


@pytest.mark.parametrize("name", ["int8", "codes 256", "pre-rope codes 256"])
def test_large_scores_do_not_overflow(on_backend, name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([400], [3])
    case.q *= 300
    found = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens)
    torch.testing.assert_close(found.double(), quantiser.oracle(case, quantised)[0], atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", EACH)
def test_strides_and_guards(on_backend, name):
    """Any strides; records between guard bytes, and all other inputs, are only read."""
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([330], [6])
    expected = on_backend(quantiser.attend, case.q, quantised, k, v, case.bits, case.lens)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((1, 2, quantised.shape[2] + 2, quantised.shape[3]), 171, dtype=torch.uint8)
    wide[:, :, 1:-1] = quantised
    before, inputs = wide.clone(), [x.clone() for x in (q, k, v)]
    found = on_backend(quantiser.attend, q, wide[:, :, 1:-1], k, v, case.bits, case.lens)
    assert_same(found, expected)
    assert torch.equal(wide, before)
    for x, kept in zip((q, k, v), inputs, strict=True):
        assert torch.equal(x, kept)


# ==== the row rule ====


@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_row_rule(data):
    if not KERNELS:
        pytest.skip("no compiled kernel to test")
    heads, kv_heads = data.draw(st.sampled_from([(3, 1), (4, 2), (8, 1), (17, 1)]))
    batch = data.draw(st.integers(1, 2))
    # around block and chunk boundaries, where nodes of one tree see different blocks
    edge = st.sampled_from([0, 128, 192, 320, 448, 1216, 2240, 4288])
    lens = [max(0, data.draw(edge) - data.draw(st.integers(0, 12))) for _ in range(batch)]
    nodes = data.draw(st.lists(st.integers(1, 40), min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    is_codes = data.draw(st.booleans())
    quantiser = QUANTISERS[data.draw(st.sampled_from([name for name in QUANTISERS if ("codes" in name) == is_codes]))]
    head_dim = data.draw(st.sampled_from([64, 128]))
    seed = data.draw(st.integers(0, 99))
    with every_backend.on_backend(data.draw(st.sampled_from(KERNELS))):
        case, quantised, k, v = quantiser.case(lens, nodes, 64, heads, kv_heads, head_dim, dtype, seed)
        out, lse = quantiser.attend(case.q, quantised, k, v, case.bits, case.lens, return_lse=True)
        for b, parents in enumerate(case.parents):
            for node in range(len(parents)):
                row, row_lse = quantiser.plain_decode(case, quantised, b, node)
                assert torch.equal(out[b, :, node], row[0, :, 0]), (b, node)
                assert torch.equal(lse[b, :, node], row_lse[0, :, 0]), (b, node)


@pytest.mark.parametrize("name", EACH)
def test_thread_count_changes_no_bit(on_backend, name):
    if not os.environ.get("PYSPEC_ISA"):
        pytest.skip("the reference promises values, not bits")
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([1500, 40], [30, 7], dtype=torch.bfloat16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(quantiser.attend(case.q, quantised, k, v, case.bits, case.lens))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# ==== bad input ====


@pytest.mark.parametrize("name", EACH)
def test_attention_names_what_does_not_fit(name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([300], [4])
    good = dict(q=case.q, quantised=quantised, k=k, v=v, bits=case.bits, lens=case.lens)
    quantiser.attend(**good)
    for change, error, message in (
        ({"q": case.q.double()}, TypeError, "q must be float32"),
        ({"quantised": quantised.to(torch.int8)}, TypeError, "quantised must be uint8"),
        ({"quantised": quantised[..., :-64]}, ValueError, r"quantised must be \[batch, kv_heads, blocks, .*Format"),
        ({"quantised": quantised[:, :0]}, ValueError, "quantised must have batch 1"),
        ({"quantised": quantised.expand(2, -1, -1, -1)}, ValueError, "quantised must have batch 1"),
        ({"k": k[:, :1], "v": v[:, :1]}, ValueError, "k must have the 2 heads"),
        ({"lens": case.lens.long()}, ValueError, "prefix_lens must be int32"),
        ({"bits": case.bits[:, :2]}, ValueError, "ancestor_bits must be int32"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 2}, ValueError, r"q must have at most window \+ 1 = 3 nodes, got 4"),
        ({"scale": -1.0}, ValueError, "scale must be positive"),
    ):
        with pytest.raises(error, match=message):
            quantiser.attend(**good | change)


@pytest.mark.skipif(not KERNELS, reason="no compiled kernel to test")
@pytest.mark.parametrize("name", EACH)
def test_rows_that_see_blocks_that_are_not_there_are_refused(name):
    quantiser = QUANTISERS[name]
    case, quantised, k, v = quantiser.case([600], [2])
    with pytest.raises(RuntimeError, match=r"seen\[0\]\[\d\] is 4, quantised has 2 blocks"):
        quantiser.attend(case.q, quantised[:, :, :2], k, v, case.bits, case.lens)
