"""Rounds as a GPU has them, of every family and cache: what is replayed has the bits of launches and of plain decoding.

On a GPU through CUDA graphs and the GPU's kernels; without one through the CPU's, in the same few shapes.
"""

import gc
import importlib
import random
import weakref
from functools import partial

import numpy as np
import pytest
import torch

import pyspec.runners.native
import pyspec.runners.replay as replay
from pyspec import DraftTree, generate
from pyspec.caches import cache_from_name
from tests.helpers.cuda_on_host import op_on_host
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.on_gpu import HAS_GPU, assert_close
from tests.helpers.quantised_caches import random_codes
from tests.helpers.random_llama import by_slot, random_tokens, random_tree, root_path, verify_all
from tests.helpers.random_models import FAMILIES, random_model
from tests.helpers.runner_checks import check_taps, plain_steps

DEVICE = "cuda" if HAS_GPU else "cpu"
each_family = pytest.mark.parametrize("family", FAMILIES)
MODELS = {family: (family, torch.bfloat16) for family in FAMILIES}
MODELS |= {f"{family} in int8": (family, torch.int8) for family in ("llama", "mamba2")}
each_model = pytest.mark.parametrize("what", MODELS.values(), ids=MODELS.keys())
each_batch = pytest.mark.parametrize("sequences", [1, 3])


@pytest.fixture
def model(monkeypatch):
    """Makes a model whose rounds are graphs."""

    def make(family, dtype=torch.bfloat16):
        if not HAS_GPU:
            monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
            for name in ("selective_state", "causal_conv"):  # the CPU's own take no rows that belong to nobody
                module = importlib.import_module(f"pyspec.ops.{name}")
                monkeypatch.setattr(module, "_OP", op_on_host(name)[0])
        return with_graphs(random_model(family, DEVICE, dtype))

    return make


def random_trees(generator, sequences, sizes, seed):
    """A tree for each sequence, or None for one that sits out, but not for all."""
    trees = [random_tree(generator.choice(sizes), 10 * seed + index) for index in range(sequences)]
    if sequences > 1 and seed % 3:
        trees[generator.randrange(sequences)] = None
    return by_slot(trees)


@each_batch
@each_model
def test_a_replay_has_the_bits_of_launches(model, what, sequences, monkeypatch):
    """While texts and records grow, so that what was recorded is dropped and recorded again elsewhere."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 128)
    runner, generator = model(*what), random.Random(sequences)
    runner.prefill([random_tokens(generator.choice((1, 100, 140)), seed) for seed in range(sequences)], capacity=900)
    for seed in range(16):
        sizes = (1, 2, 7, 13) if seed < 5 else (1, 3, 16, 33, 64, 70)
        trees = random_trees(generator, sequences, sizes, seed)
        found = runner.verify(trees)
        with replay.launch_by_launch():
            expected = runner.verify(trees)
        for slot in trees:
            assert torch.equal(found[slot].logits, expected[slot].logits), (seed, slot)
            assert all(map(np.array_equal, found[slot].statistics, expected[slot].statistics))
        runner.commit({slot: root_path(tree, generator.randrange(len(tree))) for slot, tree in trees.items()})
    assert len(runner._replays._replays) > 2 or what[0] in ("bamba", "lfm2") and sequences > 1  # which are launched


@each_model
def test_a_node_has_the_bits_of_plain_decoding(model, what):
    """Behind prompts of one piece and of several, alone and in a batch."""
    runner = model(*what)
    for length, size in ((5, 20), (62, 13), (1100, 40)):
        prompt, tree = random_tokens(length, length), random_tree(size, length)
        runner.prefill([prompt], capacity=1300)
        logits = runner.verify({0: tree})[0].logits
        for node in (size - 1, size // 2):
            path = root_path(tree, node)
            runner.prefill([prompt], capacity=1300)
            rows = plain_steps(runner, [int(tree.tokens[step]) for step in path])
            for step, alone in zip(path, rows, strict=True):
                assert torch.equal(alone, logits[step]), (length, node, step)
        runner.prefill([random_tokens(9), prompt], capacity=1300)
        assert torch.equal(runner.verify({0: random_tree(30), 1: tree})[1].logits, logits)


@each_family
def test_a_prompt_has_the_bits_of_its_tokens_one_by_one(model, family):
    """In pieces of 512, which are launched before `warm` and replayed after it."""
    runner, prompt = model(family), random_tokens(530)
    runner.prefill([prompt[:1]], capacity=600)
    alone = torch.stack(plain_steps(runner, prompt[1:]))
    for _ in range(2):
        pieces = []
        (last,) = runner.prefill([prompt], capacity=600, observe=lambda _, chain, rows, p=pieces: p.append(rows.logits))
        assert torch.equal(torch.cat(pieces)[1:], alone) and torch.equal(last, alone[-1])
        runner.warm(600)


@each_family
def test_warm_after_smaller_rounds_leaves_nothing_that_knows_old_addresses(model, family):
    runner, prompt, tree = model(family), random_tokens(20), random_tree(3)
    runner.prefill([prompt], capacity=300)
    expected = runner.verify({0: tree})[0].logits
    runner.warm(300)
    runner.prefill([prompt], capacity=300)
    long = DraftTree.chain(random_tokens(50, 1))
    runner.verify({0: long})
    runner.commit({0: range(50)})
    found = runner.verify({0: tree})[0].logits
    with replay.launch_by_launch():
        assert torch.equal(found, runner.verify({0: tree})[0].logits)
    runner.prefill([prompt], capacity=300)
    assert torch.equal(runner.verify({0: tree})[0].logits, expected)


@each_family
def test_taps_are_those_of_the_nodes(model, family):
    """In a graph with its head, in one without, and beyond all graphs."""
    runner = model(family)
    check_taps(runner)
    for size in (40, 70):
        check_taps(runner, sizes=(size, size - 3))


@pytest.mark.skipif(not HAS_GPU, reason="what stands in for graphs keeps the runner")
@each_family
def test_a_runner_goes_with_the_last_who_knows_it(model, family):
    """With gigabytes of weights, nobody wants to wait until a cycle is collected."""
    runner = model(family)
    runner.prefill([[1, 2]])
    runner.verify({0: random_tree(3)})
    known = weakref.ref(runner)
    gc.disable()
    try:
        del runner
        assert known() is None
    finally:
        gc.enable()


@each_family
def test_logits_are_those_of_the_cpu(model, family):
    prompt, tree, found = random_tokens(200), random_tree(30), []
    for make in (partial(random_model, device="cpu"), model):
        runner = make(family, dtype=torch.float32)
        last = runner.prefill([prompt], capacity=400)
        found.append(torch.cat([*last, *runner.verify({0: tree})[0].logits]).cpu())
    assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "drawn"])
@each_family
def test_drafts_do_not_change_the_text(model, family, sampling):
    runner, prompts = model(family), [random_tokens(length, length) for length in (3, 70, 20)]
    settings = {"max_new_tokens": 40, "seed": 1, **sampling}
    plain = [generate(runner, prompt, drafter=None, **settings).tokens for prompt in prompts]
    assert generate(runner, prompts, drafter="merged", budget=24, **settings).tokens == plain


# ==== quantised caches, whose layers run op by op on a GPU ====

CACHES = {name: cache_from_name(name) for name in ("gear-2bit", "gear-4bit", "int8")}
CACHES |= {"rvq": random_codes(pre_rope=False), "rvq pre-rope": random_codes(pre_rope=True)}
each_cache = pytest.mark.parametrize("name", CACHES)


@each_cache
def test_a_node_over_a_quantised_cache_has_the_bits_of_plain_decoding(model, name):
    """Behind prompts that end where some nodes see a block quantised and their root does not, alone and in a batch."""
    runner, cache = model("llama"), CACHES[name]
    for length in (190, 700):
        prompt, tree = random_tokens(length), random_tree(24)
        runner.prefill([prompt], cache=cache)
        logits = runner.verify({0: tree})[0].logits
        for node in (14, 23):
            path = root_path(tree, node)
            runner.prefill([prompt], cache=cache)
            rows = plain_steps(runner, [int(tree.tokens[step]) for step in path])
            for step, alone in zip(path, rows, strict=True):
                assert torch.equal(alone, logits[step]), (length, node, step)
        runner.prefill([random_tokens(7, 1), prompt], cache=cache)
        assert torch.equal(verify_all(runner, [random_tree(9), tree])[1], logits)


@each_cache
def test_logits_over_a_quantised_cache_are_those_of_the_cpu(model, name):
    prompt, tree, found = random_tokens(330), random_tree(24), []
    for make in (partial(random_model, device="cpu"), model):
        runner = make("llama", dtype=torch.float32)
        runner.prefill([prompt], cache=CACHES[name])
        found.append(runner.verify({0: tree})[0].logits.cpu())
    # where a key lies between two codes, rounding may choose the other one
    assert (found[1] - found[0]).abs().mean() < 0.05 * found[0].std()


@each_cache
def test_drafts_over_a_quantised_cache_do_not_change_the_text(model, name):
    runner, prompts = model("llama"), [random_tokens(20) * 9, random_tokens(11, 3) * 20]
    settings = {"max_new_tokens": 30, "cache": CACHES[name]}
    plain = generate(runner, prompts, drafter=None, **settings).tokens
    assert generate(runner, prompts, drafter="merged", budget=16, **settings).tokens == plain


def test_a_saved_cache_goes_on_with_the_same_bits(model, tmp_path):
    runner, tree = model("llama"), random_tree(20)
    runner.prefill([random_tokens(330), random_tokens(50)], cache=CACHES["gear-2bit"])
    runner.save_cache(tmp_path / "cache")
    expected = verify_all(runner, [tree, tree])
    other = model("llama")
    other.load_cache(tmp_path / "cache")
    assert all(map(torch.equal, verify_all(other, [tree, tree]), expected))
