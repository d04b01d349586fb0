"""block_masked_attention: every backend and instruction set against float64, row by row, over an explicit mask."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyspec import BlockMask, DraftTree
from pyspec.masks import tiles
from pyspec.ops import block_masked_attention, tree_attention
from pyspec.ops.tree_attention import HEAD_DIMS
from tests.helpers.every_backend import BACKENDS, KERNELS, assert_same, each_backend, each_kernel, on_backend
from tests.helpers.mask_cases import arguments, random_dense, tensors

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
run, kernel = each_backend(block_masked_attention), each_kernel(block_masked_attention)


def expected_of(q, k, v, visible, scale=None, softcap=None):
    """float64, from the visible keys alone, one row at a time."""
    batch, heads, rows, head_dim = q.shape
    group = heads // k.shape[1]
    visible = visible.expand(batch, heads, *visible.shape[-2:])
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    for b, head, row in np.ndindex(batch, heads, rows):
        seen = visible[b, head, row].nonzero()[:, 0]
        if len(seen) == 0:
            continue
        scores = k[b, head // group, seen].double() @ q[b, head, row].double()
        scores = scores * (head_dim**-0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        lse[b, head, row] = scores.logsumexp(0)
        out[b, head, row] = scores.softmax(0) @ v[b, head // group, seen].double()
    return out, lse


def check(run, qkv, mask, visible, tolerance=None, **options):
    out, lse = run(*qkv, mask, return_lse=True, **options)
    expected, expected_lse = expected_of(*qkv, visible, **options)
    tolerance = tolerance or TOLERANCE[qkv[0].dtype]
    assert out.dtype == qkv[0].dtype and out.shape == qkv[0].shape and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=max(tolerance, 5e-6), rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_matches_float64(run, dtype, head_dim):
    visible = random_dense(150, 200)
    check(run, tensors(150, 200, head_dim=head_dim, dtype=dtype), BlockMask.from_dense(visible), visible)


@settings(max_examples=30, deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_masks_of_every_alignment(data):
    sizes = st.sampled_from([1, 2, 15, 16, 17, 63, 64, 65, 128, 150, 200])
    rows, keys, seed = data.draw(sizes), data.draw(sizes), data.draw(st.integers(0, 99))
    heads, kv_heads = data.draw(st.sampled_from([(1, 1), (2, 2), (3, 1), (6, 1), (10, 2)]))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    batch = data.draw(st.sampled_from([1, 2]))
    shape = data.draw(st.sampled_from([(1, 1), (batch, 1), (1, heads), (batch, heads)]))
    options = data.draw(st.sampled_from([{}, {"softcap": 20.0}, {"scale": 0.3}]))
    visible = torch.stack([random_dense(rows, keys, seed + i) for i in range(shape[0] * shape[1])])
    visible = visible.view(*shape, rows, keys)
    qkv = tensors(rows, keys, batch, heads, kv_heads, dtype=dtype, seed=seed)
    name = data.draw(st.sampled_from(BACKENDS))
    tolerance = 1e-5 if options and dtype == torch.float32 and name != "reference" else None
    with on_backend(name):
        check(block_masked_attention, qkv, BlockMask.from_dense(visible), visible, tolerance, **options)


def test_two_runs_of_full_tiles_in_a_row(run):
    visible = torch.ones(100, 7 * 64, dtype=torch.bool)
    visible[:, 128:192] = False
    visible[::2, 256:320] = False
    visible[:50, 330:340] = False
    check(run, tensors(100, 7 * 64), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_without_a_key_give_zero(run, dtype):
    visible = torch.rand(130, 130, generator=torch.Generator().manual_seed(0)) < 0.2
    visible[5], visible[64:128], visible[:, 64:] = False, False, False
    qkv = tensors(130, 130, dtype=dtype)
    check(run, qkv, BlockMask.from_dense(visible), visible)
    out, lse = run(*qkv, BlockMask.from_dense(visible), return_lse=True)
    assert (out[:, :, 5] == 0).all() and (lse[:, :, 64:128] == -torch.inf).all()


@pytest.mark.parametrize("rows, keys", [(1, 1), (70, 1), (1, 70), (70, 130)])
def test_empty_mask(run, rows, keys):
    mask = BlockMask.from_dense(torch.zeros(rows, keys, dtype=torch.bool))
    out, lse = run(*tensors(rows, keys), mask, return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("rows, keys, batch", [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing_at_all(run, rows, keys, batch):
    mask = BlockMask.from_dense(torch.ones(rows, keys, dtype=torch.bool))
    out, lse = run(*tensors(rows, keys, batch), mask, return_lse=True)
    assert out.shape == (batch, 2, rows, 64) and (out == 0).all() and (lse == -torch.inf).all()


def test_strides(run):
    visible = random_dense(100, 150)
    q, k, v = tensors(100, 150, heads=4, kv_heads=2)
    expected = run(q, k, v, BlockMask.from_dense(visible))
    cache = torch.full((160, 2, 2, 64), torch.nan)
    cache[:150, :, 0], cache[:150, :, 1] = k[0].transpose(0, 1), v[0].transpose(0, 1)
    strided = (cache[:150, :, i].transpose(0, 1)[None] for i in range(2))
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    out = run(q, *strided, BlockMask.from_dense(visible))
    assert out.stride() == q.stride()
    assert_same(out, expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_agrees_with_tree_attention(run, dtype):
    parents = [-1] + [(node - 1) // 3 for node in range(1, 100)]
    tree, prefix = DraftTree([0] * 100, parents), 150
    q, k, v = tensors(100, 250, heads=4, kv_heads=2, dtype=dtype)
    expected = tree_attention(
        q, k, v, torch.from_numpy(tree.ancestor_bits)[None], torch.tensor([prefix], dtype=torch.int32)
    )
    for mask in (BlockMask.from_tree(tree, prefix), BlockMask.from_tree(tree, prefix).permuted()):
        torch.testing.assert_close(run(q, k, v, mask), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_permuted_tree(run, dtype):
    generator = torch.Generator().manual_seed(0)
    trees, prefixes = [], [70, 5]
    for nodes in (150, 90):
        trees.append([-1] + [int(torch.randint(0, n, (1,), generator=generator)) for n in range(1, nodes)])
    mask = BlockMask.from_tree(trees, prefixes)
    qkv = tensors(150, 220, batch=2, heads=3, dtype=dtype)
    check(run, qkv, mask.permuted(), mask.to_dense())


def test_permuted_by_cuthill_mckee(run):
    pytest.importorskip("scipy", reason="permuted('rcm') is scipy's")
    back = torch.arange(200)[:, None] - torch.arange(200)
    shuffle = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    visible = (back.abs() <= 5)[shuffle][:, shuffle]
    check(run, tensors(200, 200), BlockMask.from_dense(visible).permuted("rcm"), visible)


def test_a_mask_for_each_head_and_batch_entry(run):
    heads = [BlockMask.from_window(130, window=w) for w in (3, 70, 130, 64)]
    mask = BlockMask.stack(heads, heads=True)
    check(run, tensors(130, 130, batch=2, heads=4, kv_heads=2), mask, mask.to_dense())
    mask = BlockMask.stack(heads[:2])
    check(run, tensors(130, 130, batch=2, heads=4, kv_heads=2), mask, mask.to_dense())


def test_blocks_of_128_rows(run, monkeypatch):
    """What a mask from a GPU has."""
    monkeypatch.setattr(tiles, "words_per_block", lambda rows, device: 2)
    for rows in (5, 200):
        visible = random_dense(rows, 150)
        check(run, tensors(rows, 150, heads=6), BlockMask.from_dense(visible), visible)


# ==== the row rule ====


@pytest.mark.parametrize("window", [None, 90, 700])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_prompt_has_the_bits_of_tree_attention(kernel, dtype, window):
    """Across several chunks of tiles, and with the last tile of the prefix open."""
    rows, prefix = 150, 1100
    q, k, v = tensors(rows, prefix + rows, heads=4, kv_heads=2, dtype=dtype)
    bits = torch.from_numpy(DraftTree.chain([0] * rows).ancestor_bits)[None]
    lengths = torch.tensor([prefix], dtype=torch.int32)
    expected = tree_attention(q, k, v, bits, lengths, window=window, return_lse=True)
    found = kernel(q, k, v, BlockMask.from_window(rows, prefix + rows, window=window), return_lse=True)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_alone_has_the_same_bits(kernel, dtype):
    visible = random_dense(150, 1500, seed=5)
    q, k, v = tensors(150, 1500, heads=4, dtype=dtype)
    mask = BlockMask.from_dense(visible)
    out, lse = kernel(q, k, v, mask, return_lse=True)
    for row in (0, 17, 63, 64, 100, 149):
        alone, alone_lse = kernel(q[:, :, row : row + 1], k, v, mask.slice_rows(row, row + 1), return_lse=True)
        assert torch.equal(alone[:, :, 0], out[:, :, row]) and torch.equal(alone_lse[:, :, 0], lse[:, :, row])


def test_joined_prompts_are_separate_calls(run):
    """Three prompts behind one cached prefix in a call, as docs/block_masked_attention.md has them."""
    lengths, prefix = [70, 120, 30], 50
    rows = sum(lengths)
    q, k, v = tensors(rows, prefix + rows, heads=4, kv_heads=2)
    joined = run(q, k, v, BlockMask.from_documents(lengths, prefix=prefix))
    caches = [tensor[:, :, prefix:].split(lengths, 2) for tensor in (k, v)]
    for out, one, *cache in zip(joined.split(lengths, 2), q.split(lengths, 2), *caches, strict=True):
        both = (torch.cat([tensor[:, :, :prefix], mine], 2) for tensor, mine in zip((k, v), cache, strict=True))
        alone = run(one, *both, BlockMask.from_window(one.shape[2], prefix + one.shape[2]))
        torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)


# ==== what a row does not see ====


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_masked_keys_change_no_bit(kernel, dtype, garbage):
    visible = random_dense(150, 200, seed=3)
    qkv = tensors(150, 200, heads=4, dtype=dtype)
    mask = BlockMask.from_dense(visible)
    out, lse = kernel(*qkv, mask, return_lse=True)
    for key in (0, 70, 130, 199):
        spoiled = [tensor.clone() for tensor in qkv]
        for cache, channels in ((spoiled[1], slice(None)), (spoiled[2], slice(3, 9))):
            cache[:, :, key, channels] = -garbage if key == 70 else garbage
        found, found_lse = kernel(*spoiled, mask, return_lse=True)
        unaffected = ~visible[:, key]
        assert unaffected.any() and visible[:, key].any()
        assert torch.equal(found[:, :, unaffected], out[:, :, unaffected])
        assert torch.equal(found_lse[:, :, unaffected], lse[:, :, unaffected])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_seen_values_that_are_not_finite_are_not_hidden(kernel, dtype):
    visible = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    q, k, v = tensors(70, 70, dtype=dtype)
    v[:, :, 3, 7], v[:, :, 9, 8] = torch.nan, torch.inf
    out = kernel(q, k, v, BlockMask.from_dense(visible))
    assert torch.equal(out[..., 7].isnan(), visible[:, 3].expand(1, 2, 70))
    assert torch.equal(out[..., 8] == torch.inf, visible[:, 9].expand(1, 2, 70))
    assert out[..., [0, 6, 9, 63]].isfinite().all()


def test_nan_is_not_hidden(kernel):
    q, k, v = tensors(70, 70)
    q[0, 1, 3] = torch.nan
    out, lse = kernel(q, k, v, BlockMask.from_documents([70]), return_lse=True)
    assert out[0, 1, 3].isnan().all() and lse[0, 1, 3].isnan()
    out[0, 1, 3] = lse[0, 1, 3] = 0.0
    assert out.isfinite().all() and lse.isfinite().all()


def test_large_scores_do_not_overflow(run):
    q, k, v = tensors(70, 200)
    visible = random_dense(70, 200)
    check(run, (q * 300, k, v), BlockMask.from_dense(visible), visible, tolerance=2e-3)


@pytest.mark.parametrize("heads", [1, 4])
def test_thread_count_changes_no_bit(kernel, heads):
    qkv = tensors(300, 300, heads=heads, dtype=torch.bfloat16)
    mask = BlockMask.from_window(300, window=100)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(kernel(*qkv, mask))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


# ==== the op as torch sees it ====


def test_opcheck():
    for mask, dtype in ((BlockMask.from_window(70, window=9), torch.bfloat16), (TREE.permuted(), torch.float32)):
        qkv = tensors(mask.rows, mask.keys, dtype=dtype)
        torch.library.opcheck(torch.ops.pyspec.block_masked_attention.default, arguments(qkv, mask, 3.0))


def test_compiles_as_one_graph():
    mask = BlockMask.from_window(70, window=20)

    def step(q, k, v):
        return block_masked_attention(q * 2, k, v, mask).sum(-1)

    qkv = tensors(70, 70)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*qkv), step(*qkv))


# ==== bad input ====

TREE = BlockMask.from_tree([-1, 0, 0, 1], 5)


@pytest.mark.parametrize(
    "error, name, change",
    [
        (TypeError, "q", lambda q, k, v, m: (q.double(), k, v, m)),
        (TypeError, "k", lambda q, k, v, m: (q, k.half(), v, m)),
        (TypeError, "mask", lambda q, k, v, m: (q, k, v, m.to_dense())),
        (ValueError, "q", lambda q, k, v, m: (q[0], k, v, m)),
        (ValueError, "q", lambda q, k, v, m: (q[..., :48], k, v, m)),
        (ValueError, "q", lambda q, k, v, m: (q.mT.contiguous().mT, k, v, m)),
        (ValueError, "k", lambda q, k, v, m: (q, k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), m)),
        (ValueError, "k", lambda q, k, v, m: (q, k[:, :0], v[:, :0], m)),
        (ValueError, "k", lambda q, k, v, m: (q, k.to("meta"), v.to("meta"), m)),
        (ValueError, "v", lambda q, k, v, m: (q, k, v[:, :, 1:], m)),
        (ValueError, "mask", lambda q, k, v, m: (q[:, :, 1:], k, v, m)),
        (ValueError, "mask", lambda q, k, v, m: (q, k[:, :, 1:], v[:, :, 1:], m)),
        (ValueError, "mask", lambda q, k, v, m: (q, k, v, BlockMask.stack([m, m]))),
        (ValueError, "mask", lambda q, k, v, m: (q, k, v, BlockMask.stack([m] * 3, heads=True))),
        (ValueError, "mask", lambda q, k, v, m: (q, k, v, m.to("meta"))),
    ],
)
def test_bad_input_names_the_argument(error, name, change):
    with pytest.raises(error, match=f"^{name} must"):
        block_masked_attention(*change(*tensors(4, 9), TREE))


@pytest.mark.parametrize("options", [{"scale": -1.0}, {"softcap": 0.0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} must"):
        block_masked_attention(*tensors(4, 9), TREE, **options)


def test_an_edited_dense_mask_is_refused():
    visible = torch.ones(4, 9, dtype=torch.bool)
    mask = BlockMask.from_dense(visible)
    block_masked_attention(*tensors(4, 9), mask)
    visible[0] = False
    with pytest.raises(ValueError, match="^mask must be built again"):
        block_masked_attention(*tensors(4, 9), mask)


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
@pytest.mark.parametrize("name", ["full_ranges", "full_tiles", "partial_ranges", "partial_tiles", "row_order"])
@pytest.mark.parametrize("value", [-1, 1000])
def test_lists_that_point_outside_are_refused(name, value):
    mask = BlockMask.from_tree([-1] + [0] * 69, 100).permuted()
    getattr(mask, name).view(-1)[-1] = value
    with pytest.raises(RuntimeError, match=name):
        block_masked_attention(*tensors(70, 170), mask)
