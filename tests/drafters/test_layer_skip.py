"""A model's own layers as its drafter."""

import dataclasses

import pytest
import torch

from pyspec.architectures.llama import LlamaWeights
from pyspec.drafters import layer_skip
from pyspec.drafters.layer_skip import LayerSkipDrafter, find_skipped_layers
from pyspec.drafters.shapes.dyspec import DySpecThreshold
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.generate import generate
from pyspec.machine import store
from pyspec.runners.attention import AttentionRunner
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, verify_all

PROMPTS = [random_tokens(140), random_tokens(7, 1), random_tokens(30, 2)]


def deep_llama(layers=6, useless=(1, 3, 4), dtype=torch.bfloat16):
    """A runner of which some layers add nothing."""
    config = dataclasses.replace(random_llama().config, layers=layers, windows=(None, 9) * (layers // 2))
    weights = LlamaWeights.empty(config, dtype, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in weights.named(config).items():
        tensor.copy_(torch.normal(1.0 if tensor.dim() == 1 else 0.0, 0.2, tensor.shape, generator=generator))
        if any(f"layers.{layer}." in name for layer in useless) and ("o_proj" in name or "down_proj" in name):
            tensor.zero_()
    return AttentionRunner(config, weights)


def test_all_layers_say_what_verify_says_and_useless_ones_are_not_missed():
    model = deep_llama()
    model.prefill(PROMPTS, capacity=300)
    trees = [random_tree(20, seed) for seed in range(3)]
    expected = verify_all(model, trees)
    for sequence, tree in enumerate(trees):
        assert torch.equal(model.draft(sequence, tree, range(6)), expected[sequence])
        assert torch.equal(model.draft(sequence, tree, [0, 2, 5]), expected[sequence])
        assert not torch.equal(model.draft(sequence, tree, [0, 5]), expected[sequence])
    again = verify_all(model, trees)  # drafts left nothing behind
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, expected, strict=True))


@pytest.mark.parametrize("growth", [None, DySpecThreshold(0.02), FixedBranching((1,) * 4)])
@pytest.mark.parametrize("skipped", [[1, 3, 4], [5], [0, 1, 2, 3, 4]])
def test_greedy_text_is_the_plain_one_bit_for_bit(growth, skipped):
    model = deep_llama()
    plain = generate(model, PROMPTS, drafter=None, max_new_tokens=40)
    drafter = LayerSkipDrafter(model, skipped, growth)
    for budget in (1, 2, 9):
        said = generate(
            model,
            PROMPTS,
            drafter=drafter,
            acceptance="exact" if growth is None else "traversal",
            budget=budget,
            max_new_tokens=40,
        )
        assert said.tokens == plain.tokens
    if skipped == [1, 3, 4] and growth is None:
        assert said.stats.mean_accepted_length > 3  # it is never wrong, and ends where the slots do


def test_seeds_keep_their_texts():
    model = deep_llama()
    call = dict(temperature=0.9, seed=7, max_new_tokens=30)
    plain = generate(model, PROMPTS, drafter=None, **call)
    said = generate(model, PROMPTS, drafter=LayerSkipDrafter(model, [1, 2]), budget=8, **call)
    assert said.tokens == plain.tokens and said.stats.mean_accepted_length > 1.05


def test_the_search_finds_the_useless_layers_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tried = deep_llama(dtype=torch.float32), []
    found = find_skipped_layers(model, PROMPTS, lambda *progress: tried.append(progress))
    assert {1, 3, 4} <= set(found) and len(found) < 6
    assert tried[-1][0] <= tried[-1][1] == 6 + layer_skip.TRIED * 5
    with pytest.raises(ValueError, match="prompts must be given for a model without a tokenizer"):
        model.fingerprint = "another"
        find_skipped_layers(model)
    model.fingerprint = deep_llama(dtype=torch.float32).fingerprint
    assert find_skipped_layers(model) == found  # kept
    assert LayerSkipDrafter(model).layers == [layer for layer in range(6) if layer not in found]
    for damaged in ("no", [9], None):
        store.keep("skipped_layers", store.key(model), damaged)
        with pytest.raises(ValueError, match="without a tokenizer"):  # so it would search
            find_skipped_layers(model)


def test_what_does_not_fit():
    model = deep_llama()
    for skipped in ([6], [-1], list(range(6))):
        with pytest.raises(ValueError, match="skipped must be some of the model's 6 layers, but not all"):
            LayerSkipDrafter(model, skipped)
    with pytest.raises(ValueError, match="able to run some of its layers, got a FakeRunner"):
        LayerSkipDrafter(FakeRunner(), [0])
    with pytest.raises(RuntimeError, match="prefill"):
        model.draft(0, random_tree(3), [0])
    drafter = LayerSkipDrafter(model, [1])
    with pytest.raises(ValueError, match="cache must be dense for a LayerSkipDrafter"):
        generate(model, PROMPTS[0], drafter=drafter, cache="int8")
    model.prefill([PROMPTS[0]], capacity=150)
    for layers in ([], [1, 0], [6], [0, 0]):
        with pytest.raises(ValueError, match="layers must ascend"):
            model.draft(0, random_tree(3), layers)
    with pytest.raises(ValueError, match="slots"):
        model.draft(0, random_tree(11), [0])
    with pytest.raises(ValueError, match="within a call of generate only"):
        drafter.start([1, 2]).propose([1, 2, 3], 4)


def test_a_batch_that_never_drafted_is_forgotten():
    model = deep_llama()
    drafter = LayerSkipDrafter(model, [1])
    plain = generate(model, PROMPTS, drafter=None, max_new_tokens=10)
    generate(model, PROMPTS[0], drafter=drafter, budget=1, max_new_tokens=3)
    assert generate(model, PROMPTS, drafter=drafter, budget=6, max_new_tokens=10).tokens == plain.tokens
