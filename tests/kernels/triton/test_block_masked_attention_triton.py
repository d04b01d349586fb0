"""The Triton kernel of block_masked_attention: float64 softmax over an explicit mask, and what a row does not see."""

import pytest
import torch

from tests.helpers.mask_cases import some_mask, tensors
from tests.helpers.on_gpu import assert_close, to_device
from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec import BlockMask  # noqa: E402
from pyspec.kernels.block_masked_attention import block_masked_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def run(qkv, mask, scale=None, softcap=None):
    mask = mask.to(DEVICE)
    lists = (mask.full_ranges, mask.full_tiles, mask.partial_ranges, mask.partial_tiles, mask.bits)
    scale = qkv[0].shape[3] ** -0.5 if scale is None else scale
    qkv = (to_device(tensor, DEVICE) for tensor in qkv)
    out, lse = block_masked_attention(*qkv, *lists, mask.row_order, mask.key_order, scale, softcap)
    return out.cpu(), lse.cpu()


def check(qkv, mask, visible, softcap=None):
    out, lse = run(qkv, mask, softcap=softcap)
    q, k, v = (tensor.double() for tensor in qkv)
    k, v = (cache.repeat_interleave(q.shape[1] // k.shape[1], 1) for cache in (k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ v
    tolerance = TOLERANCE[qkv[0].dtype]
    assert out.dtype == qkv[0].dtype and lse.dtype == torch.float32
    assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert_close(lse.double(), scores.logsumexp(-1), atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("words_per_block")
@pytest.mark.parametrize("head_dim", [64, slow(80), slow(128)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_float64(dtype, head_dim):
    visible = some_mask(140, 200)
    check(tensors(140, 200, head_dim=head_dim, dtype=dtype), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("head_dim", [96, slow(256)])
def test_other_head_dims(head_dim):
    visible = some_mask(70, 70)
    check(tensors(70, 70, heads=1, head_dim=head_dim), BlockMask.from_dense(visible), visible)


@pytest.mark.usefixtures("words_per_block")
@pytest.mark.parametrize("rows, keys", [(1, 1), (1, 130), slow(64, 64), slow(65, 1), (63, 129), slow(200, 64)])
def test_sizes(rows, keys):
    visible = some_mask(rows, keys, seed=rows + keys)
    check(tensors(rows, keys), BlockMask.from_dense(visible), visible)


@pytest.mark.usefixtures("words_per_block")
@pytest.mark.parametrize("heads, kv_heads", [slow(1, 1), (3, 1), slow(4, 2), slow(4, 4), slow(4, 1)])
def test_groups(heads, kv_heads):
    visible = some_mask(70, 100)
    check(tensors(70, 100, heads=heads, kv_heads=kv_heads), BlockMask.from_dense(visible), visible)


@pytest.mark.parametrize("shape", [slow((2, 1)), slow((1, 4)), (2, 4)])
def test_a_mask_for_each_batch_entry_and_head(shape):
    visible = torch.stack([some_mask(70, 90, seed) for seed in range(shape[0] * shape[1])]).view(*shape, 70, 90)
    check(tensors(70, 90, batch=2, heads=4, kv_heads=2), BlockMask.from_dense(visible), visible)


def test_more_rows_than_a_block():
    visible = some_mask(300, 100)
    check(tensors(300, 100, batch=2, heads=1), BlockMask.from_dense(visible), visible)


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
    visible = some_mask(70, 90)
    q, k, v = tensors(70, 90, kv_heads=2)
    expected = run((q, k, v), BlockMask.from_dense(visible))[0]
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    cache = torch.stack([k, v], 3).transpose(1, 2).contiguous()  # [B, M, Hkv, 2, D]
    found, _ = run(
        (q, cache[:, :, :, 0].transpose(1, 2), cache[:, :, :, 1].transpose(1, 2)), BlockMask.from_dense(visible)
    )
    assert found.stride() == q.stride() and torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, slow(-torch.inf)], ids=str)
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16, torch.bfloat16], ids=str)
def test_masked_keys_change_no_bit(dtype, garbage):
    visible = torch.rand(70, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    qkv = tensors(70, 100, dtype=dtype)
    out, lse = run(qkv, BlockMask.from_dense(visible))
    for cache, channels in ((qkv[1], slice(None)), (qkv[2], slice(3, 9))):
        cache[:, :, 77, channels] = garbage
    found, found_lse = run(qkv, BlockMask.from_dense(visible))
    unaffected = ~visible[:, 77]
    assert torch.equal(found[:, :, unaffected], out[:, :, unaffected])
    assert torch.equal(found_lse[:, :, unaffected], lse[:, :, unaffected])


@pytest.mark.filterwarnings("ignore:invalid value")
def test_seen_values_that_are_not_finite_are_not_hidden():
    visible = torch.rand(70, 70, generator=torch.Generator().manual_seed(0)) < 0.5
    q, k, v = tensors(70, 70)
    v[:, :, 3, 7], v[:, :, 9, 8], v[:, :, 5, 9] = torch.nan, torch.inf, -torch.inf
    out, _ = run((q, k, v), BlockMask.from_dense(visible))
    assert torch.equal(out[..., 7].isnan(), visible[:, 3].expand(1, 2, 70))
    assert torch.equal(out[..., 8] == torch.inf, visible[:, 9].expand(1, 2, 70))
    assert torch.equal(out[..., 9] == -torch.inf, visible[:, 5].expand(1, 2, 70))
    assert out[..., [0, 6, 10, 63]].isfinite().all()


@pytest.mark.parametrize("rows, keys", [(70, 70), (0, 5), (5, 0)])
def test_nothing_seen(rows, keys):
    out, lse = run(tensors(rows, keys), BlockMask.from_dense(torch.zeros(rows, keys, dtype=torch.bool)))
    assert out.shape == (1, 2, rows, 64) and (out == 0).all() and (lse == -torch.inf).all()
