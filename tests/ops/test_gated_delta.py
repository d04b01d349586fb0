"""gated_delta: what it takes and refuses; test_recurrent_ops.py has its values and bits."""

import pytest
import torch

from pyspec.ops import gated_delta
from tests.helpers.every_backend import KERNELS
from tests.helpers.recurrent_layers import NODES, DeltaLayer
from tests.helpers.rounds import chain_round


def test_opcheck():
    layer = DeltaLayer()
    inputs = [layer.inputs(3)[name] for name in ("q", "k", "v", "decay", "beta")]
    rest = (layer.A, layer.dt_bias, *chain_round(3, 2).tensors(), 1.0, False, torch.bfloat16)
    args = (torch.zeros_like(layer.state), torch.zeros_like(layer.record), *inputs, *rest)
    torch.library.opcheck(torch.ops.pyspec.gated_delta.default, args)


def test_traces_as_one_graph():
    layer = DeltaLayer()
    layer.state[:] = 0.0
    inputs, round = layer.inputs(3), chain_round(3, 2)
    expected = layer.call(inputs, round)
    compiled = torch.compile(lambda: layer.call(inputs, round), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expected)


def test_a_head_that_forgets_all_keeps_its_last_value():
    """With decay and beta at their ends the state is k v, and the answer v for the same key."""
    layer = DeltaLayer(heads=1, head_dim=16)
    layer.A[:], layer.dt_bias[:] = -50.0, 0.0
    inputs = layer.inputs(1)
    inputs["q"] = inputs["k"] * 3
    inputs["decay"], inputs["beta"] = torch.full((1, 1), 25.0), torch.full((1, 1), 50.0)
    out = layer.call(inputs, chain_round(1, 2, advance=True))
    torch.testing.assert_close(out, inputs["v"] / 4)  # sqrt(16 keys)
    state = layer.state[2, 0]
    torch.testing.assert_close(state.norm(), inputs["v"].norm())


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"state": torch.zeros(4, 4, 8, 16)}, ValueError, r"state must be .* got \(4, 4, 8, 16\)"),
        ({"state": torch.zeros(4, 4, 0, 16)}, ValueError, r"state must be .* got \(4, 4, 0, 16\)"),
        ({"state": torch.zeros(4, 3, 16, 16)}, ValueError, "A must have heads of a multiple of 16 channels"),
        ({"state": None}, TypeError, "state"),
        ({"q": torch.zeros(3, 48)}, ValueError, "q must have key heads of 16 that divide the 2 heads, got 48"),
        ({"q": torch.zeros(3, 8)}, ValueError, "q must have key heads of 16 that divide the 2 heads, got 8"),
        ({"q": torch.zeros(3, 20)}, ValueError, r"q must have shape \(3, 16\), got \(3, 20\)"),
        ({"k": torch.zeros(3, 32)}, ValueError, r"k must have shape \(3, 16\), got \(3, 32\)"),
        ({"k": torch.zeros(3, 16).half()}, TypeError, "k must be float32"),
        ({"v": torch.zeros(3, 48)}, ValueError, r"v must have shape \(3, 64\), got \(3, 48\)"),
        ({"v": torch.zeros(3, 64).double()}, TypeError, "v must be float32, float16 or bfloat16"),
        ({"v": torch.zeros(64, 3).T}, ValueError, "v must have a contiguous last"),
        ({"decay": torch.zeros(3, 3)}, ValueError, r"decay must be \[rows, 2\] or \[rows, 32\], got \(3, 3\)"),
        ({"decay": torch.zeros(3, 32)}, ValueError, r"record must have shape \(2, 4, 24, 112\)"),
        ({"decay": torch.zeros(3, 2).half()}, TypeError, "decay must be float32"),
        ({"beta": torch.zeros(2, 2)}, ValueError, r"beta must have shape \(3, 2\)"),
        ({"A": torch.zeros(0)}, ValueError, "A must have heads of a multiple of 16 channels, got 0"),
        ({"A": torch.zeros(1, 2)}, ValueError, r"A must have shape \(2,\)"),
        ({"dt_bias": torch.zeros(3)}, ValueError, r"dt_bias must have shape \(2,\)"),
        ({"record": torch.zeros(2, 4, 24, 80)}, ValueError, r"record must have shape \(2, 4, 24, 82\)"),
        ({"strength": 0.0}, ValueError, r"strength must be in \(0, 2\], got 0.0"),
        ({"strength": 2.5}, ValueError, r"strength must be in \(0, 2\], got 2.5"),
        ({"strength": float("nan")}, ValueError, r"strength must be in \(0, 2\], got nan"),
        ({"strength": True}, ValueError, r"strength must be in \(0, 2\], got True"),
        ({"tiled": 1}, TypeError, "tiled must be True or False, got 1"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
        ({"round": [0]}, TypeError, "round must be a Round"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    layer = DeltaLayer()
    given = {"state": layer.state, "record": layer.record, **layer.inputs(3), **layer.weights()}
    with pytest.raises(error, match=message):
        gated_delta(**given | {"round": chain_round(3, 2)} | changed)


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
def test_places_outside_are_refused_before_anything_is_written():
    layer = DeltaLayer()
    before = layer.state.clone(), layer.record.clone()
    for round, message in (
        (chain_round(3, 4), r"sequences\[0\] is 4"),
        (chain_round(3, 2, [0, NODES]), r"paths\[0\]\[1\] is 24, must be a recorded node, of 24"),
        (chain_round(2, 2), "parents must have one entry for each of the 3 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.call(layer.inputs(3), round)
    torch.testing.assert_close((layer.state, layer.record), before, equal_nan=True, atol=0, rtol=0)
