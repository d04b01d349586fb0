"""merge_attention: two attentions over disjoint keys against the attention over both, in float64."""

import pytest
import torch

from pyspec.ops import merge_attention
from tests.helpers.every_backend import assert_same, each_backend

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
run = each_backend(merge_attention)


def attention(scores: torch.Tensor, values: torch.Tensor):
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("head_dim", [1, 64, 80])
def test_equals_attention_over_both(run, shape, head_dim, dtype):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(*shape, 20, dtype=torch.float64, generator=generator) * 10
    values = torch.randn(*shape, 20, head_dim, dtype=torch.float64, generator=generator)
    expected, expected_lse = (
        x.squeeze(-2) if i == 0 else x.squeeze(-1) for i, x in enumerate(attention(scores[..., None, :], values))
    )
    parts = []
    for keys in (slice(0, 6), slice(6, 20)):
        out, lse = attention(scores[..., None, keys], values[..., keys, :])
        parts += [out.squeeze(-2).to(dtype), lse.squeeze(-1).float()]
    out, lse = run(*parts)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-6)


def test_empty_sides(run):
    full, garbage = torch.randn(3, 64), torch.full((3, 64), torch.nan)
    lse, none = torch.randn(3), torch.full((3,), -torch.inf)
    for args in ((full, lse, garbage, none), (garbage, none, full, lse)):
        out, merged = run(*args)
        assert torch.equal(out, full) and torch.equal(merged, lse)
    out, merged = run(garbage, none, garbage, none)
    assert torch.equal(out, torch.zeros(3, 64)) and torch.equal(merged, none)


def test_far_apart_sides_do_not_overflow(run):
    a, b = torch.ones(1, 8), torch.full((1, 8), 2.0)
    out, lse = run(a, torch.tensor([1e4]), b, torch.tensor([-1e4]))
    assert torch.equal(out, a) and lse.item() == 1e4


def test_nan_is_not_hidden(run):
    a = torch.ones(1, 8)
    for lses in ((torch.nan, 0.0), (0.0, torch.nan)):
        out, lse = run(a, torch.tensor([lses[0]]), a, torch.tensor([lses[1]]))
        assert lse.isnan().all() and out.isnan().all()


def test_strides(run):
    a, b = torch.randn(2, 5, 3, 64).transpose(1, 2), torch.randn(2, 3, 5, 64)
    lse_a, lse_b = torch.randn(2, 5, 3).transpose(1, 2), torch.randn(2, 3, 5)
    found = run(a, lse_a, b, lse_b)
    expected = run(a.contiguous(), lse_a.contiguous(), b, lse_b)
    for x, y in zip(found, expected, strict=True):
        assert_same(x, y)


def test_opcheck_and_compile():
    args = (torch.randn(2, 4, 64), torch.randn(2, 4), torch.randn(2, 4, 64), torch.randn(2, 4))
    torch.library.opcheck(torch.ops.pyspec.merge_attention.default, args)
    compiled = torch.compile(lambda *args: merge_attention(*args)[0] * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*args), merge_attention(*args)[0] * 2)


@pytest.mark.parametrize(
    "error, name, index, value",
    [
        (TypeError, "out_a and out_b", 0, torch.zeros(2, 64, dtype=torch.float64)),
        (TypeError, "out_a and out_b", 2, torch.zeros(2, 64, dtype=torch.float16)),
        (TypeError, "lse_a", 1, torch.zeros(2, dtype=torch.float16)),
        (ValueError, "out_b", 2, torch.zeros(2, 32)),
        (ValueError, "lse_b", 3, torch.zeros(3)),
        (ValueError, "lse_b", 3, torch.zeros(2, device="meta")),
    ],
)
def test_bad_input_names_the_argument(error, name, index, value):
    args = [torch.zeros(2, 64), torch.zeros(2), torch.zeros(2, 64), torch.zeros(2)]
    args[index] = value
    with pytest.raises(error, match=f"^{name} must"):
        merge_attention(*args)
