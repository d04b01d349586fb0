"""AttentionRunner on a GPU: graphs give the bits of launches, trees those of plain decoding, and nothing waits."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

import pyspec.runners.native
import pyspec.runners.replay as replay
from pyspec import DraftTree, generate
from pyspec.acceptance.exact import ExactAcceptance
from pyspec.drafters import new_drafter
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from tests.helpers.on_gpu import assert_close
from tests.helpers.random_llama import by_slot, random_llama, random_tokens, random_tree, root_path, verify_all

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
OPTIONS = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16 with a window": {"dtype": torch.bfloat16, "windows": (40, None)},
    "int8 with biases": {"dtype": torch.int8, "biases": True},
    "int4": {"dtype": "int4"},
}
each_model = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


@contextmanager
def no_waiting():
    """An error for whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_model
@pytest.mark.parametrize("sequences", [1, 3])
def test_graphs_give_the_bits_of_launches(options, sequences, monkeypatch):
    """Over random trees and batches, while the texts grow from one size of the cache to the next."""
    monkeypatch.setattr(pyspec.caches.dense, "FEWEST_SLOTS", 128)
    runner = random_llama("cuda", **options)
    generator = random.Random(sequences)
    prompts = [random_tokens(generator.choice((1, 100, 300)), seed) for seed in range(sequences)]
    runner.prefill(prompts, capacity=900)
    for seed in range(30):
        most = generator.choice((1, 2, 4, 7, 16, 33, 64, 70))
        trees = [random_tree(generator.randint(1, most), 10 * seed + index) for index in range(sequences)]
        if sequences > 1 and seed % 3:
            trees[generator.randrange(sequences)] = None
        trees = by_slot(trees)
        found = runner.verify(trees)
        with replay.launch_by_launch():
            launched = runner.verify(trees)
            for slot, tree in trees.items():
                expected = launched[slot]
                assert torch.equal(found[slot].logits, expected.logits), (seed, slot, len(tree))
                assert all(map(np.array_equal, found[slot].statistics, expected.statistics))
        runner.commit({slot: root_path(tree, generator.randrange(len(tree))) for slot, tree in trees.items()})
    assert len(runner._replays._replays) > 5


@each_model
def test_a_node_has_the_bits_of_plain_decoding(options):
    """Along every path of a tree, from a prefix that ends anywhere in a tile, alone and in a batch."""
    runner = random_llama("cuda", **options)
    for length, size in ((1, 5), (62, 13), (127, 40), (700, 64)):
        prompt, tree = random_tokens(length, length), random_tree(size, length)
        runner.prefill([prompt], capacity=800)
        logits = runner.verify({0: tree})[0].logits
        for node in range(size - 1, 0, -7):
            runner.prefill([prompt], capacity=800)
            for step in root_path(tree, node):
                alone = runner.verify({0: DraftTree.chain([int(tree.tokens[step])])})[0].logits
                runner.commit({0: [0]})
                assert torch.equal(alone[0], logits[step]), (length, size, node, step)
        runner.prefill([random_tokens(9), prompt], capacity=800)
        assert torch.equal(runner.verify({0: random_tree(30), 1: tree})[1].logits, logits)


@each_model
def test_commit_gives_the_cache_of_plain_decoding(options):
    runner = random_llama("cuda", **options)
    text = random_tokens(60)
    for seed in range(5):
        runner.prefill([text], capacity=400)
        tree = random_tree(50, seed)
        runner.verify({0: tree})
        path = root_path(tree, 49 - seed)
        runner.commit({0: path})
        text += [int(tree.tokens[node]) for node in path]
        committed = runner._cache.keys_values[..., : len(text), :].clone()
        runner.prefill([text], capacity=400)
        assert torch.equal(runner._cache.keys_values[..., : len(text), :], committed)


@each_model
def test_a_prompt_may_be_read_in_any_chunks(options, monkeypatch):
    runner, prompt, found = random_llama("cuda", **options), random_tokens(300), []
    for chunk in (300, 128, 64, 7, 300, 128, 64):
        monkeypatch.setattr(pyspec.runners.native, "GRAPH_CHUNK", chunk)
        if chunk == 7:
            runner.warm(300)  # from now on they are replayed
        (logits,) = runner.prefill([prompt], capacity=300)
        found.append((logits, runner._cache.keys_values[..., : len(prompt), :].clone()))
    for logits, keys_values in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(keys_values, found[0][1])


@pytest.mark.parametrize("options", [{}, {"windows": (40, None), "biases": True}], ids=["plain", "window and biases"])
def test_logits_are_those_of_the_cpu(options):
    prompt, tree, found = random_tokens(200), random_tree(30), []
    for device in ("cpu", "cuda"):
        runner = random_llama(device, **options)
        last = runner.prefill([prompt])
        found.append(torch.cat([*last, *runner.verify({0: tree})[0].logits]).cpu())
    assert_close(*found, atol=2e-3, rtol=1e-3)


def test_nothing_in_a_round_waits_but_for_what_is_read_back():
    runner = random_llama("cuda", torch.bfloat16)
    trees = {0: random_tree(20), 1: random_tree(40, 1)}
    drafters = [new_drafter("merged", runner).start([1]) for _ in trees]
    rule, sampler = ExactAcceptance(), Sampler()
    for round in range(3):
        if round == 0:
            runner.prefill([random_tokens(100), random_tokens(50, 1)], capacity=400)
            runner.verify(trees)  # compiles and captures, which does wait
        with no_waiting():  # an event that is waited for is not an error: that is the one readback
            verified = runner.verify(trees)
            for slot, tree in trees.items():
                rule.accept(tree, verified[slot], sampler, 5)
            runner.commit({slot: root_path(tree, len(tree) - 1) for slot, tree in trees.items()})
            for slot, tree in trees.items():
                drafters[slot].observe(tree, verified[slot], [0])


def test_rounds_may_be_launched_before_others_are_read():
    """However far the host is ahead of the device, each has its own inputs, logits and statistics."""
    runner = random_llama("cuda")
    runner.prefill([random_tokens(30)], capacity=200)
    trees = [random_tree(size, size) for size in (5, 1, 8, 7, 1, 6, 5)]
    alone = [runner.verify({0: tree})[0] for tree in trees]
    statistics = [verified.statistics for verified in alone]
    torch.cuda._sleep(10**8)
    found = [runner.verify({0: tree})[0] for tree in trees]
    for verified, numbers, expected in zip(found, statistics, alone, strict=True):
        assert all(map(np.array_equal, verified.statistics, numbers))
        assert torch.equal(verified.logits, expected.logits)


def test_a_new_batch_of_the_same_size_keeps_its_graphs():
    runner = random_llama("cuda")
    for length in (30, 200, 5):
        runner.prefill([random_tokens(length)], capacity=700)
        runner.verify({0: random_tree(7)})
        steps = runner._replays
        assert len(steps._replays) == 1
    runner.prefill([[1], [2]], capacity=700)
    assert runner._replays is not steps


@pytest.mark.parametrize("sequences", [1, 2])
def test_nothing_is_captured_nor_compiled_after_warm(sequences, monkeypatch):
    runner = random_llama("cuda", torch.bfloat16)
    runner.warm(1100, sequences)
    graphs, compiled = list(runner._replays._replays), []
    knobs = pytest.importorskip("triton").knobs
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]))
    for length in (1, 33, 70, 300, 1036):
        runner.prefill([random_tokens(length, seed) for seed in range(sequences)], capacity=1100)
        for size in (1, 2, 3, 20, 33, 64):
            verify_all(runner, [random_tree(size)] * sequences)
        runner.commit(by_slot([root_path(random_tree(64), 63)] * sequences))
    assert list(runner._replays._replays) == graphs and not compiled


def test_greedy_acceptance_is_that_of_the_cpu():
    logits = torch.randn(40, 5000, generator=torch.Generator().manual_seed(0))
    best = logits.argmax(1)
    tree = DraftTree([0, *best[:39].tolist()], torch.arange(-1, 39, dtype=torch.int32))
    expected = ExactAcceptance().accept(tree, Verified(logits), Sampler(), 3)
    assert ExactAcceptance().accept(tree, Verified(logits.cuda()), Sampler(), 3) == expected
    assert expected.path == list(range(40))


@each_model
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_speculation_does_not_change_the_text(options, sampling):
    runner = random_llama("cuda", **options)
    prompts = [random_tokens(length, length) for length in (3, 70, 20)]
    settings = {"max_new_tokens": 100, "seed": 1, **sampling}
    plain = [generate(runner, prompt, drafter=None, **settings).tokens for prompt in prompts]
    drafter = new_drafter("merged", runner)
    for _ in range(2):  # the second time it has seen these texts, so that whole paths are accepted
        drafted = generate(runner, prompts, drafter=drafter, budget=24, **settings)
        assert drafted.tokens == plain
    assert drafted.stats.mean_accepted_length > 1.1  # of texts that are nearly noise
