"""The Triton kernel of rms_norm against float64, and the row rule bit for bit."""

import pytest
import torch

from tests.helpers.on_gpu import assert_close

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.rms_norm import rms_norm  # noqa: E402
from pyspec.ops.rms_norm import rms_norm_reference  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Rounding to the nearest, but to zero where the interpreter makes bf16.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def run(hidden, delta, weight, out_dtype=torch.float32, delta_weight=None, bias=None, centred=False, hidden_scale=1.0):
    """The launcher's result and what became of hidden."""
    hidden = hidden.to(DEVICE, copy=True)
    delta, weight, delta_weight, bias = (
        None if tensor is None else tensor.to(DEVICE) for tensor in (delta, weight, delta_weight, bias)
    )
    out = rms_norm(hidden, delta, weight, 1e-5, out_dtype, delta_weight, bias, centred, hidden_scale)
    return out.cpu(), hidden.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 15), (5, 576), (2, 4100), (0, 64)])
@pytest.mark.parametrize("has_delta", [False, True])
def test_equals_float64(rows, size, dtype, has_delta):
    torch.manual_seed(size)
    hidden, delta, weight = torch.randn(rows, size) * 5, torch.randn(rows, size), torch.randn(size)
    total = hidden.double() + (delta.double() if has_delta else 0)
    expected = total / (total.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double()
    out, changed = run(hidden, delta if has_delta else None, weight, dtype)
    assert out.dtype == dtype
    assert_close(changed, hidden + delta if has_delta else hidden, atol=0, rtol=0)
    assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("has_weight", [False, True])
def test_a_delta_may_be_normed_before_it_is_added_and_the_sum_scaled(has_weight):
    torch.manual_seed(0)
    hidden, delta, weight, delta_weight = (torch.randn(*shape) for shape in ((3, 577), (3, 577), (577,), (577,)))
    expected = hidden.clone()
    settings = (weight if has_weight else None, 1e-5, torch.float32)
    found = rms_norm_reference(expected, delta, *settings, delta_weight, hidden_scale=0.3)
    out, changed = run(hidden, delta, settings[0], delta_weight=delta_weight, hidden_scale=0.3)
    assert_close(changed, expected, atol=2e-6, rtol=2e-6)
    assert_close(out, found, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("has_bias", [False, True])
def test_centred_it_is_a_layer_norm(has_bias):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(3, 577) * 5 + 30, torch.randn(577), torch.randn(577) if has_bias else None
    parts = [None if part is None else part.double() for part in (weight, bias)]
    out, changed = run(hidden, None, weight, bias=bias, centred=True)
    assert torch.equal(changed, hidden)
    expected = torch.nn.functional.layer_norm(hidden.double(), (577,), *parts, 1e-5)
    assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_rows_that_are_groups_have_weights_of_their_own():
    hidden, weight = torch.randn(6, 48), torch.randn(3, 48)
    out, _ = run(hidden, None, weight)
    for group in range(3):
        alone, _ = run(hidden[group::3].contiguous(), None, weight[group])
        assert torch.equal(out[group::3], alone)


def test_a_row_has_the_bits_it_has_alone():
    generator = torch.Generator().manual_seed(0)
    memory, delta, weight = (torch.randn(*shape, generator=generator) for shape in ((9 * 577 + 1,), (9, 577), (577,)))
    hidden = memory[1:].view(9, 577)  # rows at every alignment
    hidden[4, 3] = torch.nan  # stays in its row
    together, _ = run(hidden, delta, weight)
    for row in range(9):
        alone, _ = run(hidden[row : row + 1].clone(), delta[row : row + 1], weight)
        assert torch.equal(alone[0], together[row]) or row == 4
    assert together.isnan().any(1).tolist() == [row == 4 for row in range(9)]
