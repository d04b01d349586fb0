"""The Triton kernel of merge_attention against the reference."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")

from pyspec.kernels.merge_attention import merge_attention  # noqa: E402
from pyspec.ops.merge_attention import merge_attention_reference  # noqa: E402


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.float16, 2e-3)], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 80), (2, 3, 7, 128)])
def test_matches_the_reference(kernel_device, shape, dtype, tolerance):
    a, b = (torch.randn(shape, device=kernel_device).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:-1], device=kernel_device) * 10 for _ in range(2))
    for found, expected in zip(
        merge_attention(a, lse_a, b, lse_b), merge_attention_reference(a, lse_a, b, lse_b), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_empty_sides(kernel_device):
    full, garbage = torch.randn(2, 64, device=kernel_device), torch.full((2, 64), torch.nan, device=kernel_device)
    lse, none = torch.randn(2, device=kernel_device), torch.full((2,), -torch.inf, device=kernel_device)
    for args in ((full, lse, garbage, none), (garbage, none, full, lse)):
        out, merged = merge_attention(*args)
        torch.testing.assert_close(out, full)
        torch.testing.assert_close(merged, lse)
    out, merged = merge_attention(garbage, none, garbage, none)
    assert (out == 0).all() and (merged == -torch.inf).all()


def test_strides(kernel_device):
    a = torch.randn(2, 5, 3, 64, device=kernel_device).transpose(1, 2)
    lse = torch.randn(2, 5, 3, device=kernel_device).transpose(1, 2)
    b, lse_b = torch.randn(2, 3, 5, 64, device=kernel_device), torch.randn(2, 3, 5, device=kernel_device)
    for found, expected in zip(
        merge_attention(a, lse, b, lse_b), merge_attention_reference(a, lse, b, lse_b), strict=True
    ):
        torch.testing.assert_close(found, expected)
