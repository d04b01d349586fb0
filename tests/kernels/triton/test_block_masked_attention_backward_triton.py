"""The Triton backward of block_masked_attention: autograd of a dense float64 softmax, and what is not seen."""

import pytest
import torch

from tests.helpers.mask_cases import some_mask, tensors
from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec import BlockMask  # noqa: E402
from pyspec.kernels.block_masked_attention import block_masked_attention  # noqa: E402
from pyspec.kernels.block_masked_attention_backward import block_masked_attention_backward  # noqa: E402
from pyspec.kernels.lists_by_key import lists_by_key  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def dense(q, k, v, visible, softcap=None):
    """out and lse in float64, for autograd to go through."""
    k, v = (cache.repeat_interleave(q.shape[1] // k.shape[1], 1) for cache in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -1e30)
    out = torch.where(visible, scores.softmax(-1), 0.0) @ v
    return out, torch.where(visible.any(-1), scores.logsumexp(-1), -torch.inf)


def output_gradients(qkv, seed=1):
    generator = torch.Generator().manual_seed(seed)
    d_out = torch.randn(qkv[0].shape, generator=generator).to(qkv[0].dtype)
    return d_out, torch.randn(qkv[0].shape[:3], generator=generator)


def run(qkv, mask, d_out, d_lse=None, softcap=None):
    """dq, dk and dv."""
    mask, qkv = mask.to(DEVICE), [tensor.to(DEVICE) for tensor in qkv]
    lists = (mask.full_ranges, mask.full_tiles, mask.partial_ranges, mask.partial_tiles, mask.bits)
    options = (*lists, mask.row_order, mask.key_order, qkv[0].shape[3] ** -0.5, softcap)
    out, lse = block_masked_attention(*qkv, *options)
    d_lse = None if d_lse is None else d_lse.to(DEVICE)
    found = block_masked_attention_backward(d_out.to(DEVICE), d_lse, *qkv, out, lse, *options)
    return [gradient.cpu() for gradient in found]


def check(qkv, mask, visible, softcap=None, with_lse=True):
    d_out, d_lse = output_gradients(qkv)
    d_lse = d_lse if with_lse else None
    wide = [tensor.double().requires_grad_() for tensor in qkv]
    out, lse = dense(*wide, visible, softcap)
    loss = (out * d_out.double()).sum()
    if with_lse:
        loss = loss + torch.where(lse == -torch.inf, 0.0, lse * d_lse.double()).sum()
    expected = torch.autograd.grad(loss, wide)
    found = run(qkv, mask, d_out, d_lse, softcap)
    for name, mine, wanted, tensor in zip(("dq", "dk", "dv"), found, expected, qkv, strict=True):
        assert mine.dtype == tensor.dtype and mine.shape == tensor.shape
        tolerance = TOLERANCE[tensor.dtype] * max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(
            mine.double(), wanted, atol=tolerance, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.usefixtures("words_per_block")
@pytest.mark.parametrize("head_dim", [64, slow(80), slow(128)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64(dtype, head_dim):
    visible = some_mask(140, 200)
    check(tensors(140, 200, head_dim=head_dim, dtype=dtype), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("head_dim", [96, slow(256)])
def test_other_head_dims(head_dim):
    visible = some_mask(70, 70)
    check(tensors(70, 70, heads=1, head_dim=head_dim), BlockMask.from_dense(visible), visible, with_lse=False)


@pytest.mark.usefixtures("words_per_block")
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 130), slow(64, 64), slow(65, 1), (63, 129), slow(200, 64)])
def test_sizes(rows, keys):
    visible = some_mask(rows, keys, seed=rows + keys)
    check(tensors(rows, keys), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("heads, kv_heads", [slow(1, 1), (3, 1), slow(4, 2), slow(4, 4)])
def test_groups(heads, kv_heads):
    visible = some_mask(70, 100)
    check(tensors(70, 100, heads=heads, kv_heads=kv_heads), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("shape", [slow((2, 1)), slow((1, 4)), (2, 4)])
def test_a_mask_for_each_batch_entry_and_head(shape):
    visible = torch.stack([some_mask(70, 90, seed) for seed in range(shape[0] * shape[1])]).view(*shape, 70, 90)
    check(tensors(70, 90, batch=2, heads=4, kv_heads=2), BlockMask.from_dense(visible), visible)


def test_lists_of_many_row_blocks():
    """More than a program looks through at a time, of windows: every list has other tiles."""
    mask = BlockMask.from_window(130 * 64, 130 * 64, window=70)
    lists = (mask.full_ranges, mask.full_tiles, mask.partial_ranges, mask.partial_tiles)
    found = lists_by_key(*(tensor.to(DEVICE) for tensor in lists), 130)
    counts, full, partial = (tensor.cpu()[0, 0] for tensor in found)
    tile_map = mask._tile_map()[0, 0]
    for tile in range(130):
        column = tile_map[:, tile]
        assert full[tile, : counts[tile, 0]].tolist() == (column == -1).nonzero()[:, 0].tolist()
        found = partial[tile, : counts[tile, 1]].tolist()
        assert found == [[block, int(column[block])] for block in (column >= 0).nonzero()[:, 0].tolist()]


def test_softcap():
    visible = some_mask(70, 70)
    check(tensors(70, 70), BlockMask.from_dense(visible), visible, softcap=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), slow(torch.bfloat16)], ids=str)
def test_permuted_trees(dtype):
    generator = torch.Generator().manual_seed(0)
    trees = [[-1] + [int(torch.randint(0, n, (1,), generator=generator)) for n in range(1, t)] for t in (90, 70)]
    mask = BlockMask.from_tree(trees, [70, 5])
    check(tensors(90, 160, batch=2, dtype=dtype), mask.permuted(), mask.to_dense())


def test_strides():
    mask = BlockMask.from_dense(some_mask(70, 90))
    qkv = tensors(70, 90, kv_heads=2)
    d_out, d_lse = output_gradients(qkv)
    expected = run(qkv, mask, d_out, d_lse)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (*qkv, d_out)]
    found = run(strided[:3], mask, strided[3].mT.contiguous().mT, d_lse.mT.contiguous().mT)
    assert [g.stride() for g in found] == [tensor.stride() for tensor in strided[:3]]
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("garbage", [torch.nan, slow(torch.inf)], ids=str)
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16, torch.bfloat16], ids=str)
def test_what_is_not_finite_spoils_only_what_sees_it(dtype, garbage):
    visible = torch.rand(70, 100, generator=torch.Generator().manual_seed(0)) < 0.05
    qkv = tensors(70, 100, dtype=dtype)
    mask = BlockMask.from_dense(visible)
    d_out, d_lse = output_gradients(qkv)
    clean = run(qkv, mask, d_out, d_lse)
    for place, index in (("q", 40), ("k", 77), ("v", 77), ("d_out", 40)):
        given = {name: tensor.clone() for name, tensor in zip(("q", "k", "v", "d_out"), (*qkv, d_out), strict=True)}
        given[place][:, :, index, 3:9] = garbage
        d_out_given = given.pop("d_out")
        dq, dk, dv = run(tuple(given.values()), mask, d_out_given, d_lse)
        rows = visible[:, index] if index == 77 else torch.arange(70) == index
        keys = visible[rows].any(0)
        assert rows.any() and not rows.all() and keys.any() and not keys.all()
        assert torch.equal(dq[:, :, ~rows], clean[0][:, :, ~rows])
        assert torch.equal(dk[:, :, ~keys], clean[1][:, :, ~keys])
        assert torch.equal(dv[:, :, ~keys], clean[2][:, :, ~keys])
        if garbage != garbage:
            assert dq[:, :, rows].isnan().all() and dk[:, :, keys].isnan().all()
            assert place == "v" or dv[:, :, keys].isnan().all()


def test_what_sees_nothing_or_is_not_seen_has_gradients_of_zero():
    visible = torch.rand(70, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    visible[5], visible[:, 77] = False, False
    qkv = tensors(70, 100)
    d_out, d_lse = output_gradients(qkv)
    qkv[0][:, :, 5], d_out[:, :, 5], qkv[1][:, :, 77], qkv[2][:, :, 77] = [torch.nan] * 4
    dq, dk, dv = run(qkv, BlockMask.from_dense(visible), d_out, d_lse)
    assert (dq[:, :, 5] == 0).all() and (dk[:, :, 77] == 0).all() and (dv[:, :, 77] == 0).all()
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize("rows, keys", [(70, 70), (0, 5), (5, 0)])
def test_nothing_seen(rows, keys):
    qkv = tensors(rows, keys)
    found = run(qkv, BlockMask.from_dense(torch.zeros(rows, keys, dtype=torch.bool)), *output_gradients(qkv))
    for gradient, tensor in zip(found, qkv, strict=True):
        assert gradient.shape == tensor.shape and (gradient == 0).all()
