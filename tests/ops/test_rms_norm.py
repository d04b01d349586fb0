"""rms_norm against float64, on every instruction set, and the row rule bit for bit."""

import numpy as np
import pytest
import torch

from pyspec.ops import rms_norm
from tests.helpers.every_backend import each_backend, each_kernel

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
run, kernel = each_backend(rms_norm), each_kernel(rms_norm)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 15), (5, 16), (4, 577), (0, 64)])
@pytest.mark.parametrize("has_delta", [False, True])
def test_equals_float64(run, rows, size, dtype, has_delta):
    torch.manual_seed(size)
    hidden, delta, weight = torch.randn(rows, size) * 5, torch.randn(rows, size), torch.randn(size)
    total = hidden.double().numpy() + (delta.double().numpy() if has_delta else 0)
    expected = total / np.sqrt((total**2).mean(1, keepdims=True) + 1e-5) * weight.double().numpy()
    out = run(hidden, weight, 1e-5, delta=delta if has_delta else None, out_dtype=dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(hidden.double(), torch.from_numpy(total), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        out.double(), torch.from_numpy(expected).reshape(rows, size), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )


def test_rows_that_are_groups_have_weights_of_their_own(run):
    hidden, weight = torch.randn(6, 48), torch.randn(3, 48)
    out = run(hidden, weight, 1e-5)
    for group in range(3):
        torch.testing.assert_close(out[group::3], run(hidden[group::3].contiguous(), weight[group], 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_may_be_parts_of_longer_ones(run, dtype):
    torch.manual_seed(0)
    wide, delta, weight = torch.randn(4, 90), torch.randn(4, 37), torch.randn(37)
    kept, alone = wide.clone(), wide[:, 5:42].contiguous()
    expected = run(alone, weight, 1e-5, delta=delta, out_dtype=dtype)
    assert torch.equal(run(wide[:, 5:42], weight, 1e-5, delta=delta, out_dtype=dtype), expected)
    kept[:, 5:42] = alone
    assert torch.equal(wide, kept)


@pytest.mark.parametrize("size", [15, 577])
@pytest.mark.parametrize("has_weight", [False, True])
def test_a_delta_may_be_normed_before_it_is_added(run, size, has_weight):
    torch.manual_seed(size)
    hidden, delta, weights = torch.randn(4, size) * 5, torch.randn(4, size) * 3, torch.randn(2, size)

    def normed(x, weight):
        return x / (x.square().mean(1, keepdim=True) + 1e-2).sqrt() * weight.double()

    total = hidden.double() + normed(delta.double(), weights[0])
    out = run(hidden, weights[1] if has_weight else None, 1e-2, delta=delta, delta_weight=weights[0])
    torch.testing.assert_close(hidden.double(), total, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(out.double(), normed(total, weights[1]) if has_weight else total, atol=2e-6, rtol=2e-6)
    assert out.data_ptr() != hidden.data_ptr()


@pytest.mark.parametrize("size", [15, 577])
@pytest.mark.parametrize("is_normed", [False, True])
def test_the_sum_may_be_scaled(run, size, is_normed):
    torch.manual_seed(size)
    hidden, delta, weights = torch.randn(4, size), torch.randn(4, size) * 3, torch.randn(2, size)
    expected, plain = hidden.clone(), {"delta": delta, "delta_weight": weights[0] if is_normed else None}
    run(expected, None, 1e-2, **plain)
    total = expected.double() * 0.3
    out = run(hidden, weights[1], 1e-2, hidden_scale=0.3, **plain)
    torch.testing.assert_close(hidden.double(), total, atol=1e-6, rtol=1e-6)
    normed = total / (total.square().mean(1, keepdim=True) + 1e-2).sqrt() * weights[1].double()
    torch.testing.assert_close(out.double(), normed, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 15), (5, 16), (4, 577), (0, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_centred_it_is_a_layer_norm(run, rows, size, dtype, has_bias):
    torch.manual_seed(size)
    hidden, delta = torch.randn(rows, size) * 5 + 30, torch.randn(rows, size)
    weight, bias = torch.randn(size), torch.randn(size) if has_bias else None
    total = hidden + delta
    parts = [None if part is None else part.double() for part in (weight, bias)]
    expected = torch.nn.functional.layer_norm(total.double(), (size,), *parts, 1e-5)
    out = run(hidden, weight, 1e-5, delta=delta, bias=bias, centred=True, out_dtype=dtype)
    tolerance = max(2e-5, TOLERANCE[dtype])
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(hidden, total)  # with its mean


@pytest.mark.parametrize("centred", [False, True])
def test_a_layer_norm_of_a_row_has_the_bits_it_has_alone(kernel, centred):
    hidden, options = torch.randn(9, 577), {"bias": torch.randn(577), "centred": centred}
    weight = torch.randn(577)
    together = kernel(hidden.clone(), weight, 1e-5, **options)
    for row in range(9):
        assert torch.equal(kernel(hidden[row : row + 1].clone(), weight, 1e-5, **options)[0], together[row])


def test_a_row_has_the_bits_it_has_alone(kernel):
    hidden, weight, delta = torch.randn(64, 577), torch.randn(577), torch.randn(64, 577)
    hidden[7, 3] = torch.nan  # stays in its row

    def normed(rows):
        rest = {"delta": delta[rows].clone(), "delta_weight": weight, "out_dtype": torch.bfloat16}
        return kernel(hidden[rows].clone(), weight, 1e-5, **rest)

    together, alone = normed(slice(None)), torch.cat([normed(slice(row, row + 1)) for row in range(64)])
    assert torch.equal(together.view(torch.int16), alone.view(torch.int16))
    assert together.isnan().any(1).tolist() == [row == 7 for row in range(64)]


def test_opcheck():
    args = (torch.randn(3, 20), torch.randn(3, 20), torch.randn(20), 1e-5, torch.bfloat16, torch.randn(20))
    torch.library.opcheck(torch.ops.pyspec.rms_norm.default, args)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"hidden": torch.zeros(2, 3).double()}, TypeError, "hidden must be float32"),
        ({"hidden": torch.zeros(3, 2).T}, ValueError, "hidden must be .* contiguous"),
        ({"weight": torch.zeros(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
        ({"weight": torch.zeros(2, 4)}, ValueError, r"weight must have shape \(2, 3\), got \(2, 4\)"),
        ({"weight": torch.zeros(3, 3)}, ValueError, "hidden must have a multiple of weight's 3 groups as rows, got 2"),
        ({"delta": torch.zeros(1, 3)}, ValueError, r"delta must have shape \(2, 3\)"),
        ({"delta_weight": torch.zeros(3)}, ValueError, "delta_weight must be None where there is no delta"),
        (
            {"delta": torch.zeros(2, 3), "delta_weight": torch.zeros(2)},
            ValueError,
            r"delta_weight must have shape \(3,\)",
        ),
        ({"hidden_scale": 2.0}, ValueError, "hidden_scale must be 1 where there is no delta, got 2.0"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"bias": torch.zeros(3), "weight": None}, ValueError, "weight must be there for a bias"),
        ({"centred": True, "weight": None}, ValueError, "weight must be there .* where rows are centred"),
        (
            {"centred": True, "delta": torch.zeros(2, 3), "delta_weight": torch.zeros(3)},
            ValueError,
            "delta_weight must be None where rows are centred",
        ),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(3), "epsilon": 1e-5} | changed
    with pytest.raises(error, match=message):
        rms_norm(**arguments)
