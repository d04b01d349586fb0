"""route_experts and mix_experts: both against float64, ties, order, and the row rule bit for bit."""

import numpy as np
import pytest
import torch

from pyspec.ops.route_experts import mix_experts, route_experts
from tests.helpers.every_backend import each_backend, each_kernel, same_bits
from tests.helpers.linear_cases import random

route, mix = each_backend(route_experts), each_backend(mix_experts)
route_kernel, mix_kernel = each_kernel(route_experts), each_kernel(mix_experts)


def expected_routes(logits, choices, bias, sigmoid, renormalise, scale):
    """Row by row, in float64."""
    values = logits.double().numpy()
    powers = np.exp(values - values.max(-1, keepdims=True))
    scores = 1 / (1 + np.exp(-values)) if sigmoid else powers / powers.sum(-1, keepdims=True)
    keys = scores + (0 if bias is None else bias.double().numpy())
    gates, ids = [], []
    for row, key in zip(scores, keys, strict=True):
        best = sorted(range(len(key)), key=lambda e: (-key[e], e))[:choices]
        ids.append(best)
        gates.append(row[best] / (row[best].sum() if renormalise else 1) * scale)
    return torch.tensor(np.array(gates)), torch.tensor(ids)


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_routes_match_float64(route, sigmoid, renormalise):
    for rows, experts, choices in ((1, 1, 1), (3, 8, 2), (7, 60, 4), (5, 128, 8), (2, 1024, 1024)):
        logits = 3 * random(rows, experts)
        for bias in (None, random(experts, seed=1)):
            options = {"bias": bias, "sigmoid": sigmoid, "renormalise": renormalise, "scale": 1.5}
            gates, ids = route(logits, choices, **options)
            expected_gates, expected_ids = expected_routes(logits, choices, **options)
            assert ids.dtype == torch.int32 and gates.dtype == torch.float32
            assert torch.equal(ids.long(), expected_ids)
            torch.testing.assert_close(gates.double(), expected_gates, rtol=1e-5, atol=1e-9)


def test_gates_may_have_scales_of_their_experts(route):
    logits, scales = random(7, 60), random(60, seed=2)
    plain, ids = route(logits, 4, renormalise=True, scale=1.5)
    gates, found = route(logits, 4, renormalise=True, scale=1.5, scales=scales)
    assert torch.equal(found, ids)
    torch.testing.assert_close(gates, plain * scales[ids.long()])


def test_of_equals_the_lower_number_comes_first(route):
    logits = torch.zeros(2, 40)
    logits[1, [7, 30]] = 1.0
    assert route(logits, 4)[1].tolist() == [[0, 1, 2, 3], [7, 30, 0, 1]]


def test_numbers_are_in_range_whatever_the_logits_are(route):
    for value in (torch.nan, torch.inf, -torch.inf):
        logits = random(3, 20)
        logits[1], logits[2, 5] = value, value
        gates, ids = route(logits, 20)
        assert all(sorted(row) == list(range(20)) for row in ids.tolist())
        assert gates[0].isfinite().all()


def test_a_row_has_the_bits_it_has_alone(route_kernel):
    logits = random(9, 60)
    gates, ids = route_kernel(logits, 4, renormalise=True)
    for row in range(9):
        alone = route_kernel(logits[row : row + 1], 4, renormalise=True)
        assert same_bits(alone[0], gates[row : row + 1]) and same_bits(alone[1], ids[row : row + 1])


def mix_case(rows, choices, size):
    values, gates = random(rows * choices, size), random(rows, choices, seed=1)
    return values, gates, random(rows, size, seed=2), random(rows, 1, seed=3)


def test_mixes_match_float64(mix):
    for rows, choices, size in ((1, 1, 1), (3, 2, 40), (2, 8, 515), (5, 4, 1024)):
        values, gates, shared, shared_gates = mix_case(rows, choices, size)
        expected = torch.einsum("rcn,rc->rn", values.view(rows, choices, size).double(), gates.double())
        for others, more in (
            ((), 0),
            ((shared,), shared.double()),
            ((shared, shared_gates), shared.double() * shared_gates.double()),
        ):
            found = mix(values, gates, *others)
            torch.testing.assert_close(found.double(), expected + more, rtol=1e-5, atol=1e-5)


def test_mixes_add_in_the_order_of_choices(mix_kernel):
    """Of 1, 2^30 and -2^30 the order decides what is left, in whole vectors and behind them."""
    values = torch.tensor([2.0**30, -(2.0**30), 1.0])[:, None].expand(3, 35).contiguous()
    assert mix_kernel(values, torch.ones(1, 3)).unique().tolist() == [1.0]
    assert mix_kernel(values.flip(0).contiguous(), torch.ones(1, 3)).unique().tolist() == [0.0]


def test_a_mix_has_the_bits_it_has_alone(mix_kernel):
    values, gates, shared, shared_gates = mix_case(7, 3, 45)
    found = mix_kernel(values, gates, shared, shared_gates)
    for row in range(7):
        parts = (values[3 * row : 3 * row + 3], *(part[row : row + 1] for part in (gates, shared, shared_gates)))
        assert same_bits(mix_kernel(*parts), found[row : row + 1])


@pytest.mark.parametrize(
    "error, message, given",
    [
        (TypeError, "logits must be float32, got torch.float64", (torch.zeros(2, 4).double(), 2)),
        (ValueError, r"logits must be a matrix, got shape \(4,\)", (torch.zeros(4), 2)),
        (ValueError, "logits must be contiguous", (torch.zeros(4, 2).T, 2)),
        (ValueError, "logits must be of 1 to 1024 experts, got 1025", (torch.zeros(2, 1025), 2)),
        (ValueError, r"choices must be in \[1, 4\], got 5", (torch.zeros(2, 4), 5)),
        (ValueError, r"choices must be in \[1, 4\], got 0", (torch.zeros(2, 4), 0)),
    ],
)
def test_bad_routes(error, message, given):
    with pytest.raises(error, match=message):
        route_experts(*given)
    with pytest.raises(ValueError, match=r"bias must have shape \(4,\)"):
        route_experts(torch.zeros(2, 4), 2, bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"scales must have shape \(4,\)"):
        route_experts(torch.zeros(2, 4), 2, scales=torch.zeros(5))


def test_bad_mixes():
    values, gates, shared, shared_gates = mix_case(3, 2, 8)
    for message, given in (
        (r"gates must be \[rows, choices\] of 6 values, got shape \(3, 1\)", (values, gates[:, :1])),
        ("shared_gates must come with shared", (values, gates, None, shared_gates)),
        (r"shared must have shape \(3, 8\)", (values, gates, shared[:2])),
        (r"shared_gates must have shape \(3, 1\)", (values, gates, shared, shared_gates[:2])),
        ("values must be contiguous", (values.T.contiguous().T, gates)),
    ):
        with pytest.raises(ValueError, match=message):
            mix_experts(*given)
