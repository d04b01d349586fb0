"""Steps of fixed shape, run on the CPU with a recorder in place of CUDA graphs: the bits of the runner's own path.

tests/kernels/triton/test_llama_triton.py runs them through the GPU's kernels.
"""

import random

import pytest
import torch
from random_llama import random_llama, random_tokens, random_tree, root_path

import pyspec.models.llama
import pyspec.models.static_steps as static_steps
from pyspec import DraftTree
from pyspec.models.static_steps import BUCKETS, StepInputs, slots_for


class FakeRecorder:
    """Repeats a step; as with a graph, every result lies in the same memory."""

    recorded = 0

    def __init__(self, device):
        pass

    def __call__(self, step):
        FakeRecorder.recorded += 1
        result = step()
        return lambda: result.copy_(step())


@pytest.fixture
def static_llama(monkeypatch):
    """random_llama with static shapes, whose cache starts as full of NaN as memory may be."""
    monkeypatch.setattr(pyspec.models.llama, "GraphRecorder", FakeRecorder)
    monkeypatch.setattr(FakeRecorder, "recorded", 0)
    empty_cache = pyspec.models.llama.DenseCache

    def full_of_nan(*args):
        cache = empty_cache(*args)
        cache.keys_values.fill_(torch.nan)
        return cache

    def make(**options):
        runner = random_llama(**options)
        runner._is_static = True
        return runner

    monkeypatch.setattr(pyspec.models.llama, "DenseCache", full_of_nan)
    return make


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "windows": (6, None)}, {"dtype": torch.int8, "biases": True}],
    ids=["float32", "bfloat16 with a window", "int8 with biases"],
)
def test_has_the_bits_of_the_runners_own_path(static_llama, options, sequences, monkeypatch):
    """Over random batches: padding, sequences that sit out, trees beyond the largest bucket, several slot sizes."""
    monkeypatch.setattr(static_steps, "FEWEST_SLOTS", 64)
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
        found, expected = static.verify(trees), dynamic.verify(trees)
        paths = []
        for tree, ours, theirs in zip(trees, found, expected, strict=True):
            assert tree is None and ours is None or torch.equal(ours, theirs)
            paths.append(tree and root_path(tree, generator.randrange(len(tree))))
        static.commit(paths)
        dynamic.commit(paths)
        assert static.lengths() == dynamic.lengths()
        for index, length in enumerate(static.lengths()):
            keys_values = (runner._cache.keys_values[:, :, index, :, :length] for runner in (static, dynamic))
            assert torch.equal(*keys_values)


def test_one_recording_for_each_shape(static_llama, monkeypatch):
    monkeypatch.setattr(static_steps, "FEWEST_SLOTS", 128)
    runner = static_llama()

    def recordings(size):
        before = FakeRecorder.recorded
        runner.verify([random_tree(size)])
        return FakeRecorder.recorded - before

    runner.prefill([random_tokens(60)], capacity=300)
    assert FakeRecorder.recorded == 0  # a prompt is read once
    assert [recordings(size) for size in (3, 4, 2, 3, 64, 40, 33, 65, 200)] == [1, 0, 1, 0, 1, 0, 0, 0, 0]
    runner.verify([DraftTree.chain(random_tokens(65))])
    runner.commit([range(65)])
    assert [recordings(size) for size in (3, 4)] == [1, 0]  # 125 and 4 do not fit 128
    assert [recordings(size) for size in (2, 1)] == [0, 1]

    runner.prefill([random_tokens(20, 1)], capacity=320)  # 64 slots for padding make 384, as before
    assert [recordings(size) for size in (3, 60)] == [0, 0]
    runner.prefill([random_tokens(20, 1)], capacity=321)
    assert [recordings(size) for size in (3, 60)] == [1, 1]
    runner.prefill([[1], [2]], capacity=10)
    runner.verify([random_tree(3), random_tree(2)])
    assert FakeRecorder.recorded == 8


def test_capacity_is_what_was_asked_for(static_llama):
    runner = static_llama()
    for capacity in (20, 15):  # the second in the first one's cache
        runner.prefill([[1] * 10], capacity=capacity)
        with pytest.raises(ValueError, match=f"has 10 of {capacity} slots committed and needs {capacity - 9} more"):
            runner.verify([DraftTree.chain([1] * (capacity - 9))])
        runner.verify([DraftTree.chain([1] * (capacity - 10))])


def test_logits_outlive_the_next_verify(static_llama):
    runner = static_llama()
    runner.prefill([random_tokens(9), random_tokens(5, 1)], capacity=40)
    trees = [random_tree(5), random_tree(7, 1)]
    first = runner.verify(trees)
    before = [logits.clone() for logits in first]
    runner.verify([random_tree(8, 2), random_tree(6, 3)])
    assert all(map(torch.equal, first, before))
    assert all(map(torch.equal, runner.verify(trees), before))
    assert runner.verify([None, None]) == [None, None]


def test_inputs_are_aligned_and_padded():
    trees = [DraftTree([5, 6, 7], [-1, 0, 0]), None, DraftTree.chain([8])]
    inputs = StepInputs(3, 33, torch.device("cpu"))
    inputs.fill(trees, [10, 20, 30])
    parts = ("tokens", "positions", "sequences", "slots", "prefix_lens", "ancestor_bits")
    assert all(getattr(inputs, part).data_ptr() % 16 == inputs.buffer.data_ptr() % 16 for part in parts)
    assert inputs.tokens[:, :4].tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0]]
    assert inputs.positions[:, :4].tolist() == [[10, 11, 11, 0], [0, 0, 0, 0], [30, 0, 0, 0]]
    assert inputs.sequences.tolist() == [[row] * 33 for row in range(3)]
    assert inputs.slots.tolist() == [list(range(start, start + 33)) for start in (10, 20, 30)]
    assert inputs.prefix_lens.tolist() == [10, 0, 30]
    assert inputs.ancestor_bits.shape == (3, 33, 2)
    assert inputs.ancestor_bits[:, :3, 0].tolist() == [[1, 3, 5], [0, 0, 0], [1, 0, 0]]
    assert not inputs.ancestor_bits[:, 3:].any() and not inputs.ancestor_bits[:, :, 1].any()
    inputs.fill([None, DraftTree.chain([3]), None], [1, 2, 3])  # nothing of the trees before is left
    assert inputs.tokens.sum() == 3 and inputs.ancestor_bits.sum() == 1 and inputs.prefix_lens.tolist() == [0, 2, 0]


def test_padding_has_slots():
    assert [slots_for(capacity) for capacity in (1, 960, 961)] == [1024, 1024, 2048]
    assert all(capacity + BUCKETS[-1] <= slots_for(capacity) for capacity in range(1, 5000, 7))
