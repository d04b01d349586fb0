"""The CUDA kernel of residual_vq against the plain-PyTorch reference: on a GPU where there is one, else on the CPU
through tests/cuda_on_host, behind its own binding either way."""

import pytest
import torch

from pyspec.ops.residual_vq import (
    _ATTENTION,
    residual_vq_encode_reference,
    residual_vq_reference,
    rotary_of_blocks,
)
from tests.helpers.cuda_on_host import fenced_memory, op_on_host
from tests.helpers.on_gpu import assert_close, to_device

HAS_GPU = torch.cuda.is_available()
# Tensor cores cut off what fp32 has no room for, where the CPU rounds.
TOLERANCE = {torch.float32: 4e-5 if HAS_GPU else 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def kernel():
    if not HAS_GPU:
        return op_on_host("residual_vq")[0]
    assert _ATTENTION.backend_for("cuda")[0] == "cuda", _ATTENTION.backend_for("cuda")[1]

    def call(q, quantised, seen, books, scale, rotary=None, oldest=None):
        rotary, oldest = (None if tensor is None else tensor.cuda() for tensor in (rotary, oldest))
        tensors = (to_device(tensor, "cuda") for tensor in (q, quantised, seen, books))
        found = _ATTENTION.overload(*tensors, scale, rotary, oldest)
        return tuple(part.cpu() for part in found)

    return call


@pytest.fixture
def device():
    """Sets the host's device for a test; a GPU is as it is."""
    library = None if HAS_GPU else op_on_host("residual_vq")[1]
    yield lambda **settings: library.set(**settings) if library else None
    if library:
        library.set()


def case_of(
    seen, heads=4, kv_heads=2, head_dim=64, depth=3, codes=256, dtype=torch.float32, blocks=None, seed=0, sizes=None
):
    generator = torch.Generator().manual_seed(seed)
    seen = torch.tensor(seen, dtype=torch.int32)
    batch, nodes = seen.shape
    blocks = int(seen.max()) if blocks is None else blocks
    words = torch.randn(2, depth, codes, 32, generator=generator) * 0.8
    books = (words * 0.8 ** torch.arange(depth)[:, None, None]).half()
    k, v = torch.randn(2, batch, kv_heads, max(blocks, 1) * 128, head_dim, generator=generator).unbind(0)
    v *= 1.0 if sizes is None else sizes[0] * (sizes[1] * torch.randn(*v.shape[:3], 1, generator=generator)).exp()
    quantised = residual_vq_encode_reference(k, v, books.expand(batch, -1, -1, -1, -1))[:, :, :blocks]
    q = torch.randn(batch, heads, nodes, head_dim, generator=generator).to(dtype)
    return q, quantised, seen, books, head_dim**-0.5


def pre_rope(case):
    """The same with records taken for those of keys before rotary embedding."""
    q, quantised, *rest = case
    frequencies = 10000.0 ** (-torch.arange(0, q.shape[3], 2) / q.shape[3])
    return q, quantised, *rest, rotary_of_blocks(frequencies, quantised.shape[2])


def check(kernel, case):
    q = case[0]
    (out, lse), (expected, expected_lse) = kernel(*case), residual_vq_reference(*case)
    assert out.dtype == q.dtype and out.shape == q.shape
    tolerance = TOLERANCE[q.dtype]
    assert_close(out, expected, atol=tolerance, rtol=tolerance)
    assert_close(lse, expected_lse, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(4))
def test_trees_over_several_chunks(kernel, device, seed):
    device(seed=seed)  # of the order in which threads run
    check(kernel, case_of([[1, 9, 2], [10, 10, 0]], seed=seed))


@pytest.mark.parametrize("heads, kv_heads, nodes", [(1, 1, 1), (5, 1, 2), (6, 2, 3)])
def test_groups(kernel, heads, kv_heads, nodes):
    check(kernel, case_of([[2] * nodes], heads, kv_heads))


@pytest.mark.parametrize("head_dim", [96, 128, 256])
def test_head_dims(kernel, head_dim):
    check(kernel, case_of([[1, 2]], 2, 1, head_dim, depth=2))


@pytest.mark.parametrize("head_dim, depth, codes", [(64, 3, 256), (96, 1, 256), (256, 2, 256), (128, 2, 2048)])
def test_keys_before_rotary_embedding(kernel, device, head_dim, depth, codes):
    device(seed=head_dim)
    check(kernel, pre_rope(case_of([[1, 9, 2], [10, 10, 0]], 4, 2, head_dim, depth, codes)))
    check(kernel, pre_rope(case_of([[2, 1]], 5, 1, head_dim, depth, codes, dtype=torch.bfloat16)))


@pytest.mark.parametrize("depth, codes", [(1, 256), (9, 256), (2, 2048)])
def test_formats(kernel, depth, codes):
    check(kernel, case_of([[2, 1]], 2, 1, depth=depth, codes=codes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(kernel, dtype):
    check(kernel, case_of([[2, 1]], dtype=dtype))


def test_nothing_quantised(kernel):
    check(kernel, case_of([[0, 0]], blocks=0))
    check(kernel, pre_rope(case_of([[0, 0]], blocks=0)))
    check(kernel, case_of([[0, 0]], blocks=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", ["post-rope", "pre-rope"])
def test_a_row_has_the_bits_that_it_has_alone(kernel, device, keys, dtype):
    """30 rows of a KV head, and 12 and 6, of which bf16 has 32, 16 and 8 in a block."""
    case = case_of([[3, 1, 5, 2, 0]], heads=12, dtype=dtype)
    case = pre_rope(case) if keys == "pre-rope" else case
    check(kernel, case)
    out, lse = kernel(*case)
    q, quantised, seen, *rest = case
    for seed, nodes in enumerate([[0, 3], [1], [2], [4]]):
        device(seed=seed + 1)
        alone, alone_lse = kernel(q[:, :, nodes], quantised, seen[:, nodes], *rest)
        assert torch.equal(alone, out[:, :, nodes]) and torch.equal(alone_lse, lse[..., nodes])


def test_blocks_that_no_row_sees_may_hold_anything(kernel):
    q, quantised, seen, *rest = case_of([[2, 9]], blocks=11)
    expected = kernel(q, quantised, seen, *rest)
    quantised[:, :, 9:] = 255  # NaN scales
    for found, part in zip(kernel(q, quantised, seen, *rest), expected, strict=True):
        assert torch.equal(found, part)


@pytest.mark.parametrize("depth, head_dim, dtype", [(8, 128, torch.bfloat16), (9, 64, torch.float32)])
def test_bits_do_not_hang_on_shared_memory(kernel, device, depth, head_dim, dtype):
    """With room for two stages, the next is copied while one is read; the smallest GPUs have room for one."""
    if HAS_GPU:
        pytest.skip("a GPU has what it has")
    for change in (lambda case: case, pre_rope):
        case = change(case_of([[3]], 2, 1, head_dim, depth, dtype=dtype))
        device()
        expected = kernel(*case)
        device(shared=227 << 10, seed=1)
        for found, part in zip(kernel(*case), expected, strict=True):
            assert torch.equal(found, part)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("codes", [256, 2048])
def test_windows(kernel, codes, turned):
    """That begin before the first token, within a record and at its end, behind all, and where a row sees no record."""
    case = case_of([[9, 8, 10, 7, 0, 3, 10]], codes=codes, depth=2)
    *case, rotary = pre_rope(case) if turned else (*case, None)
    oldest = torch.tensor([[0, 700, 5 * 128, 7 * 128 + 5, 3, 10**7, -5]], dtype=torch.int32)
    found = kernel(*case, rotary, oldest)
    for ours, expected in zip(found, residual_vq_reference(*case, rotary, oldest), strict=True):
        assert_close(ours, expected, atol=TOLERANCE[torch.float32], rtol=TOLERANCE[torch.float32])
    q, quantised, seen, *rest = case
    for node in (1, 2, 3, 5):
        broken = quantised.clone()
        broken[:, :, : oldest[0, node] // 128] = 255  # nothing before a row's own records counts
        alone = kernel(q[:, :, node, None], broken, seen[:, node, None], *rest, rotary, oldest[:, node, None])
        assert all(torch.equal(part[:, :, 0], all_[:, :, node]) for part, all_ in zip(alone, found, strict=True))


@pytest.mark.parametrize("sizes", [(1e-4, 0.0), (1.0, 2.5), (3e4, 0.1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_of_any_size(kernel, dtype, sizes):
    """All small, all large, or from a thousandth to a thousand beside each other."""
    case = case_of([[2]], dtype=dtype, sizes=sizes)
    (out, _), (expected, _) = kernel(*case), residual_vq_reference(*case)
    size = expected.float().abs().amax(-1, keepdim=True)
    torch.testing.assert_close(out / size, expected / size, atol=TOLERANCE[dtype], rtol=0)


@pytest.mark.parametrize("side, value", [("keys", torch.nan), ("values", torch.nan), ("values", torch.inf)])
def test_scales_that_are_not_finite(kernel, side, value):
    """No encoder makes them, but a row that sees one does not look as if all were well."""
    q, quantised, seen, books, scale = case_of([[1, 3]])
    before, before_lse = kernel(q, quantised, seen, books, scale)
    at = (quantised.shape[3] // 2 if side == "values" else 0) + 2 * 5
    quantised[:, :, 2, at : at + 2] = torch.tensor([value], dtype=torch.float16).view(torch.uint8)
    (out, lse), (expected, expected_lse) = (
        f(q, quantised, seen, books, scale) for f in (kernel, residual_vq_reference)
    )
    assert torch.equal(out[:, :, 0], before[:, :, 0]) and torch.equal(lse[..., 0], before_lse[..., 0])
    assert not out[:, :, 1].isfinite().any() and not expected[:, :, 1].isfinite().any()
    torch.testing.assert_close(lse, expected_lse, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_scores_of_any_size_and_nan(kernel):
    q, quantised, seen, books, scale = case_of([[2, 2]])
    q *= 300
    check(kernel, (q, quantised, seen, books, scale))
    q[0, 1, 1] = torch.nan
    out, _ = kernel(q, quantised, seen, books, scale)
    assert out[0, 1, 1].isnan().all() and out[0, 0].isfinite().all() and out[0, 1, 0].isfinite().all()


@pytest.mark.skipif(HAS_GPU, reason="fences are the CPU's memory")
def test_nothing_outside_is_touched(kernel):
    q, quantised, seen, books, scale, rotary = pre_rope(case_of([[2, 9]]))
    fenced = []
    for tensor in (q, quantised, seen, books, rotary):
        memory, before = fenced_memory(tensor.nbytes)
        inside = memory.view(tensor.dtype).view(tensor.shape)
        fenced.append((inside.copy_(tensor), before))
    *inside, inside_rotary = (inside for inside, _ in fenced)
    for more in ((), (rotary,)):
        expected = kernel(q, quantised, seen, books, scale, *more)
        found = kernel(*inside, scale, *([inside_rotary] if more else []))
        assert torch.equal(found[0], expected[0])
    assert all((before == 0xA7).all() for _, before in fenced)


def test_what_does_not_fit_is_refused(kernel):
    q, quantised, seen, books, scale = case_of([[1]])
    for change in (
        (q, quantised[..., 4:], seen, books, scale),
        (q, quantised, seen.long(), books, scale),
        (q, quantised, seen, books.float(), scale),
        (q, quantised, seen, books[:, :, :100].contiguous(), scale),
        (q, quantised, seen, books, -1.0),
        (q, quantised, seen, books, scale, torch.zeros(128, 2, 32)),
        (q, quantised, seen, books, scale, None, seen.long()),
    ):
        with pytest.raises(RuntimeError):
            kernel(*change)
