"""The recurrent ops against closed forms in float64 and, bit for bit, plain decoding, on every instruction set."""

import functools
import random

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round
from pyspec.ops.selective_state import from_panels
from tests.helpers.every_backend import each_backend, each_kernel
from tests.helpers.recurrent_layers import (
    DELTA_LAYERS,
    NODES,
    SELECTIVE_LAYERS,
    SEQUENCES,
    DeltaLayer,
    SelectiveLayer,
    decode,
    rows_of,
)
from tests.helpers.rounds import chain_round, random_tree, root_path

LAYERS = {f"selective_state, {name}": functools.partial(SelectiveLayer, **of) for name, of in SELECTIVE_LAYERS.items()}
LAYERS |= {f"gated_delta, {name}": functools.partial(DeltaLayer, **of) for name, of in DELTA_LAYERS.items()}
SMALL = {
    "selective_state": functools.partial(SelectiveLayer, heads=2, head_dim=16, states=16),
    "gated_delta": functools.partial(DeltaLayer, heads=2, head_dim=16, keys=16),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def call(layer, inputs: dict, round: Round, **options) -> torch.Tensor:
    return layer.call(inputs, round, **options)


WALKERS = "selective_state", "gated_delta"
run, isa = each_backend(call, *WALKERS), each_kernel(call, *WALKERS)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return request.param()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_each_path_is_a_sum_over_its_past(run, layer, dtype):
    before, tree = layer.state[2].clone(), random_tree(17, seed=3)
    inputs = layer.inputs(17, dtype)
    out = run(layer, inputs, Round.of([tree], [2], [[]], [1]), out_dtype=dtype)
    assert out.dtype == dtype and torch.equal(layer.state[2], before)
    for node in range(17):
        y, _ = layer.expected(from_panels(before), rows_of(inputs, root_path(tree, node)))
        close = {"atol": TOLERANCE[dtype] * float(y.std()), "rtol": 4 * TOLERANCE[dtype]}
        torch.testing.assert_close(out[node].double(), y[-1], **close)


def test_a_replay_gives_the_state_behind_the_path(run, layer):
    before, tree, inputs = layer.state[2].clone(), random_tree(9, seed=1), layer.inputs(9)
    run(layer, inputs, Round.of([tree], [2], [[]], [1]))
    path = root_path(tree, 8)
    run(layer, layer.inputs(1), Round.of([DraftTree.chain([0])], [2], [path], [0]))
    _, state = layer.expected(from_panels(before), rows_of(inputs, path))
    torch.testing.assert_close(from_panels(layer.state[2]).double(), state, atol=1e-5, rtol=1e-5)


def test_what_is_not_used_may_be_nan(run, layer):
    run(layer, layer.inputs(3), Round.of([DraftTree([0] * 3, [-1, 0, 0])], [2], [[]], [0]))
    round = Round.of([DraftTree.chain([0] * 2), DraftTree.chain([0])], [2, 0], [[0, 2], []], [1, 0])
    layer.state[0] = 0.0
    out = run(layer, layer.inputs(3), round)
    assert out.isfinite().all() and layer.state[[0, 2]].isfinite().all()
    assert layer.state[[1, 3]].isnan().all() and layer.record[:, [1, 3]].isnan().all()
    assert layer.record[0, 2, :2].isfinite().all() and layer.record[0, 2, 2:].isnan().all()
    assert layer.record[1, 0, :1].isfinite().all() and layer.record[0, 0].isnan().all()


# ==== bits ====


def test_many_nodes_have_the_bits_of_one_at_a_time(isa, layer):
    """Verifying 1 to 16 nodes, prompts in any chunks, and the states behind them, against plain decoding."""
    start, inputs = layer.state.clone(), layer.inputs(16)
    plain = decode(layer, inputs)
    state = layer.state[2].clone()
    for nodes in range(1, 17):
        layer.state.copy_(start)
        out = layer.call(rows_of(inputs, slice(nodes)), chain_round(nodes, 2))
        assert torch.equal(out, plain[:nodes]) and torch.equal(layer.state[2], start[2])
    for cuts in ([16], [1, 15], [5, 4, 7]):
        layer.state.copy_(start)
        parts, first = [], 0
        for cut in cuts:
            part = rows_of(inputs, slice(first, first + cut))
            parts.append(layer.call(part, chain_round(cut, 2, advance=True)))
            first += cut
        assert torch.equal(torch.cat(parts), plain) and torch.equal(layer.state[2], state)


def test_a_replay_of_any_length_has_the_bits_of_plain_decoding(isa, layer):
    start, inputs, probe = layer.state.clone(), layer.inputs(8), layer.inputs(3)
    for accepted in range(9):
        layer.state.copy_(start)
        decode(layer, rows_of(inputs, slice(accepted)))
        state = layer.state[2].clone()
        expected = layer.call(probe, chain_round(3, 2))
        layer.state.copy_(start)
        layer.call(inputs, chain_round(8, 2, half=1))
        out = layer.call(probe, chain_round(3, 2, range(accepted)))
        assert torch.equal(layer.state[2], state) and torch.equal(out, expected)
        again = layer.call(probe, chain_round(3, 2))
        assert torch.equal(again, expected)


def test_trees_and_batches_have_the_bits_of_their_paths(isa, layer):
    start, tree, other = layer.state.clone(), random_tree(NODES, seed=5), random_tree(7, seed=6)
    start[0].normal_()
    layer.state.copy_(start)
    inputs = layer.inputs(7 + NODES)
    both = Round.of([other, tree], [0, 2], [[], []], [0, 1])
    out = layer.call(inputs, both)
    ours = rows_of(inputs, slice(7, None))
    for node in range(NODES):
        path = root_path(tree, node)
        layer.state.copy_(start)
        chain = layer.call(rows_of(ours, path), chain_round(len(path), 2, half=1))
        assert torch.equal(chain[-1], out[7 + node])

    # another value in a node changes it and what is below, as far as it is remembered, and no others
    changed = {name: value.clone() for name, value in inputs.items() if value is not None}
    changed = inputs | changed
    changed["x" if "x" in changed else "v"][7 + 5] += 1
    layer.state.copy_(start)
    differs = set((layer.call(changed, both) != out).any(1).nonzero()[:, 0].tolist())
    below = {7 + node for node in range(NODES) if 5 in root_path(tree, node)}
    children = {7 + node for node in tree.children(5)}
    assert {7 + 5} | children <= differs <= below and children

    # a path that branches off, replayed in a batch in which the others have none
    path = root_path(tree, NODES - 1)
    layer.state.copy_(start)
    layer.call(inputs, both)
    sequence_0 = layer.state[0].clone()
    after = Round.of([DraftTree.chain([0] * 2), DraftTree.chain([0])], [0, 2], [[], path], [1, 0])
    layer.call(layer.inputs(3), after)
    replayed = layer.state[2].clone()
    assert torch.equal(layer.state[0], sequence_0)
    layer.state.copy_(start)
    decode(layer, rows_of(ours, path))
    assert torch.equal(layer.state[2], replayed)


def test_siblings_may_come_in_any_order(isa, layer):
    """Nodes renumbered, parents still first: every node has the bits it had."""
    tree = random_tree(NODES, seed=9)
    inputs, parents = layer.inputs(NODES), tree.parents.tolist()
    expected = layer.call(inputs, Round.of([tree], [2], [[]], [0]))
    for seed in range(5):
        generator, order, ready = random.Random(seed), [], [0]
        while ready:
            node = ready.pop(generator.randrange(len(ready)))
            order.append(node)
            ready += tree.children(node)
        places = {node: place for place, node in enumerate(order)}
        other = DraftTree([0] * NODES, [-1] + [places[parents[node]] for node in order[1:]])
        out = layer.call(rows_of(inputs, order), Round.of([other], [2], [[]], [0]))
        assert torch.equal(out, expected[order])


def test_one_tree_may_advance_beside_another_that_is_verified(isa, layer):
    layer.state[0].normal_()
    start, inputs = layer.state.clone(), layer.inputs(9)
    expected = layer.call(rows_of(inputs, slice(5)), chain_round(5, 0, advance=True))
    moved = layer.state[0].clone()
    tree = DraftTree([0] * 4, [-1, 0, 0, 1])
    layer.state.copy_(start)
    other = layer.call(rows_of(inputs, slice(5, None)), Round.of([tree], [2], [[]], [0]))
    layer.state.copy_(start)
    layer.record[:] = torch.nan
    both = Round.of([DraftTree.chain([0] * 5), tree], [0, 2], [[], []], [0, 0], advances=[True, False])
    assert torch.equal(layer.call(inputs, both), torch.cat((expected, other)))
    assert torch.equal(layer.state[0], moved) and torch.equal(layer.state[2], start[2])
    assert layer.record[:, 0].isnan().all() and layer.record[1, 2, :4].isfinite().all()


@pytest.mark.parametrize("small", SMALL.values(), ids=SMALL)
def test_random_rounds_do_not_drift(isa, small):
    """Random trees, paths and rounds without drafts in a ragged batch; after each, the states of plain decoding."""
    layer, plain = small(), small()
    layer.state[:] = 0.0
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
        layer.call(inputs, round)
        first = 0
        for b, tree in zip(active, trees, strict=True):
            for node in paths[b]:
                plain.call(texts[b][node], chain_round(1, b, advance=True))
            assert torch.equal(layer.state[b], plain.state[b]), turn
            texts[b] = [rows_of(inputs, [first + node]) for node in range(len(tree))]
            end = int(torch.randint(-1, len(tree), (), generator=generator))
            paths[b], halves[b] = root_path(tree, end), 1 - halves[b]  # no path: nothing was committed
            first += len(tree)
    assert layer.state.isfinite().all()


def test_the_bit_tests_have_teeth(isa, layer):
    """A recorded node changed by one unit in the last place shows in the state."""
    start, inputs = layer.state.clone(), layer.inputs(4)
    states = []
    for change in (0, 1):
        layer.state.copy_(start)
        layer.call(inputs, chain_round(4, 2, half=1))
        layer.record[0, 2, 1].view(torch.int32)[:] += change
        layer.call(layer.inputs(1), chain_round(1, 2, [0, 1, 2]))
        states.append(layer.state[2].clone())
    assert not torch.equal(*states)
