"""Hybrids of attention and a recurrence: transformers' logits, and the bits of plain decoding whatever is drafted."""

import random
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

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
    check_row_rule,
    path_tokens,
    plain_steps,
)
from tests.helpers.slow import slow
from tests.helpers.tiny_hybrids import FAMILIES, KINDS, tiny_hybrid
from tests.helpers.tiny_mambas import Knows

pytest.importorskip("transformers")
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int8, "int4"]


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
    """The [V] logits of every token of a prompt, and of the greedy ones behind it, by transformers, one token at a
    time: its form for many tokens is a hundred times less exact in gated delta nets."""
    name, cache, rows, tokens = cache_argument(type(model)), {}, [], list(prompt)
    for place in range(len(prompt) + new_tokens - 1):
        out = model(torch.tensor([[tokens[place]]]), use_cache=True, position_ids=torch.tensor([[place]]), **cache)
        cache = {name: out[name]}
        rows.append(out.logits[0, -1].float())
        if place >= len(prompt) - 1:
            tokens.append(int(rows[-1].argmax()))
    return rows


def tolerance_of(model):
    """Gates of experts make more of a difference, and more do norms of what attention alone gives."""
    names = [name for name, _ in model.named_parameters()]
    rough = 3e-3 if any("shared_transformer" in name for name in names) else 1e-3
    tolerance = rough if any("experts" in name or "shared_transformer" in name for name in names) else 2e-4
    return {"atol": tolerance, "rtol": tolerance}


# ==== the logits of transformers ====


@pytest.fixture(scope="module")
def of_prompts(models):
    """kind -> the logits of a text of 300 tokens by transformers."""
    return cache(lambda kind: torch.stack(step_by_step(models(kind)[0], random_tokens(300))))


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(models, of_prompts, kind, chunk, monkeypatch):
    """Of prompts of 1 to 300 tokens, as they are observed and behind them."""
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
    (model, runner), expected, pieces = models(kind), of_prompts(kind), []
    assert isinstance(runner, HybridRunner)
    assert expected.std() > 0.5  # or a tolerance would say little
    prompts = [random_tokens(300)[:length] for length in (300, 1, 2, 5, 64)]
    lasts = runner.prefill(prompts, observe=lambda slot, _, read: slot or pieces.append(read.logits))
    torch.testing.assert_close(torch.cat(pieces), expected, **tolerance_of(model))
    for prompt, last in zip(prompts, lasts, strict=True):
        torch.testing.assert_close(last, expected[len(prompt) - 1], **tolerance_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_trees_and_paths_are_those_of_transformers(models, kind):
    model, runner = models(kind)
    context = random_tokens(2)  # shorter than the convolution
    runner.prefill([context], capacity=200)
    for seed in range(4):
        tree = random_tree(3 + 5 * seed, seed)
        logits = runner.verify({0: tree})[0].logits
        for node in range(0, len(tree), 6):
            *_, expected = step_by_step(model, context + path_tokens(tree, node))
            torch.testing.assert_close(logits[node], expected, **tolerance_of(model))
        node = len(tree) - 1 - seed
        runner.commit({0: root_path(tree, node)})
        context += path_tokens(tree, node)
        assert runner.lengths() == [len(context)]


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers_one_token_at_a_time(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(9)
    check_greedy_text(runner, prompt, step_by_step(model, prompt, 64)[len(prompt) - 1 :])


# ==== bits ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_do_not_depend_on_what_is_beside_them(models, kind, dtype):
    check_row_rule(models(kind, dtype)[1])


@pytest.mark.parametrize("kind", [*(slow(kind) for kind in FAMILIES if kind != "lfm2"), "lfm2"])
def test_a_thousand_rounds_do_not_drift(models, kind):
    """Random trees, paths, rounds that commit nothing and rounds without drafts: plain decoding's bits to the end."""
    (_, runner), generator = models(kind), random.Random(0)
    plain = HybridRunner(runner.config, runner.weights)
    for each in (runner, plain):
        each.prefill([random_tokens(3)], capacity=700)
    for turn in range(1000):
        room = 690 - runner.lengths()[0]
        tree = random_tree(min(room, generator.choice((1, 1, 2, 5, 9))), turn)
        logits = runner.verify({0: tree})[0].logits
        node = generator.randrange(-1, len(tree)) if turn % 3 else -1
        if node < 0 or room < 20:
            continue
        path = root_path(tree, node)
        assert torch.equal(torch.stack(plain_steps(plain, path_tokens(tree, node))), logits[path]), turn
        runner.commit({0: path})
    probe = DraftTree.chain([1])  # which replays what was committed last
    assert torch.equal(*(each.verify({0: probe})[0].logits for each in (runner, plain)))
    ours, other = runner.cache.state, plain.cache.state
    assert torch.equal(ours.states, other.states) and torch.equal(ours.windows, other.windows)
    assert runner.lengths() == plain.lengths()


@torch.inference_mode()
@pytest.mark.parametrize("kind", FAMILIES)
def test_random_rounds_of_a_ragged_batch_are_plain_decoding(models, kind):
    """Random trees, paths and sequences that sit out; what belongs to nobody is NaN. The two states stay in step."""
    _, runner = models(kind)
    plain = HybridRunner(runner.config, runner.weights)
    prompts, generator = [random_tokens(length, length) for length in (3, 17, 1)], random.Random(0)
    runner.prefill(prompts, capacity=600)
    texts = [list(prompt) for prompt in prompts]
    for turn in range(30):
        trees = [random_tree(size, turn) if size else None for size in generator.choices((0, 1, 2, 7), k=3)]
        cache = runner._cache
        for sequence, length in enumerate(cache.lengths):
            cache.dense.keys_values[:, :, sequence, :, length:] = torch.nan
        found = verify_all(runner, trees)
        paths = [tree and (root_path(tree, generator.randrange(-1, len(tree))) or None) for tree in trees]
        runner.commit(by_slot(paths))
        for text, tree, path, logits in zip(texts, trees, paths, found, strict=True):
            if path and turn % 5 == 0:
                plain.prefill([text], capacity=600)
                rows = plain_steps(plain, [int(tree.tokens[node]) for node in path])
                assert torch.equal(torch.stack(rows), logits[path]), turn
            text += [int(tree.tokens[node]) for node in path or ()]
        assert runner.lengths() == [len(text) for text in texts] == runner._cache.state.lengths


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind if kind in FAMILIES else slow(kind) for kind in KINDS])
def test_any_drafter_gives_the_plain_text(models, kind, dtype):
    _, runner = models(kind, dtype)
    prompt, count = random_tokens(12), 256 if dtype == torch.bfloat16 and kind in ("bamba", "qwen3_5") else 40
    plain = generate(runner, prompt, drafter=None, max_new_tokens=count)
    text = prompt + plain.tokens
    for drafts in ("right", "wrong", "half right", "branches", "sometimes none"):
        result = generate(runner, prompt, drafter=Knows(text, drafts), budget=9, max_new_tokens=count)
        assert result.tokens == plain.tokens, drafts
        assert (result.stats.mean_accepted_length > 7) == (drafts == "right")
        assert (result.stats.mean_accepted_length == 1) == (drafts == "wrong")
    assert generate(runner, prompt, drafter="merged", budget=12, max_new_tokens=40).tokens == plain.tokens[:40]


@pytest.mark.parametrize("kind", FAMILIES)
def test_batches_and_sampling_give_the_plain_texts(models, kind):
    check_batches(models(kind, torch.bfloat16)[1], new_tokens=16)


# ==== loading, and what does not fit ====


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads(models, kind, tmp_path):
    model, runner = models(kind)
    model.save_pretrained(tmp_path)
    if kind.startswith("olmo"):  # transformers writes the three convolutions in equal parts, released files do not
        (tmp_path / "model.safetensors").unlink()
        state = {name: of.clone() for name, of in model.state_dict().items() if name != "lm_head.weight"}
        state |= {} if model.config.tie_word_embeddings else {"lm_head.weight": model.lm_head.weight}
        save_file(state, tmp_path / "model.safetensors")
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
        ("granite", {"hidden_act": "gelu_pytorch_tanh"}, "has hidden_act 'gelu_pytorch_tanh', HybridRunner has silu"),
        ("granite", {"mamba_d_head": 8, "mamba_n_heads": 32}, "head_dim in multiples of 16 .* got 8 and 16"),
        ("lfm2", {"conv_L_cache": 9}, "at most 8 taps, got 128 and 9"),
        ("lfm2", {"layer_types": ["conv"] * 4}, "layer_types .* both there"),
        ("falcon_h1", {"projectors_bias": True}, "has projectors_bias True, HybridRunner has it like mamba_proj_bias"),
        ("falcon_h1", {"time_step_limit": [0.1, 1.0]}, r"has time_step_limit .*, HybridRunner has no limit"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "has mlp_hidden_act 'silu', HybridRunner has relu2 there"),
        ("nemotron_h_moe", {"moe_latent_size": 64}, "n_group above 1 or moe_latent_size, HybridRunner has neither"),
        ("jamba", {"mamba_d_state": 8}, "state_size in multiples of 16, got 256 and 8"),
        ("zamba2", {"add_bias_linear": True}, "has add_bias_linear True, HybridRunner has no such biases"),
        ("zamba2", {"tie_word_embeddings": False}, "has tie_word_embeddings False, by which its layers share no"),
        ("zamba2", {"hidden_size": 320}, "head_dim 160 of zamba2"),
        ("zamba2", {"num_mem_blocks": 4}, "num_mem_blocks must be at most the 3 layers that use them, got 4"),
        ("olmo_hybrid", {"linear_key_head_dim": 24}, "key heads in multiples of 16, got 32 and 24"),
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
