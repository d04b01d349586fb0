"""Replays: rounds of fixed shape, with a recorder in place of CUDA graphs, have the bits of rounds of any shape.

tests/kernels/triton/test_llama_triton.py runs them through the GPU's kernels.
"""

import random

import numpy as np
import pytest
import torch

import pyspec.runners.attention
import pyspec.runners.native
from pyspec import DraftTree, generate
from pyspec.caches.dense import slots_for
from pyspec.caches.state import Plan
from pyspec.machine.costs import measure_costs
from pyspec.runners.numbers import Numbers
from pyspec.runners.replay import Replays
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import by_slot, random_llama, random_tokens, random_tree, root_path, verify_all
from tests.helpers.runner_checks import check_taps


@pytest.fixture
def static_llama(monkeypatch):
    """random_llama with static shapes, whose cache starts as full of NaN as memory may be."""
    monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
    monkeypatch.setattr(FakeRecorder, "recorded", 0)
    monkeypatch.setattr(FakeRecorder, "replayed", set())
    empty_cache = pyspec.runners.attention.DenseCache

    def full_of_nan(*args):
        cache = empty_cache(*args)
        cache.keys_values.fill_(torch.nan)
        return cache

    def make(**options):
        return with_graphs(random_llama(**options))

    monkeypatch.setattr(pyspec.runners.attention, "DenseCache", full_of_nan)
    return make


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "windows": (6, None)}, {"dtype": torch.int8, "biases": True}],
    ids=["float32", "bfloat16 with a window", "int8 with biases"],
)
def test_has_the_bits_of_the_runners_own_path(static_llama, options, sequences, monkeypatch):
    """Over random batches: padding, sequences that sit out, trees beyond the largest bucket, several slot sizes."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 64)
    static, dynamic = static_llama(**options), random_llama(**options)
    generator = random.Random(sequences)
    prompts = [random_tokens(generator.choice((1, 20, 130)), seed) for seed in range(sequences)]
    for ours, theirs in zip(static.prefill(prompts, capacity=320), dynamic.prefill(prompts, capacity=320), strict=True):
        assert torch.equal(ours, theirs)
    for seed in range(12):
        sizes = [generator.choice((1, 2, 3, 8, 13, 33, 64, 70)) for _ in range(sequences)]
        trees = [random_tree(size, 10 * seed + index) for index, size in enumerate(sizes)]
        if sequences > 1 and seed % 3:
            trees[generator.randrange(sequences)] = None
        trees = by_slot(trees)
        found, expected = static.verify(trees), dynamic.verify(trees)
        assert list(found) == list(expected) == list(trees)
        for slot in trees:  # and what the graph found beside them, too
            assert torch.equal(found[slot].logits, expected[slot].logits)
            assert all(map(np.array_equal, found[slot].statistics, expected[slot].statistics))
        paths = {slot: root_path(tree, generator.randrange(len(tree))) for slot, tree in trees.items()}
        static.commit(paths)
        dynamic.commit(paths)
        assert static.lengths() == dynamic.lengths()
        for index, length in enumerate(static.lengths()):
            keys_values = (runner._cache.keys_values[:, :, index, :, :length] for runner in (static, dynamic))
            assert torch.equal(*keys_values)


def test_one_recording_for_each_shape(static_llama, monkeypatch):
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 128)
    runner = static_llama()

    def recordings(size):
        before = FakeRecorder.recorded
        runner.verify({0: random_tree(size)})
        return FakeRecorder.recorded - before

    runner.prefill([random_tokens(60)], capacity=300)
    assert FakeRecorder.recorded == 0  # a prompt is read once
    assert [recordings(size) for size in (3, 4, 2, 3, 64, 40, 33, 65, 200)] == [1, 0, 1, 0, 1, 0, 0, 0, 0]
    runner.verify({0: DraftTree.chain(random_tokens(65))})
    runner.commit({0: range(65)})
    assert [recordings(size) for size in (3, 4)] == [1, 0]  # 125 and 4 do not fit 128
    assert [recordings(size) for size in (2, 1)] == [0, 1]

    runner.prefill([random_tokens(20, 1)], capacity=383)  # a slot for padding makes 384, as before
    assert [recordings(size) for size in (3, 60)] == [0, 0]
    runner.prefill([random_tokens(20, 1)], capacity=384)
    assert [recordings(size) for size in (3, 60)] == [1, 1]
    runner.prefill([[1], [2]], capacity=10)
    runner.verify({0: random_tree(3), 1: random_tree(2)})
    assert FakeRecorder.recorded == 8


@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("capacity", [1, 5, 127, 128, 300])
def test_what_warm_records_is_what_later_calls_replay(static_llama, monkeypatch, sequences, capacity):
    """Prompts, and trees of every size up to 64, from the first slot to the last."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 128)
    runner = static_llama()
    runner.warm(capacity, sequences)
    assert runner.lengths() == []
    with pytest.raises(RuntimeError, match="prefill"):
        verify_all(runner, [random_tree(1)] * sequences)
    recorded, launched, by_launch = list(runner._replays._replays), [], Replays._by_launch
    assert len(recorded) == FakeRecorder.recorded
    monkeypatch.setattr(FakeRecorder, "replayed", set())
    monkeypatch.setattr(Replays, "_by_launch", lambda *args: launched.append(args) or by_launch(*args))
    lengths = {1, 2, 100, 150, capacity, *(capacity - size for size in (1, 2, 3, 5, 9, 17, 33))}
    for length in (length for length in lengths if 0 < length <= capacity):
        runner.prefill([random_tokens(length, seed) for seed in range(sequences)], capacity=capacity)
        for size in range(1, min(64, capacity - length) + 1):
            verify_all(runner, [random_tree(size), None][:sequences])
    assert list(runner._replays._replays) == recorded
    if capacity > 64:  # no more than can be replayed, neither
        replayed = {recorded[number] for number in FakeRecorder.replayed}
        small = [{shape for shape, _ in shapes if shape.padded <= 64} for shapes in (recorded, replayed)]
        assert small[0] == small[1]
    assert sequences > 1 or not launched
    runner.warm(capacity, sequences)
    assert FakeRecorder.recorded == len(recorded)


def test_warm_after_a_long_text_writes_only_to_slots_that_there_are(static_llama, monkeypatch):
    """A runner that has read without it records what is missing, for fewer slots than the text before had."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 128)
    runner = static_llama()
    runner.prefill([random_tokens(200)], capacity=300)
    before = runner.verify({0: random_tree(8)})[0].logits
    runner.warm(300)
    runner.prefill([random_tokens(200)], capacity=300)
    assert torch.equal(runner.verify({0: random_tree(8)})[0].logits, before)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_warm_runner_has_the_bits_of_a_cold_one(static_llama, sequences):
    """Its prompts are replayed too, in pieces of every size, in a cache that other texts have been in."""
    warm, cold = static_llama(), random_llama()
    warm.warm(1500, sequences)
    for lengths in ((1300, 7, 512), (40, 700, 1), (513, 2, 90)):
        prompts = [random_tokens(length, length) for length in lengths[:sequences]]
        seen = {}
        for runner in (warm, cold):
            pieces = seen[runner] = [[] for _ in prompts]
            last = runner.prefill(
                prompts, capacity=1500, observe=lambda b, chain, rows, p=pieces: p[b].append(rows.logits)
            )
            assert all(torch.equal(rows[-1][-1], logits) for rows, logits in zip(pieces, last, strict=True))
        assert all(torch.equal(torch.cat(ours), torch.cat(theirs)) for ours, theirs in zip(*seen.values(), strict=True))
        trees = [random_tree(20, seed) for seed in range(sequences)]
        for ours, theirs in zip(verify_all(warm, trees), verify_all(cold, trees), strict=True):
            assert torch.equal(ours, theirs)
        for index, length in enumerate(warm.lengths()):
            keys_values = (runner._cache.keys_values[:, :, index, :, :length] for runner in (warm, cold))
            assert torch.equal(*keys_values)


def test_generation_records_nothing_after_warm(static_llama):
    runner, prompt = static_llama(), random_tokens(30)
    runner.warm(30 + 40 + 64)
    recorded = FakeRecorder.recorded
    plain = generate(runner, prompt, drafter=None, max_new_tokens=40).tokens
    assert generate(runner, prompt, drafter="lookup", budget=20, max_new_tokens=40).tokens == plain
    assert FakeRecorder.recorded == recorded


def test_costs_are_measured_without_recording(static_llama):
    runner, recorded = static_llama(), []
    runner.clock = lambda: recorded.append(FakeRecorder.recorded) or len(recorded)
    measure_costs(runner)
    assert set(recorded) == {FakeRecorder.recorded} != {0}


def test_longer_and_longer_prompts_lose_the_graphs_a_few_times_only(static_llama, monkeypatch):
    """However slowly they grow; the first cache, or the one that warm asks for, has no more slots than it needs."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 16)
    runner, sizes = static_llama(context=1000), []
    for capacity in range(20, 1064, 7):
        runner.prefill([[1]], capacity=capacity)
        sizes.append(runner._replays.cache.slots)
        assert sizes[-1] > capacity
    assert sorted(set(sizes)) == sizes[:: len(sizes)] + [64, 128, 256, 512, 1024, 1072]
    runner.prefill([[1]], capacity=20)
    assert runner._replays.cache.slots == 1072  # a shorter text has the graphs of the longest
    runner.prefill([[1]], capacity=5000)
    assert runner._replays.cache.slots == 5008  # more than the context, if it must be


def test_capacity_is_what_was_asked_for(static_llama):
    runner = static_llama()
    for capacity in (20, 15):  # the second in the first one's cache
        runner.prefill([[1] * 10], capacity=capacity)
        with pytest.raises(ValueError, match=f"has 10 of {capacity} slots committed and needs {capacity - 9} more"):
            runner.verify({0: DraftTree.chain([1] * (capacity - 9))})
        runner.verify({0: DraftTree.chain([1] * (capacity - 10))})


@pytest.mark.parametrize("sequences", [1, 2])
def test_logits_outlive_the_next_verify(static_llama, sequences):
    runner = static_llama()
    runner.prefill([random_tokens(9), random_tokens(5, 1)][:sequences], capacity=40)
    trees = [random_tree(5), random_tree(7, 1)][:sequences]
    first = verify_all(runner, trees)
    before = [logits.clone() for logits in first]
    verify_all(runner, [random_tree(8, 2), random_tree(6, 3)][:sequences])
    assert all(map(torch.equal, first, before))
    assert all(map(torch.equal, verify_all(runner, trees), before))
    assert runner.verify({}) == {}


def test_numbers_are_aligned_and_padded():
    trees = {0: DraftTree([5, 6, 7], [-1, 0, 0]), 2: DraftTree.chain([8])}
    numbers = Numbers(range(3), 3 * 33, 2, 0, torch.device("cpu"))
    numbers.fill(trees, [10, 20, 30], [0, 0, 0], padded=33)
    parts = ("tokens", "positions", "row_sequences", "slots", "prefix_lens", "ancestor_bits", "starts")
    start = numbers.tokens.data_ptr()
    assert all((getattr(numbers, part).data_ptr() - start) % 16 == 0 for part in parts)
    per_tree = {name: getattr(numbers, name).view(3, 33) for name in ("tokens", "positions", "row_sequences", "slots")}
    assert per_tree["tokens"][:, :4].tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0]]
    assert per_tree["positions"][:, :4].tolist() == [[10, 11, 11, 0], [0, 0, 0, 0], [30, 0, 0, 0]]
    assert per_tree["row_sequences"].tolist() == [[row] * 33 for row in range(3)]
    assert per_tree["slots"].tolist() == [[10, 11, 12] + [13] * 30, [20] * 33, [30] + [31] * 32]
    assert numbers.prefix_lens.tolist() == [10, 0, 30] and numbers.starts.tolist() == [0, 33, 66, 99]
    bits = numbers.ancestor_bits.view(3, 33, 2)
    assert bits[:, :3, 0].tolist() == [[1, 3, 5], [0, 0, 0], [1, 0, 0]]
    assert not bits[:, 3:].any() and not bits[:, :, 1].any()
    numbers.fill({1: DraftTree.chain([3])}, [1, 2, 3], [0, 0, 0], padded=33)  # nothing of the trees before is left
    assert numbers.tokens.sum() == 3 and numbers.ancestor_bits.sum() == 1 and numbers.prefix_lens.tolist() == [0, 2, 0]


def test_ragged_numbers_follow_each_other():
    trees = {0: DraftTree([5, 6, 7], [-1, 0, 0]), 2: DraftTree.chain([8])}
    numbers = Numbers(range(3), 4, 1, 6, torch.device("cpu"))
    plan = Plan([[0, 2], [1], []], [1, 1, 0])
    numbers.fill(trees, [10, 20, 30], [8, 0, 0], plan=plan, advances={2})
    assert numbers.tokens.tolist() == [5, 6, 7, 8] and numbers.positions.tolist() == [10, 11, 11, 30]
    assert numbers.row_sequences.tolist() == [0, 0, 0, 2] and numbers.slots.tolist() == [2, 3, 4, 30]
    assert numbers.starts.tolist() == [0, 3, 3, 4] and numbers.prefix_lens.tolist() == [2, 0, 30]
    round = numbers.round
    assert round.sequences.tolist() == [0, 1, 2] and round.starts.tolist() == [0, 3, 3, 4]
    assert round.parents.tolist() == [-1, 0, 0, -1]
    assert round.paths.tolist() == [[0, 2, -1, -1, -1, -1], [-1] * 6, [-1] * 6]  # who sits out replays nothing
    assert round.halves.tolist() == [1, 0, 0] and round.advances.tolist() == [0, 0, 1]


def test_graphs_of_more_rows_have_no_head(static_llama):
    """Their logits would take more memory than the launch of the head takes time."""
    runner = static_llama()
    for sequences, nodes in ((1, 64), (2, 32), (3, 32)):
        runner.prefill([[1]] * sequences, capacity=100)
        with torch.inference_mode():
            rows = runner._run_layers(dict.fromkeys(range(sequences), random_tree(nodes)))
        has_head = sequences * nodes <= 64
        assert (rows.logits is not None) == (rows.statistics is not None) == has_head


def test_taps(static_llama):
    check_taps(static_llama())


def test_padding_has_slots():
    assert [slots_for(capacity) for capacity in (1, 1023, 1024)] == [1024, 1024, 2048]
    assert all(capacity < slots_for(capacity) for capacity in range(1, 5000, 7))
