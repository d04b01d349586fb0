"""swiglu against float64, on every instruction set, and the row rule bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from pyspec.ops import swiglu
from pyspec.ops.swiglu import ACTIVATIONS
from tests.helpers.every_backend import assert_same, each_backend, each_kernel

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
run, kernel = each_backend(swiglu), each_kernel(swiglu)


def activated(gate, up, activation):
    if activation == "clamped":
        gate, up = gate.clamp(max=7), up.clamp(-7, 7) + 1
        return gate / (1 + (-1.702 * gate).exp()) * up
    if activation == "sigmoid":
        return up / (1 + (-gate).exp())
    if activation == "gelu":
        return gate / 2 * torch.erfc(-gate / 2**0.5) * up
    if activation in ("relu", "none"):
        return (gate * (gate > 0) if activation == "relu" else gate) * up
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 17), (2, 512), (2, 1100), (0, 8)])
def test_equals_float64(run, rows, size, activation, dtype):
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)) * 6
    gate, up = gate_up.double().split(size, 1)
    expected = activated(gate, up, activation)
    out = run(gate_up, activation=activation, out_dtype=dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ups_may_be_apart(run, activation):
    gate_up = torch.randn(5, 2 * 577)
    gate, up = gate_up.split(577, 1)
    assert torch.equal(run(gate, up=up, activation=activation), run(gate_up, activation=activation))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rows_may_be_parts_of_longer_ones(run, dtype):
    """Gates behind other columns, and ups of another dtype than fp32."""
    wide, ups = torch.randn(5, 600), torch.randn(5, 90).to(dtype)
    expected = run(wide[:, 7:84].contiguous(), up=ups[:, 3:80].float(), activation="sigmoid")
    assert_same(run(wide[:, 7:84], up=ups[:, 3:80], activation="sigmoid"), expected)
    assert_same(run(wide[:, 1:21]), run(wide[:, 1:21].contiguous()))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_far_gates(run, activation):
    gates = torch.tensor([[-1e30, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30, torch.nan]])
    out = run(torch.cat((gates, torch.ones_like(gates)), 1), activation=activation)[0]
    assert out[:3].abs().max() < 1e-6 and torch.equal(out[3:7], gates[0, 3:7]) and out[7].isnan()


def test_far_gates_and_ups_are_clamped(run):
    far = torch.tensor([[-1e30, 1e30, 8.0, torch.nan, 0.0], [-1e30, 1e30, -9.0, 0.0, torch.nan]])
    out = run(far.flatten()[None], activation="clamped")[0]
    seven = 7 / (1 + torch.tensor(-7 * 1.702).exp())
    torch.testing.assert_close(out, torch.stack((out[0] * 0, 8 * seven, -6 * seven, out[3], out[4])), equal_nan=True)
    assert out[3:].isnan().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_has_the_bits_it_has_alone(kernel, activation):
    gate_up = torch.randn(33, 2 * 577)
    alone = torch.cat([kernel(row[None], activation=activation) for row in gate_up])
    assert torch.equal(kernel(gate_up, activation=activation), alone)


def test_opcheck():
    torch.library.opcheck(torch.ops.pyspec.swiglu.default, (torch.randn(3, 20), torch.bfloat16, 1))


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="gate_up must be float32"):
        swiglu(torch.zeros(1, 2).half())
    with pytest.raises(ValueError, match=r"gate_up must be \[rows, 2 \* size\], got shape \(1, 3\)"):
        swiglu(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"up must have shape \(1, 3\), got \(1, 2\)"):
        swiglu(torch.zeros(1, 3), up=torch.zeros(1, 2))
    with pytest.raises(TypeError, match="up must be float32, float16 or bfloat16"):
        swiglu(torch.zeros(1, 2), up=torch.zeros(1, 2).double())
    with pytest.raises(ValueError, match="activation must be silu or .* or none or gelu, got 'tanh'"):
        swiglu(torch.zeros(1, 2), activation="tanh")
    with pytest.raises(TypeError, match="out_dtype must be"):
        swiglu(torch.zeros(1, 2), out_dtype=torch.float64)
