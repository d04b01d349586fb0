"""Prompts of a batch: read ragged, and what they share once, with the bits of each alone."""

import pytest
import torch

import pyspec.runners.native
from pyspec.runners.prompts import FEWEST_SHARED, PromptPlan
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, verify_all

LONG = random_tokens(150, 50)
BATCHES = {
    "different": [random_tokens(length, length) for length in (3, 100, 1, 70, 130)],
    "one begins with another": [LONG[:90], random_tokens(20), LONG],
    "equal": [LONG, LONG, LONG],
    "a chain of prefixes": [LONG[:60] + [1, 2], LONG[:100] + [3], LONG, LONG[:50] + [7] * 40],
}
MODELS = {
    "float32": {},
    "bfloat16 with a window": {"dtype": torch.bfloat16, "windows": (40, None)},
    "int8 with biases": {"dtype": torch.int8, "biases": True},
}


def read(runner, prompts):
    """Logits after each prompt, keys and values of each, and what observers saw of each: tokens and logits."""
    seen = [([], []) for _ in prompts]

    def observe(sequence, chain, verified):
        seen[sequence][0].extend(chain.tokens.tolist())
        seen[sequence][1].append(verified.logits.clone())

    last = runner.prefill(prompts, observe=observe, capacity=200)
    caches = [runner._cache.keys_values[:, :, i, :, : len(prompt)].clone() for i, prompt in enumerate(prompts)]
    return [
        (logits, cache, tokens, torch.cat(rows))
        for logits, cache, (tokens, rows) in zip(last, caches, seen, strict=True)
    ]


@pytest.mark.parametrize("chunk", [128, 50, 1000])
@pytest.mark.parametrize("prompts", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_every_prompt_has_the_bits_that_it_has_alone(options, prompts, chunk, monkeypatch):
    runner = random_llama(**options)
    alone = [read(runner, [prompt])[0] for prompt in prompts]
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
    for found, expected, prompt in zip(read(runner, prompts), alone, prompts, strict=True):
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
        assert found[2] == prompt and torch.equal(found[3], expected[3])
    assert runner.lengths() == [len(prompt) for prompt in prompts]


def test_a_shared_prefix_is_read_once_and_verify_goes_on_from_it(monkeypatch):
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", 128)
    runner = random_llama()
    prompts = [LONG[:140] + random_tokens(5, seed) for seed in range(4)]
    trees = [random_tree(9, seed) for seed in range(4)]
    alone = []
    for prompt, tree in zip(prompts, trees, strict=True):
        runner.prefill([prompt], capacity=200)
        alone.append(runner.verify({0: tree})[0].logits)
    rows, read = [], runner._read
    monkeypatch.setattr(
        runner, "_read", lambda pieces, cache: rows.append(sum(map(len, pieces.values()))) or read(pieces, cache)
    )
    runner.prefill(prompts, capacity=200)
    assert rows == [128, 17, 15]
    for found, expected in zip(verify_all(runner, trees), alone, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("window", [None, 1, 64, 100])
def test_the_masks_of_prompts_give_the_bits_of_tree_attention(window, monkeypatch):
    """In the program on a CPU a long piece goes through block_masked_attention; a short one through tree_attention."""
    runner = random_llama(windows=(window, None))
    whole = read(runner, [LONG + random_tokens(200)[:50]])[0]
    for chunk in (64, 65, 100):
        monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
        found = read(runner, [LONG + random_tokens(200)[:50]])[0]
        assert all(torch.equal(one, other) for one, other in zip(found[::3], whole[::3], strict=True))
        assert torch.equal(found[1], whole[1])


# ==== the plan ====


def test_what_prompts_take_from_one_another():
    shared = list(range(FEWEST_SHARED + 5))
    plan = PromptPlan([shared + [1], [7], shared[:-6] + [8] * 9, shared + [2, 3], shared + [2, 3], shared[:3]])
    assert plan.origins == [(0, 0), (0, 0), (0, 0), (0, len(shared)), (3, len(shared) + 1), (0, 0)]
    assert plan.takers(0) == [(3, len(shared))] and plan.takers(3) == [(4, len(shared) + 1)]
    assert list(plan.readers(0, 10, 20)) == [(0, 20), (3, 20), (4, 20)]
    assert list(plan.readers(3, len(shared), 2)) == [(3, 2), (4, 1)]
    assert list(plan.readers(0, len(shared), 1)) == [(0, 1)]


def test_pieces_fill_a_call_and_wait_for_what_they_take():
    plan = PromptPlan([LONG, random_tokens(30), LONG[:100] + [5]])

    def sizes(lengths, rows, sequences=3):
        return {b: len(piece) for b, piece in plan.next_pieces(lengths, rows, sequences).items()}

    assert sizes([0, 0, 0], 160) == {0: 150, 1: 10}
    assert sizes([0, 0, 0], 300) == {0: 150, 1: 30}
    assert sizes([0, 0, 0], 300, sequences=1) == {0: 150}
    assert sizes([150, 10, 100], 160) == {1: 20, 2: 1}
    assert sizes([150, 30, 101], 160) == {}
    piece = plan.next_pieces([140, 30, 0], 5, 3)[0]
    assert piece.tokens.tolist() == LONG[140:145] and piece.parents.tolist() == [-1, 0, 1, 2, 3]
