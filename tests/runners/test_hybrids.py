"""Hybrids of attention and a recurrence: transformers' logits, and the bits of plain decoding whatever is drafted."""

import random
from functools import cache

import pytest
import torch

import pyspec.runners.native
from pyspec import DraftTree, from_transformers, generate, load
from pyspec.architectures import family_of
from pyspec.checkpoints.huggingface import TensorCheckpoint
from pyspec.runners.foreign_support import cache_argument
from pyspec.runners.recurrent import HybridRunner
from tests.helpers.random_llama import by_slot, random_tokens, random_tree, root_path, verify_all
from tests.helpers.runner_checks import (
    check_batches,
    check_greedy_text,
    check_prompt,
    check_row_rule,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_hybrids import KINDS, tiny_hybrid
from tests.helpers.tiny_mambas import Knows

pytest.importorskip("transformers")
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int8]


@pytest.fixture(scope="module")
def models():
    """kind and dtype -> (transformers model in fp32, runner), made when first asked for."""

    @cache
    def get(kind="bamba", dtype=torch.float32):
        model = tiny_hybrid(kind)
        return model, from_transformers(model, dtype=dtype)

    return get


@torch.inference_mode()
def step_by_step(model, prompt, new_tokens=1):
    """The [V] logits of every greedy token by transformers, one token at a time, the prompt too."""
    name, cache, rows, tokens = cache_argument(type(model)), {}, [], list(prompt)
    for place in range(len(prompt) + new_tokens - 1):
        out = model(torch.tensor([[tokens[place]]]), use_cache=True, position_ids=torch.tensor([[place]]), **cache)
        cache = {name: out[name]}
        if place >= len(prompt) - 1:
            rows.append(out.logits[0, -1].float())
            tokens.append(int(rows[-1].argmax()))
    return rows


# ==== the logits of transformers ====


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(models, kind, chunk, monkeypatch):
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
    model, runner = models(kind)
    assert isinstance(runner, HybridRunner)
    check_prompt(runner, model)


@pytest.mark.parametrize("kind", KINDS)
def test_trees_and_paths_are_those_of_transformers(models, kind):
    """One token at a time: its form for many tokens is a hundred times less exact in gated delta nets."""
    model, runner = models(kind)
    tolerance = 1e-3 if hasattr(model.config, "num_experts") else 2e-4  # gates of experts make more of a difference
    context = random_tokens(2)  # shorter than the convolution
    runner.prefill([context], capacity=200)
    for seed in range(5):
        tree = random_tree(3 + 5 * seed, seed)
        logits = runner.verify({0: tree})[0].logits
        for node in range(0, len(tree), 6):
            (expected,) = step_by_step(model, context + path_tokens(tree, node))
            torch.testing.assert_close(logits[node], expected, atol=tolerance, rtol=tolerance)
        node = len(tree) - 1 - seed
        runner.commit({0: root_path(tree, node)})
        context += path_tokens(tree, node)
        assert runner.lengths() == [len(context)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers_one_token_at_a_time(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(9)
    check_greedy_text(runner, prompt, step_by_step(model, prompt, 64))


# ==== bits ====


@pytest.mark.parametrize("dtype", [*DTYPES, "int4"], ids=str)
@pytest.mark.parametrize("kind", ["bamba", "qwen3_5", "qwen3_next"])
def test_rows_do_not_depend_on_what_is_beside_them(models, kind, dtype):
    check_row_rule(models(kind, dtype)[1])


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bamba", "qwen3_5"])
def test_random_rounds_of_a_ragged_batch_are_plain_decoding(models, kind):
    """Random trees, paths and sequences that sit out; what belongs to nobody is NaN. The two states stay in step."""
    _, runner = models(kind)
    plain = HybridRunner(runner.config, runner.weights)
    prompts, generator = [random_tokens(length, length) for length in (3, 17, 1)], random.Random(0)
    runner.prefill(prompts, capacity=600)
    texts = [list(prompt) for prompt in prompts]
    for turn in range(60):
        trees = [random_tree(size, turn) if size else None for size in generator.choices((0, 1, 2, 7), k=3)]
        cache = runner._cache
        for sequence, length in enumerate(cache.lengths):
            cache.dense.keys_values[:, :, sequence, :, length:] = torch.nan
        found = verify_all(runner, trees)
        paths = [tree and (root_path(tree, generator.randrange(-1, len(tree))) or None) for tree in trees]
        runner.commit(by_slot(paths))
        for text, tree, path, logits in zip(texts, trees, paths, found, strict=True):
            if path and turn % 6 == 0:
                plain.prefill([text], capacity=600)
                rows = plain_steps(plain, [int(tree.tokens[node]) for node in path])
                assert torch.equal(torch.stack(rows), logits[path]), turn
            text += [int(tree.tokens[node]) for node in path or ()]
        assert runner.lengths() == [len(text) for text in texts] == runner._cache.state.lengths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_drafter_gives_the_plain_text(models, kind, dtype):
    _, runner = models(kind, dtype)
    is_long = dtype in (torch.float32, torch.bfloat16) and kind in ("bamba", "qwen3_5")
    prompt, count = random_tokens(12), 256 if is_long else 48
    plain = generate(runner, prompt, drafter=None, max_new_tokens=count)
    text = prompt + plain.tokens
    for drafts in ("right", "wrong", "branches", "sometimes none"):
        result = generate(runner, prompt, drafter=Knows(text, drafts), budget=9, max_new_tokens=count)
        assert result.tokens == plain.tokens, drafts
        assert (result.stats.mean_accepted_length > 7) == (drafts == "right")
        assert (result.stats.mean_accepted_length == 1) == (drafts == "wrong")
    assert generate(runner, prompt, drafter="merged", budget=12, max_new_tokens=40).tokens == plain.tokens[:40]


@pytest.mark.parametrize("kind", ["bamba", "qwen3_5", "qwen3_next"])
def test_batches_and_sampling_give_the_plain_texts(models, kind):
    check_batches(models(kind, torch.bfloat16)[1], new_tokens=24)


# ==== loading, and what does not fit ====


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads(models, kind, tmp_path):
    model, runner = models(kind)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), dtype=torch.float32, device="cpu")
    prompt = random_tokens(9)
    assert torch.equal(loaded.prefill([prompt])[0], runner.prefill([prompt])[0])
    assert loaded.fingerprint == runner.fingerprint
    family, named = family_of(type(model).__name__), loaded.weights.named(loaded.config)
    state = family.weights.checkpoint(TensorCheckpoint(model.state_dict()), loaded.config)
    assert state.shapes.keys() ^ named.keys() <= {"lm_head.weight"}
    for name in state.shapes.keys() & named.keys():
        order = family.row_order(loaded.config, name, len(named[name]))
        ((_, expected),) = state.blocks(name)
        assert torch.equal(named[name] if order is None else named[name][order], expected), name


@pytest.mark.parametrize(
    "kind, changed, message",
    [
        ("bamba", {"mlp_bias": True}, "has mlp_bias True, HybridRunner has none"),
        ("bamba", {"time_step_limit": [0.1, 1.0]}, r"has time_step_limit .*, HybridRunner has no limit"),
        ("bamba", {"hidden_act": "gelu"}, "has hidden_act 'gelu', HybridRunner has silu"),
        ("qwen3_5", {"hidden_act": "relu"}, "has hidden_act 'relu'"),
        ("qwen3_5", {"linear_value_head_dim": 24}, "has value heads in multiples of 16 .* got 24 and 16"),
        ("qwen3_5", {"head_dim": 48}, "head_dim 48 of qwen3_5"),
        ("qwen3_5", {"layer_types": ["linear_attention"] * 4}, "layer_types .* both there"),
    ],
)
def test_what_is_not_supported_is_named(kind, changed, message):
    with pytest.raises(ValueError, match=message):
        from_transformers(tiny_hybrid(kind, **changed))


def test_what_does_not_fit_is_refused_and_the_batch_kept(models):
    _, runner = models()
    runner.prefill([[1, 2, 3]], capacity=5)
    with pytest.raises(ValueError, match="capacity must be at least .* 4 tokens, got 2"):
        runner.prefill([[1, 2, 3, 4]], capacity=2)
    with pytest.raises(ValueError, match="tokens, the model's context is 700"):
        runner.prefill([[1] * 701])
    with pytest.raises(ValueError, match="3 of 5 slots committed"):
        runner.verify({0: DraftTree.chain([1, 2, 3])})
    runner.verify({0: DraftTree.chain([1, 2])})
    with pytest.raises(ValueError, match="must go from the root"):
        runner.commit({0: [1]})
    runner.commit({0: [0, 1]})
    assert runner.lengths() == [5]
