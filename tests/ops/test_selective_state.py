"""selective_state: what it takes and refuses; test_recurrent_ops.py has its values and bits."""

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round, selective_state
from tests.helpers.every_backend import KERNELS
from tests.helpers.recurrent_layers import NODES, SelectiveLayer
from tests.helpers.rounds import chain_round


def test_opcheck():
    layer = SelectiveLayer()
    inputs, weights = layer.inputs(3), layer.weights()
    tensors = (*(inputs[name] for name in ("x", "dt")), weights["A"], inputs["B"], inputs["C"])
    rest = (weights["D"], weights["dt_bias"], inputs["z"], *chain_round(3, 2).tensors(), torch.bfloat16)
    args = (torch.zeros_like(layer.state), torch.zeros_like(layer.record), *tensors, *rest)
    torch.library.opcheck(torch.ops.pyspec.selective_state.default, args)


def test_traces_as_one_graph():
    layer = SelectiveLayer()
    layer.state[:] = 0.0
    inputs, round = layer.inputs(3), chain_round(3, 2)
    expected = layer.call(inputs, round)
    compiled = torch.compile(lambda: layer.call(inputs, round), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), expected)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"state": torch.zeros(4, 4, 8, 16)}, ValueError, r"state must be .* got \(4, 4, 8, 16\)"),
        ({"state": torch.zeros(4, 3, 16, 16)}, ValueError, "dt must have heads of a multiple of 16 channels"),
        ({"x": torch.zeros(3, 48)}, ValueError, r"x must have shape \(3, 64\), got \(3, 48\)"),
        ({"x": torch.zeros(64, 3).T}, ValueError, "x must have a contiguous last"),
        ({"x": torch.zeros(3, 64).double()}, TypeError, "x must be float32, float16 or bfloat16"),
        ({"dt": torch.zeros(3, 2).half()}, TypeError, "dt must be float32"),
        ({"dt": torch.zeros(2, 2)}, ValueError, r"dt must have shape \(3, 2\)"),
        ({"B": torch.zeros(3, 48)}, ValueError, "dt must have a multiple of the 3 groups"),
        ({"B": torch.zeros(3, 16).half()}, TypeError, "B must be float32"),
        ({"C": torch.zeros(3, 32)}, ValueError, r"C must have shape \(3, 16\)"),
        ({"A": torch.zeros(3)}, ValueError, r"A must have shape \(2,\)"),
        ({"A": torch.zeros(4, 16, 16)}, ValueError, r"A in panels needs dt \[rows, 64\]"),
        ({"D": torch.zeros(2)}, ValueError, r"D must have shape \(64,\)"),
        ({"z": torch.zeros(3, 2)}, ValueError, r"z must have shape \(3, 64\)"),
        ({"record": torch.zeros(2, 4, 24, 80)}, ValueError, r"record must have shape \(2, 4, 24, 82\)"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    ],
)
def test_bad_input_is_named(changed, error, message):
    layer = SelectiveLayer()
    given = {"state": layer.state, "record": layer.record, **layer.inputs(3), **layer.weights()}
    with pytest.raises(error, match=message):
        selective_state(**given | {"round": chain_round(3, 2)} | changed)


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
def test_places_outside_are_refused_before_anything_is_written():
    layer = SelectiveLayer()
    before = layer.state.clone(), layer.record.clone()
    for round, message in (
        (chain_round(3, 4), r"sequences\[0\] is 4"),
        (chain_round(3, 2, [0, NODES]), r"paths\[0\]\[1\] is 24, must be a recorded node, of 24"),
        (chain_round(2, 2), "parents must have one entry for each of the 3 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.call(layer.inputs(3), round)
    torch.testing.assert_close((layer.state, layer.record), before, equal_nan=True, atol=0, rtol=0)


def test_a_round_moves_to_another_device_in_one_piece():
    round = Round.of([DraftTree([0] * 3, [-1, 0, 0]), DraftTree.chain([0])], [2, 0], [[0, 2], []], [1, 0])
    for moved, tensor in zip(round.to("cpu").tensors(), round.tensors(), strict=True):
        assert moved.is_contiguous() and torch.equal(moved, tensor) and moved.dtype == torch.int32
    shapes = [tensor.shape for tensor in round.to("meta").tensors()]
    assert shapes == [tensor.shape for tensor in round.tensors()]
