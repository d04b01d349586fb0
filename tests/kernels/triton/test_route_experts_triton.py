"""The Triton kernels of route_experts and mix_experts against their references, and the row rule bit for bit."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.route_experts import mix_experts, route_experts  # noqa: E402
from pyspec.ops.route_experts import mix_experts_reference, route_experts_reference  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered"),  # NumPy's, of what is tested
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_gates_may_have_scales_of_their_experts():
    logits, scales = numbers(3, 9), numbers(9, seed=1)
    expected = route_experts_reference(logits, None, 4, False, True, 1.5, scales)
    found = route_experts(logits.to(DEVICE), None, 4, False, True, 1.5, scales.to(DEVICE))
    torch.testing.assert_close(found[0].cpu(), expected[0])
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.mark.parametrize("sigmoid", [False, True])
@pytest.mark.parametrize("renormalise", [False, True])
def test_routes_are_those_of_the_reference(sigmoid, renormalise):
    for rows, experts, choices in ((1, 1, 1), (3, 60, 4), (2, 128, 8)):
        logits = 3 * numbers(rows, experts)
        for bias in (None, numbers(experts, seed=1)):
            options = choices, sigmoid, renormalise, 1.5
            gates, ids = route_experts(logits.to(DEVICE), None if bias is None else bias.to(DEVICE), *options)
            expected = route_experts_reference(logits, bias, *options)
            assert torch.equal(ids.cpu(), expected[1])
            torch.testing.assert_close(gates.cpu(), expected[0], rtol=1e-5, atol=1e-7)


def test_ties_and_numbers_that_are_none():
    logits = torch.zeros(3, 40)
    logits[1, [7, 30]] = 1.0
    logits[2] = torch.nan
    ids = route_experts(logits.to(DEVICE), None, 4, False, False, 1.0)[1].cpu()
    assert ids.tolist() == [[0, 1, 2, 3], [7, 30, 0, 1], [0, 1, 2, 3]]


def test_mixes_are_those_of_the_reference():
    for rows, choices, size in ((1, 1, 1), (3, 4, 40), (2, 8, 1100)):
        values, gates = numbers(rows * choices, size), numbers(rows, choices, seed=1)
        shared, shared_gates = numbers(rows, size, seed=2), numbers(rows, 1, seed=3)
        for others in ((None, None), (shared, None), (shared, shared_gates)):
            given = (values, gates, *others)
            found = mix_experts(*(None if part is None else part.to(DEVICE) for part in given)).cpu()
            torch.testing.assert_close(found, mix_experts_reference(*given), rtol=1e-5, atol=1e-5)
    on_device = [part.to(DEVICE) for part in (values, gates)]
    alone = [
        mix_experts(on_device[0][8 * row : 8 * row + 8], on_device[1][row : row + 1], None, None) for row in (0, 1)
    ]
    assert torch.equal(mix_experts(*on_device, None, None), torch.cat(alone))
