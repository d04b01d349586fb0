"""The Triton kernel of swiglu against float64, and the row rule bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.on_gpu import assert_close

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from pyspec.kernels.swiglu import swiglu  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("kernel_device"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # NumPy's, in the exponential of a far gate
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 17), (2, 1100), (0, 8)])
def test_equals_float64(rows, size, activation, dtype):
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)) * 6
    gate, up = gate_up.double().split(size, 1)
    out = swiglu(gate_up.to(DEVICE), dtype, activation).cpu()
    assert out.dtype == dtype
    expected = (F.gelu(gate, approximate="tanh") if activation else F.silu(gate)) * up
    if activation == 2:
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        expected = gate / (1 + (-1.702 * gate).exp()) * up
    if activation > 3:
        expected = (gate if activation == 5 else gate.relu()) * up
    assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_ups_may_be_apart():
    gate_up = torch.randn(3, 2 * 577).to(DEVICE)
    gate, up = gate_up.split(577, 1)
    assert torch.equal(swiglu(gate, torch.float32, 1, up), swiglu(gate_up, torch.float32, 1))


@pytest.mark.parametrize("activation", [0, 1])
def test_far_gates(activation):
    gates = torch.tensor([[-1e30, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30, torch.nan]])
    out = swiglu(torch.cat((gates, torch.ones_like(gates)), 1).to(DEVICE), torch.float32, activation)[0].cpu()
    assert out[:3].abs().max() < 1e-6 and torch.equal(out[3:7], gates[0, 3:7]) and out[7].isnan()


def test_a_row_has_the_bits_it_has_alone():
    gate_up = torch.randn(9, 2 * 577, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    alone = torch.cat([swiglu(row[None].clone(), torch.float32, 1) for row in gate_up])
    assert torch.equal(swiglu(gate_up, torch.float32, 1), alone)
