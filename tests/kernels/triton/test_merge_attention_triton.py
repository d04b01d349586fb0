"""The Triton kernel of merge_attention: two parts merged are the attention over all keys."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.merge_attention import merge_attention  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def merge(*parts):
    return tuple(tensor.cpu() for tensor in merge_attention(*(to_device(part, DEVICE) for part in parts)))


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 5, 80), (40, 128), (7, 5)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_make_the_whole(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(*shape[:-1], 24, generator=generator, dtype=torch.float64)
    values = torch.randn(24, shape[-1], generator=generator, dtype=torch.float64)
    parts = []
    for keys in (slice(0, 9), slice(9, 24)):
        parts += [(scores[..., keys].softmax(-1) @ values[keys]).to(dtype), scores[..., keys].logsumexp(-1).float()]
    out, lse = merge(*parts)
    assert out.dtype == dtype and out.shape == shape and lse.shape == shape[:-1]
    tolerance = TOLERANCE[dtype]
    assert_close(out.double(), scores.softmax(-1) @ values, atol=tolerance, rtol=tolerance)
    assert_close(lse.double(), scores.logsumexp(-1), atol=2e-6, rtol=2e-6)


def test_a_part_without_keys_may_hold_anything():
    out, nan = torch.randn(4, 64), torch.full((4, 64), torch.nan)
    lse, empty = torch.randn(4), torch.full((4,), -torch.inf)
    for found in (merge(out, lse, nan, empty), merge(nan, empty, out, lse)):
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    both_out, both_lse = merge(nan, empty, nan, empty)
    assert (both_out == 0).all() and (both_lse == -torch.inf).all()


def test_far_apart_scores_do_not_overflow():
    lse_a, lse_b = torch.tensor([1e4, -1e4]), torch.tensor([-1e4, 1e4])
    out, lse = merge(torch.ones(2, 64), lse_a, torch.zeros(2, 64), lse_b)
    assert torch.equal(out[0], torch.ones(64)) and torch.equal(out[1], torch.zeros(64))
    assert torch.equal(lse, torch.full((2,), 1e4))


def test_strides_and_nan():
    out_a, out_b = torch.randn(64, 6).T, torch.randn(6, 64)
    lse_a, lse_b = torch.randn(12)[::2], torch.randn(6)
    expected = merge(out_a.contiguous(), lse_a.contiguous(), out_b, lse_b)
    found = merge(out_a, lse_a, out_b, lse_b)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]) and found[0].is_contiguous()
    out_b[2, 5] = torch.nan
    assert merge(out_a, lse_a, out_b, lse_b)[0].isnan().nonzero().tolist() == [[2, 5]]


def test_empty():
    out, lse = merge(torch.zeros(0, 64), torch.zeros(0), torch.zeros(0, 64), torch.zeros(0))
    assert out.shape == (0, 64) and lse.shape == (0,)
