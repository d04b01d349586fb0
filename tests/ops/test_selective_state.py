"""selective_state: every instruction set against a closed form in float64, and plain decoding bit for bit."""

import random
from dataclasses import dataclass

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round, selective_state
from pyspec.ops.selective_state import from_panels, to_panels
from tests.helpers.every_backend import KERNELS, each_backend, each_kernel
from tests.helpers.rounds import chain_round, random_tree, root_path

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SEQUENCES, NODES = 4, 24
run, isa = each_backend(selective_state), each_kernel(selective_state)


@dataclass
class Layer:
    """A layer of Mamba (head_dim 1) or Mamba-2, with room for SEQUENCES; what is not used is NaN."""

    heads: int = 2
    head_dim: int = 32
    groups: int = 1
    states: int = 16
    has_d: bool = True
    has_z: bool = True

    def __post_init__(self):
        torch.manual_seed(self.heads + self.states)
        self.channels = self.heads * self.head_dim
        rates = (self.channels, self.states) if self.head_dim == 1 else (self.heads,)
        self.A = -torch.rand(rates).mul(3).exp()  # -1 to -20
        self.D = torch.randn(self.channels) if self.has_d else None
        self.dt_bias = torch.randn(self.heads)
        self.state = torch.full((SEQUENCES, self.channels // 16, self.states, 16), torch.nan)
        self.state[2].normal_()
        width = self.channels + self.heads + self.groups * self.states
        self.record = torch.full((2, SEQUENCES, NODES, width), torch.nan)

    def inputs(self, rows: int, dtype=torch.float32) -> dict:
        dt = torch.randn(rows, self.heads)
        dt[rows // 2, 0] = 25.0  # beyond where softplus is the identity
        B_size = self.groups * self.states
        wide = torch.randn(rows, self.channels + 2 * B_size + 8).to(dtype)
        x, B, C, _ = wide.split([self.channels, B_size, B_size, 8], 1)
        z = torch.randn(rows, self.channels) if self.has_z else None
        return {"x": x, "dt": dt, "B": B, "C": C, "z": z}

    def weights(self) -> dict:
        A = to_panels(self.A) if self.A.dim() == 2 else self.A
        return {"A": A, "D": self.D, "dt_bias": self.dt_bias}

    def call(self, run, inputs: dict, round: Round, **options) -> torch.Tensor:
        return run(self.state, self.record, **inputs, **self.weights(), round=round, **options)

    def expected(self, before: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """y [n, channels] and the last state [channels, states] of a text in float64, each as one sum over its past.

        Not a recurrence: s[t] = e^(A (dt[0] + ... + dt[t])) s + sum over u <= t of e^(A (dt[u+1] + ... + dt[t])) ...
        """
        x, dt, B, C, z = (None if value is None else value.double() for value in inputs.values())
        rows = len(x)
        dt = (torch.log1p((dt + self.dt_bias).exp())).repeat_interleave(self.head_dim, 1)  # [n, channels]
        B, C = (
            value.view(rows, self.groups, self.states).repeat_interleave(self.channels // self.groups, 1)
            for value in (B, C)
        )
        A = self.A.double()
        A = A if A.dim() == 2 else A.repeat_interleave(self.head_dim)[:, None]
        passed = dt.cumsum(0)[..., None] * A  # [n, channels, N or 1]
        decays = (passed[:, None] - passed[None]).exp()  # [t, u, channels, ...]
        decays = decays * torch.ones(rows, rows).tril()[..., None, None]
        added = (dt * x)[..., None] * B
        states = passed.exp() * before.double() + (decays.nan_to_num(0, 0) * added).sum(1)
        y = (states * C).sum(2)
        if self.D is not None:
            y += self.D * x
        if z is not None:
            y *= torch.nn.functional.silu(z)
        return y, states[-1]


LAYERS = {
    "mamba": {"heads": 80, "head_dim": 1},
    "mamba, 32 states": {"heads": 16, "head_dim": 1, "states": 32},
    "mamba2": {"heads": 3, "head_dim": 64, "states": 128},
    "mamba2, heads of 80": {"heads": 2, "head_dim": 80, "states": 64},
    "mamba2, 8 groups": {"heads": 16, "head_dim": 16, "groups": 8},
    "mamba2 without D and z": {"has_d": False, "has_z": False},
}


def rows_of(inputs: dict, rows) -> dict:
    return {name: None if value is None else value[rows] for name, value in inputs.items()}


def decode(layer: Layer, inputs: dict, sequence: int = 2) -> torch.Tensor:
    """Plain decoding: each round replays the one node of the round before. The state is behind the last node."""
    half, out = 0, []
    for row in range(len(inputs["x"])):
        path = [0] if row else []
        out.append(layer.call(selective_state, rows_of(inputs, [row]), chain_round(1, sequence, path, half)))
        half = 1 - half
    replay = Round.of([DraftTree.chain([0])], [sequence], [[0] if out else []], [half])
    layer.call(selective_state, layer.inputs(1), replay)
    return torch.cat(out) if out else torch.empty(0, layer.channels)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_each_path_is_a_sum_over_its_past(run, shape, dtype):
    layer = Layer(**shape)
    before, tree = layer.state[2].clone(), random_tree(17, seed=3)
    inputs = layer.inputs(17, dtype)
    out = layer.call(run, inputs, Round.of([tree], [2], [[]], [1]), out_dtype=dtype)
    assert out.dtype == dtype and torch.equal(layer.state[2], before)
    for node in range(17):
        y, _ = layer.expected(from_panels(before), rows_of(inputs, root_path(tree, node)))
        close = {"atol": TOLERANCE[dtype] * float(y.std()), "rtol": 4 * TOLERANCE[dtype]}
        torch.testing.assert_close(out[node].double(), y[-1], **close)


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_a_replay_gives_the_state_behind_the_path(run, shape):
    layer = Layer(**shape)
    before, tree, inputs = layer.state[2].clone(), random_tree(9, seed=1), layer.inputs(9)
    layer.call(run, inputs, Round.of([tree], [2], [[]], [1]))
    path = root_path(tree, 8)
    layer.call(run, layer.inputs(1), Round.of([DraftTree.chain([0])], [2], [path], [0]))
    _, state = layer.expected(from_panels(before), rows_of(inputs, path))
    torch.testing.assert_close(from_panels(layer.state[2]).double(), state, atol=1e-5, rtol=1e-5)


def test_what_is_not_used_may_be_nan(run):
    layer = Layer()
    layer.call(run, layer.inputs(3), Round.of([DraftTree([0] * 3, [-1, 0, 0])], [2], [[]], [0]))
    round = Round.of([DraftTree.chain([0] * 2), DraftTree.chain([0])], [2, 0], [[0, 2], []], [1, 0])
    layer.state[0] = 0.0
    out = layer.call(run, layer.inputs(3), round)
    assert out.isfinite().all() and layer.state[[0, 2]].isfinite().all()
    assert layer.state[[1, 3]].isnan().all() and layer.record[:, [1, 3]].isnan().all()
    assert layer.record[0, 2, :2].isfinite().all() and layer.record[0, 2, 2:].isnan().all()
    assert layer.record[1, 0, :1].isfinite().all() and layer.record[0, 0].isnan().all()


# ==== bits ====


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_many_nodes_have_the_bits_of_one_at_a_time(isa, shape):
    """Verifying 1 to 16 nodes, prompts in any chunks, and the states behind them, against plain decoding."""
    layer = Layer(**shape)
    start, inputs = layer.state.clone(), layer.inputs(16)
    plain = decode(layer, inputs)
    state = layer.state[2].clone()
    for nodes in range(1, 17):
        layer.state.copy_(start)
        out = layer.call(selective_state, rows_of(inputs, slice(nodes)), chain_round(nodes, 2))
        assert torch.equal(out, plain[:nodes]) and torch.equal(layer.state[2], start[2])
    for cuts in ([16], [1, 15], [5, 4, 7]):
        layer.state.copy_(start)
        parts, first = [], 0
        for cut in cuts:
            part = rows_of(inputs, slice(first, first + cut))
            parts.append(layer.call(selective_state, part, chain_round(cut, 2, advance=True)))
            first += cut
        assert torch.equal(torch.cat(parts), plain) and torch.equal(layer.state[2], state)


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_a_replay_of_any_length_has_the_bits_of_plain_decoding(isa, shape):
    layer = Layer(**shape)
    start, inputs, probe = layer.state.clone(), layer.inputs(8), layer.inputs(3)
    for accepted in range(9):
        layer.state.copy_(start)
        decode(layer, rows_of(inputs, slice(accepted)))
        state = layer.state[2].clone()
        expected = layer.call(selective_state, probe, chain_round(3, 2))
        layer.state.copy_(start)
        layer.call(selective_state, inputs, chain_round(8, 2, half=1))
        out = layer.call(selective_state, probe, chain_round(3, 2, range(accepted)))
        assert torch.equal(layer.state[2], state) and torch.equal(out, expected)
        again = layer.call(selective_state, probe, chain_round(3, 2))
        assert torch.equal(again, expected)


@pytest.mark.parametrize("shape", LAYERS.values(), ids=LAYERS)
def test_trees_and_batches_have_the_bits_of_their_paths(isa, shape):
    layer = Layer(**shape)
    start, tree, other = layer.state.clone(), random_tree(NODES, seed=5), random_tree(7, seed=6)
    start[0].normal_()
    layer.state.copy_(start)
    inputs = layer.inputs(7 + NODES)
    both = Round.of([other, tree], [0, 2], [[], []], [0, 1])
    out = layer.call(selective_state, inputs, both)
    ours = rows_of(inputs, slice(7, None))
    for node in range(NODES):
        path = root_path(tree, node)
        layer.state.copy_(start)
        chain = layer.call(selective_state, rows_of(ours, path), chain_round(len(path), 2, half=1))
        assert torch.equal(chain[-1], out[7 + node])

    # another value in a node changes it and what is below, as far as it is remembered, and no others
    changed = {name: value.clone() for name, value in inputs.items() if value is not None}
    changed = inputs | changed
    changed["x"][7 + 5] += 1
    layer.state.copy_(start)
    differs = set((layer.call(selective_state, changed, both) != out).any(1).nonzero()[:, 0].tolist())
    below = {7 + node for node in range(NODES) if 5 in root_path(tree, node)}
    children = {7 + node for node in tree.children(5)}
    assert {7 + 5} | children <= differs <= below and children

    # a path that branches off, replayed in a batch in which the others have none
    path = root_path(tree, NODES - 1)
    layer.state.copy_(start)
    layer.call(selective_state, inputs, both)
    sequence_0 = layer.state[0].clone()
    after = Round.of([DraftTree.chain([0] * 2), DraftTree.chain([0])], [0, 2], [[], path], [1, 0])
    layer.call(selective_state, layer.inputs(3), after)
    replayed = layer.state[2].clone()
    assert torch.equal(layer.state[0], sequence_0)
    layer.state.copy_(start)
    decode(layer, rows_of(ours, path))
    assert torch.equal(layer.state[2], replayed)


def test_siblings_may_come_in_any_order(isa):
    """Nodes renumbered, parents still first: every node has the bits it had."""
    layer, tree = Layer(), random_tree(NODES, seed=9)
    inputs, parents = layer.inputs(NODES), tree.parents.tolist()
    expected = layer.call(selective_state, inputs, Round.of([tree], [2], [[]], [0]))
    for seed in range(5):
        generator, order, ready = random.Random(seed), [], [0]
        while ready:
            node = ready.pop(generator.randrange(len(ready)))
            order.append(node)
            ready += tree.children(node)
        places = {node: place for place, node in enumerate(order)}
        other = DraftTree([0] * NODES, [-1] + [places[parents[node]] for node in order[1:]])
        out = layer.call(selective_state, rows_of(inputs, order), Round.of([other], [2], [[]], [0]))
        assert torch.equal(out, expected[order])


def test_one_tree_may_advance_beside_another_that_is_verified(isa):
    layer = Layer()
    layer.state[0].normal_()
    start, inputs = layer.state.clone(), layer.inputs(9)
    expected = layer.call(selective_state, rows_of(inputs, slice(5)), chain_round(5, 0, advance=True))
    moved = layer.state[0].clone()
    tree = DraftTree([0] * 4, [-1, 0, 0, 1])
    layer.state.copy_(start)
    other = layer.call(selective_state, rows_of(inputs, slice(5, None)), Round.of([tree], [2], [[]], [0]))
    layer.state.copy_(start)
    layer.record[:] = torch.nan
    both = Round.of([DraftTree.chain([0] * 5), tree], [0, 2], [[], []], [0, 0], advances=[True, False])
    assert torch.equal(layer.call(selective_state, inputs, both), torch.cat((expected, other)))
    assert torch.equal(layer.state[0], moved) and torch.equal(layer.state[2], start[2])
    assert layer.record[:, 0].isnan().all() and layer.record[1, 2, :4].isfinite().all()


def test_random_rounds_do_not_drift(isa):
    """Random trees, paths and rounds without drafts in a ragged batch; after each, the states of plain decoding."""
    layer = Layer(heads=2, head_dim=16, states=16)
    layer.state[:] = 0.0
    plain = Layer(heads=2, head_dim=16, states=16)
    plain.state[:] = 0.0
    generator = torch.Generator().manual_seed(0)
    paths, halves = [[] for _ in range(SEQUENCES)], [0] * SEQUENCES
    texts = [[] for _ in range(SEQUENCES)]
    for turn in range(200):
        active = [b for b in range(SEQUENCES) if torch.rand((), generator=generator) < 0.7]
        if not active:
            continue
        sizes = torch.randint(1, 8, (len(active),), generator=generator).tolist()
        trees = [random_tree(size, turn + size) for size in sizes]
        inputs = layer.inputs(sum(sizes))
        round = Round.of(trees, active, [paths[b] for b in active], [halves[b] for b in active])
        layer.call(selective_state, inputs, round)
        first = 0
        for b, tree in zip(active, trees, strict=True):
            for node in paths[b]:
                plain.call(selective_state, texts[b][node], chain_round(1, b, advance=True))
            assert torch.equal(layer.state[b], plain.state[b]), turn
            texts[b] = [rows_of(inputs, [first + node]) for node in range(len(tree))]
            end = int(torch.randint(-1, len(tree), (), generator=generator))
            paths[b], halves[b] = root_path(tree, end), 1 - halves[b]  # no path: nothing was committed
            first += len(tree)
    assert layer.state.isfinite().all()


def test_the_bit_tests_have_teeth(isa):
    """One recorded value changed by one unit in the last place shows in the state."""
    layer = Layer()
    start, inputs = layer.state.clone(), layer.inputs(4)
    states = []
    for change in (0, 1):
        layer.state.copy_(start)
        layer.call(selective_state, inputs, chain_round(4, 2, half=1))
        layer.record[0, 2, 1, : layer.channels].view(torch.int32)[-1] += change
        layer.call(selective_state, layer.inputs(1), chain_round(1, 2, [0, 1, 2]))
        states.append(layer.state[2].clone())
    assert not torch.equal(*states)


# ==== what does not fit ====


def test_opcheck():
    layer = Layer()
    inputs, weights = layer.inputs(3), layer.weights()
    tensors = (*(inputs[name] for name in ("x", "dt")), weights["A"], inputs["B"], inputs["C"])
    rest = (weights["D"], weights["dt_bias"], inputs["z"], *chain_round(3, 2).tensors(), torch.bfloat16)
    args = (torch.zeros_like(layer.state), torch.zeros_like(layer.record), *tensors, *rest)
    torch.library.opcheck(torch.ops.pyspec.selective_state.default, args)


def test_traces_as_one_graph():
    layer = Layer()
    layer.state[:] = 0.0
    inputs, round = layer.inputs(3), chain_round(3, 2)
    expected = layer.call(selective_state, inputs, round)
    compiled = torch.compile(lambda: layer.call(selective_state, inputs, round), fullgraph=True, backend="aot_eager")
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
    layer = Layer()
    given = {"state": layer.state, "record": layer.record, **layer.inputs(3), **layer.weights()}
    with pytest.raises(error, match=message):
        selective_state(**given | {"round": chain_round(3, 2)} | changed)


@pytest.mark.skipif(not KERNELS, reason="the reference leaves places to torch's own indexing")
def test_places_outside_are_refused_before_anything_is_written():
    layer = Layer()
    before = layer.state.clone(), layer.record.clone()
    for round, message in (
        (chain_round(3, 4), r"sequences\[0\] is 4"),
        (chain_round(3, 2, [0, NODES]), r"paths\[0\]\[1\] is 24, must be a recorded node, of 24"),
        (chain_round(2, 2), "parents must have one entry for each of the 3 rows"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.call(selective_state, layer.inputs(3), round)
    torch.testing.assert_close((layer.state, layer.record), before, equal_nan=True, atol=0, rtol=0)


def test_a_round_moves_to_another_device_in_one_piece():
    round = Round.of([DraftTree([0] * 3, [-1, 0, 0]), DraftTree.chain([0])], [2, 0], [[0, 2], []], [1, 0])
    for moved, tensor in zip(round.to("cpu").tensors(), round.tensors(), strict=True):
        assert moved.is_contiguous() and torch.equal(moved, tensor) and moved.dtype == torch.int32
    shapes = [tensor.shape for tensor in round.to("meta").tensors()]
    assert shapes == [tensor.shape for tensor in round.tensors()]
