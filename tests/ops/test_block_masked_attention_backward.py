"""Gradients of block_masked_attention: every backend against autograd of a dense float64 softmax."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyspec import BlockMask
from pyspec.masks import tiles
from pyspec.ops import block_masked_attention
from pyspec.ops.block_masked_attention import block_masked_attention_backward_reference
from pyspec.ops.tree_attention import HEAD_DIMS
from tests.helpers.every_backend import BACKENDS, KERNELS, each_backend, each_kernel, on_backend
from tests.helpers.mask_cases import arguments, random_dense, tensors

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
NAMES = ("dq", "dk", "dv")


def dense(q, k, v, visible, scale=None, softcap=None):
    """out and lse in float64, for autograd to go through; of a row that sees nothing 0 and a constant."""
    group = q.shape[1] // k.shape[1]
    keys, values = (cache.repeat_interleave(group, 1) for cache in (k, v))
    scores = q @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -1e30)
    weights = torch.where(visible, scores.softmax(-1), 0.0)
    return weights @ values, torch.where(visible.any(-1), scores.logsumexp(-1), 0.0)


def expected_of(qkv, visible, d_out, d_lse, **options):
    wide = [tensor.double().requires_grad_() for tensor in qkv]
    out, lse = dense(*wide, visible, **options)
    d_lse = torch.zeros_like(lse) if d_lse is None else torch.where(visible.any(-1), d_lse.double(), 0.0)
    return torch.autograd.grad((out, lse), wide, (d_out.double(), d_lse))


def gradients(qkv, mask, d_out, d_lse=None, **options):
    wanted = [tensor.detach().requires_grad_() for tensor in qkv]
    out, lse = block_masked_attention(*wanted, mask, return_lse=True, **options)
    results, given = ((out,), (d_out,)) if d_lse is None else ((out, lse), (d_out, d_lse))
    return torch.autograd.grad(results, wanted, given)


BOTH = "block_masked_attention", "block_masked_attention_backward"
run, kernel = each_backend(gradients, *BOTH), each_kernel(gradients, *BOTH)


def output_gradients(qkv, seed=1):
    """d_out and d_lse at random."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(qkv[0].shape, generator=generator).to(qkv[0].dtype),
        torch.randn(qkv[0].shape[:3], generator=generator),
    )


def assert_near(found, expected, tolerance):
    """Within so much of the largest value: a sum's error grows with its terms, not with what is left of them."""
    for name, mine, wanted in zip(NAMES, found, expected, strict=True):
        size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
        torch.testing.assert_close(
            mine.double(), wanted, atol=tolerance * size, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def check(run, qkv, mask, visible, tolerance=None, **options):
    d_out, of_lse = output_gradients(qkv)
    for d_lse in (None, of_lse):
        found = run(qkv, mask, d_out, d_lse, **options)
        assert [(g.dtype, g.shape) for g in found] == [(x.dtype, x.shape) for x in qkv]
        expected = expected_of(qkv, visible.expand(*qkv[0].shape[:2], -1, -1), d_out, d_lse, **options)
        assert_near(found, expected, tolerance or TOLERANCE[qkv[0].dtype])


def test_reference_is_the_derivative():
    """In float64, where no rounding hides a wrong term."""
    visible = random_dense(70, 90)
    visible[3] = False
    qkv = tensors(70, 90, batch=2, heads=4, kv_heads=2, dtype=torch.float64)
    d_out, d_lse = output_gradients(qkv)
    mask = BlockMask.from_dense(visible)
    for softcap in (None, 2.0):
        out, lse = dense(*qkv, visible, scale=0.125, softcap=softcap)
        inputs = arguments((d_out, d_lse.double(), *qkv, out, lse), mask, softcap)
        found = block_masked_attention_backward_reference(*inputs)
        assert_near(found, expected_of(qkv, visible, d_out, d_lse, scale=0.125, softcap=softcap), 1e-12)


def test_gradcheck():
    """Against differences of the forward, through both of the op's ways into autograd."""
    visible = random_dense(5, 7, seed=1)
    qkv = [tensor.requires_grad_() for tensor in tensors(5, 7)]
    mask = BlockMask.from_dense(visible)

    def by_overload(q, k, v):
        return torch.ops.pyspec.block_masked_attention(*arguments((q, k, v), mask))[0]

    for call in (lambda *qkv: block_masked_attention(*qkv, mask), by_overload):
        assert torch.autograd.gradcheck(call, qkv, eps=1e-2, atol=2e-2, nondet_tol=0, fast_mode=True)


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
    options = data.draw(st.sampled_from([{}, {"softcap": 20.0}, {"scale": 0.3}, {"scale": 0.2, "softcap": 3.0}]))
    visible = torch.stack([random_dense(rows, keys, seed + i) for i in range(shape[0] * shape[1])])
    visible = visible.view(*shape, rows, keys)
    qkv = tensors(rows, keys, batch, heads, kv_heads, dtype=dtype, seed=seed)

    def run(*args, **options):
        with on_backend(data.draw(st.sampled_from(BACKENDS))):
            return gradients(*args, **options)

    check(run, qkv, BlockMask.from_dense(visible), visible, **options)


def test_many_tiles_and_blocks(run):
    """More rows than are worked on together, of a window: every block sees other keys."""
    mask = BlockMask.from_window(1500, window=170)
    check(run, tensors(1500, 1500, heads=4, kv_heads=2), mask, mask.to_dense())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_permuted_tree(run, dtype):
    generator = torch.Generator().manual_seed(0)
    trees = [[-1] + [int(torch.randint(0, n, (1,), generator=generator)) for n in range(1, t)] for t in (150, 90)]
    mask = BlockMask.from_tree(trees, [70, 5])
    check(run, tensors(150, 220, batch=2, heads=3, dtype=dtype), mask.permuted(), mask.to_dense())


def test_a_mask_for_each_head_and_batch_entry(run):
    heads = [BlockMask.from_window(130, window=w) for w in (3, 70, 130, 64)]
    for mask in (BlockMask.stack(heads, heads=True), BlockMask.stack(heads[:2])):
        check(run, tensors(130, 130, batch=2, heads=4, kv_heads=2), mask, mask.to_dense())


def test_blocks_of_128_rows(run, monkeypatch):
    """What a mask from a GPU has."""
    monkeypatch.setattr(tiles, "words_per_block", lambda rows, device: 2)
    for rows in (5, 200):
        visible = random_dense(rows, 150)
        check(run, tensors(rows, 150, heads=6), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("rows, keys, batch", [(0, 5, 1), (5, 0, 1), (5, 5, 0)])
def test_nothing_at_all(run, rows, keys, batch):
    qkv = tensors(rows, keys, batch)
    found = run(qkv, BlockMask.from_dense(torch.ones(rows, keys, dtype=torch.bool)), output_gradients(qkv)[0])
    for mine, tensor in zip(found, qkv, strict=True):
        assert mine.shape == tensor.shape and (mine == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_what_sees_nothing_or_is_not_seen_has_gradients_of_zero(run, dtype):
    visible = torch.rand(130, 130, generator=torch.Generator().manual_seed(0)) < 0.2
    visible[5], visible[64:128], visible[:, 64:110], visible[:, 3] = False, False, False, False
    qkv = tensors(130, 130, dtype=dtype)
    check(run, qkv, BlockMask.from_dense(visible), visible)
    dq, dk, dv = run(qkv, BlockMask.from_dense(visible), *output_gradients(qkv))
    assert (dq[:, :, ~visible.any(1)] == 0).all()
    assert (dk[:, :, ~visible.any(0)] == 0).all() and (dv[:, :, ~visible.any(0)] == 0).all()


def test_strides(run):
    mask = BlockMask.from_dense(random_dense(100, 150))
    qkv = tensors(100, 150, heads=4, kv_heads=2)
    d_out, d_lse = output_gradients(qkv)
    expected = run(qkv, mask, d_out, d_lse)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (*qkv, d_out)]
    found = run(strided[:3], mask, strided[3], d_lse.mT.contiguous().mT)
    assert [g.stride() for g in found] == [tensor.stride() for tensor in strided[:3]]
    torch.testing.assert_close(found, expected)


def test_gradients_that_repeat_or_miss(run):
    """Of sums, d_out is one number for all; of lse alone, there is none."""
    mask = BlockMask.from_dense(random_dense(70, 90))
    qkv = tensors(70, 90)
    wanted = [tensor.requires_grad_() for tensor in qkv]
    ones = torch.ones(1, 2, 70, 64)
    expected = run(qkv, mask, ones)
    torch.testing.assert_close(run(qkv, mask, torch.ones(()).expand(ones.shape)), expected)
    of_sum = torch.autograd.grad(block_masked_attention(*wanted, mask).sum(), wanted)
    torch.testing.assert_close(of_sum, expected, atol=1e-4, rtol=1e-4)
    lse = block_masked_attention(*wanted, mask, return_lse=True)[1]
    of_lse = torch.autograd.grad(lse[lse.isfinite()].sum(), wanted[:2])
    zeros = torch.zeros_like(ones)
    torch.testing.assert_close(of_lse, run(qkv, mask, zeros, lse.isfinite().float())[:2], atol=1e-5, rtol=1e-5)


def test_large_scores_do_not_overflow(run):
    q, k, v = tensors(70, 200)
    visible = random_dense(70, 200)
    check(run, (q * 30, k, v), BlockMask.from_dense(visible), visible, tolerance=2e-4)


# ==== what is not seen ====


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_masked_keys_change_no_gradient(kernel, dtype, garbage):
    """A key that is not finite spoils the rows that see it, these the keys that they see, and nothing else."""
    visible = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) < 0.02
    visible[:, :64] = True
    visible[:64, 64:70] = False
    visible[100:, 70] = False
    qkv = tensors(150, 200, heads=4, dtype=dtype)
    d_out, d_lse = output_gradients(qkv)
    mask = BlockMask.from_dense(visible)
    clean = kernel(qkv, mask, d_out, d_lse)
    for key in (70, 130, 199):
        assert visible[:, key].any() and not visible[:, key].all()
        for spoilt in ((1,), (2,), (1, 2)):
            given = [tensor.clone() for tensor in qkv]
            for which in spoilt:
                given[which][:, :, key, 3:9] = -garbage if key == 70 else garbage
            dq, dk, dv = kernel(given, mask, d_out, d_lse)
            rows = ~visible[:, key]
            keys = ~visible[visible[:, key]].any(0)
            assert rows.any() and keys.any()
            assert torch.equal(dq[:, :, rows], clean[0][:, :, rows])
            assert torch.equal(dk[:, :, keys], clean[1][:, :, keys])
            assert torch.equal(dv[:, :, keys], clean[2][:, :, keys])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_key_that_nothing_sees_may_be_nan(run, dtype):
    visible = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, 70], visible[:, 199], visible[20] = False, False, False
    q, k, v = tensors(150, 200, heads=4, dtype=dtype)
    d_out, d_lse = output_gradients((q, k, v))
    mask = BlockMask.from_dense(visible)
    clean = run((q, k, v), mask, d_out, d_lse)
    k[:, :, 70], v[:, :, 70], k[:, :, 199, 5], v[:, :, 199, 6] = torch.nan, torch.nan, torch.inf, -torch.inf
    q[:, :, 20], d_out[:, :, 20, 7], d_lse[:, :, 20] = torch.nan, torch.inf, torch.nan
    found = run((q, k, v), mask, d_out, d_lse)
    assert all(torch.equal(*pair) for pair in zip(found, clean, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_row_that_is_not_finite_spoils_only_the_keys_that_it_sees(kernel, dtype):
    visible = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[:, :64] = True
    qkv = tensors(150, 200, heads=4, dtype=dtype)
    d_out, d_lse = output_gradients(qkv)
    mask = BlockMask.from_dense(visible)
    clean = kernel(qkv, mask, d_out, d_lse)
    for row, spoilt in ((7, 0), (40, 1), (140, 0), (149, 1)):
        given = [qkv[0].clone(), d_out.clone()]
        given[spoilt][:, :, row, 5] = torch.nan if row < 100 else torch.inf
        dq, dk, dv = kernel((given[0], *qkv[1:]), mask, given[1], d_lse)
        rows, keys = torch.arange(150) != row, ~visible[row]
        for mine, wanted, kept in ((dq, clean[0], rows), (dk, clean[1], keys), (dv, clean[2], keys)):
            assert torch.equal(mine[:, :, kept], wanted[:, :, kept])
        assert all(spoilt.isnan().all() for spoilt in (dq[:, :, row], dk[:, :, ~keys], dv[:, :, ~keys]))


def test_seen_values_that_are_not_finite_are_not_hidden(kernel):
    visible = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    q, k, v = tensors(70, 70)
    d_out, _ = output_gradients((q, k, v))
    k[:, :, 3, 7] = torch.nan
    dq, dk, dv = kernel((q, k, v), BlockMask.from_dense(visible), d_out)
    assert torch.equal(dq.isnan().all(-1), visible[:, 3].expand(1, 2, 70))
    keys = visible[visible[:, 3]].any(0)
    assert torch.equal(dk.isnan().any(-1)[0, 0], keys) and torch.equal(dv.isnan().any(-1)[0, 0], keys)


@pytest.mark.parametrize("heads", [1, 4])
def test_thread_count_changes_no_bit(kernel, heads):
    qkv = tensors(1200, 1200, heads=heads, dtype=torch.bfloat16)
    mask = BlockMask.from_window(1200, window=300)
    d_out, d_lse = output_gradients(qkv)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            results.append(kernel(qkv, mask, d_out, d_lse))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other, strict=True))


# ==== the op as torch sees it ====


def backward_arguments(qkv, mask, softcap=None, with_lse=True):
    d_out, d_lse = output_gradients(qkv)
    out, lse = torch.ops.pyspec.block_masked_attention(*arguments(qkv, mask, softcap))
    return arguments((d_out, d_lse if with_lse else None, *qkv, out, lse), mask, softcap)


def test_opcheck():
    window, tree = BlockMask.from_window(70, window=9), BlockMask.from_tree([-1, 0, 0, 1], 5).permuted()
    for mask, dtype, with_lse in ((window, torch.bfloat16, True), (tree, torch.float32, False)):
        qkv = tensors(mask.rows, mask.keys, dtype=dtype)
        backward = torch.ops.pyspec.block_masked_attention_backward.default
        torch.library.opcheck(backward, backward_arguments(qkv, mask, 3.0, with_lse))
        wanted = [tensor.requires_grad_() for tensor in qkv]
        torch.library.opcheck(torch.ops.pyspec.block_masked_attention.default, arguments(wanted, mask, 3.0))


def test_compiles_as_one_graph():
    mask = BlockMask.from_window(70, window=20)
    qkv = [tensor.requires_grad_() for tensor in tensors(70, 70)]

    def loss(q, k, v):
        out, lse = block_masked_attention(q * 2, k, v, mask, return_lse=True)
        return out.square().sum() + lse.sum()

    def sum_of_out(q, k, v):
        return block_masked_attention(q, k, v, mask).sum()

    for function in (loss, sum_of_out):
        expected = torch.autograd.grad(function(*qkv), qkv)
        torch.compiler.reset()
        torch.testing.assert_close(torch.autograd.grad(torch.compile(function, fullgraph=True)(*qkv), qkv), expected)
        by_transform = torch.func.grad(function, argnums=(0, 1, 2))(*(tensor.detach() for tensor in qkv))
        torch.testing.assert_close(by_transform, expected)


def test_only_what_is_asked_for():
    """A frozen input needs no gradient; twice differentiating is refused."""
    q, k, v = tensors(70, 70)
    mask = BlockMask.from_window(70, window=20)
    expected = torch.autograd.grad(block_masked_attention(*(x.requires_grad_() for x in (q, k, v)), mask).sum(), v)[0]
    out = block_masked_attention(q.detach(), k.detach(), v, mask)
    (found,) = torch.autograd.grad(out.sum(), v, create_graph=True)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(found.sum(), v)


# ==== bad input ====


@pytest.mark.skipif(not KERNELS, reason="the compiled kernel does these checks")
@pytest.mark.parametrize(
    "place, name, change",
    [
        (0, "d_out", lambda x: x.half()),
        (0, "d_out", lambda x: x[:, :, 1:]),
        (1, "d_lse", lambda x: x[:, :, 1:]),
        (1, "d_lse", lambda x: x.double()),
        (5, "out", lambda x: x[:, 1:]),
        (5, "out", lambda x: x.mT.contiguous().mT),
        (6, "lse", lambda x: x.double()),
        (6, "lse", lambda x: x.mT.contiguous().mT),
        (3, "k must have the batch", lambda x: x.repeat(2, 1, 1, 1)),
        (7, "full_ranges", lambda x: x + 1000),
        (13, "key_order", lambda x: x + 1),
    ],
)
def test_bad_input_names_the_argument(place, name, change):
    mask = BlockMask.from_tree([-1] + [0] * 69, 100).permuted()
    inputs = list(backward_arguments(tensors(70, 170), mask))
    if name.startswith("k must"):
        inputs[4] = change(inputs[4])
    inputs[place] = change(inputs[place])
    with pytest.raises(RuntimeError, match=name):
        torch.ops.pyspec.block_masked_attention_backward(*inputs)
