"""swiglu against float64, on every instruction set, and the row rule bit for bit."""

import pytest
import torch
import torch.nn.functional as F

from pyspec.ops import swiglu
from pyspec.ops.swiglu import ACTIVATIONS
from tests.helpers.every_backend import each_backend, each_kernel

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
run, kernel = each_backend(swiglu), each_kernel(swiglu)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 17), (2, 512), (2, 1100), (0, 8)])
def test_equals_float64(run, rows, size, activation, dtype):
    gate_up = torch.randn(rows, 2 * size, generator=torch.Generator().manual_seed(size)) * 6
    gate, up = gate_up.double().split(size, 1)
    expected = (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    out = run(gate_up, activation=activation, out_dtype=dtype)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_gates(run, activation):
    gates = torch.tensor([[-1e30, -200.0, -89.0, 0.0, 89.0, 200.0, 1e30, torch.nan]])
    out = run(torch.cat((gates, torch.ones_like(gates)), 1), activation=activation)[0]
    assert out[:3].abs().max() < 1e-6 and torch.equal(out[3:7], gates[0, 3:7]) and out[7].isnan()


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
    with pytest.raises(ValueError, match="activation must be silu or gelu_tanh, got 'relu'"):
        swiglu(torch.zeros(1, 2), activation="relu")
    with pytest.raises(TypeError, match="out_dtype must be"):
        swiglu(torch.zeros(1, 2), out_dtype=torch.float64)
