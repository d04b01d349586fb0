"""Hybrids of attention and Mamba-2: the logits of transformers, and the bits of plain decoding whatever is drafted."""

import random
from functools import cache

import pytest
import torch

import pyspec.runners.native
from pyspec import DraftTree, from_transformers, generate, load
from pyspec.runners.foreign_support import cache_argument
from pyspec.runners.recurrent import HybridRunner
from tests.helpers.random_llama import VOCABULARY, by_slot, random_tokens, random_tree, root_path, verify_all
from tests.helpers.runner_checks import (
    check_batches,
    check_greedy_text,
    check_nodes,
    check_prompt,
    check_row_rule,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_mambas import Knows

transformers = pytest.importorskip("transformers")
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int8, "int4"]
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "attn_layer_indices": [1, 3],
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "max_position_embeddings": 700,
    "eos_token_id": None,
}
KINDS = {
    "bamba": SHAPE,
    "bamba_tied_with_biases": SHAPE
    | {"attn_layer_indices": [0], "num_hidden_layers": 3, "mamba_n_groups": 2, "num_key_value_heads": 2}
    | {"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
}


def tiny_bamba(kind: str):
    """A transformers model in fp32 that forgets slowly."""
    torch.manual_seed(0)
    model = transformers.BambaForCausalLM(transformers.BambaConfig(**KINDS[kind])).eval()
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.2)
        if "dt_bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        torch.nn.init.normal_(parameter, mean, deviation)
    return model


@pytest.fixture(scope="module")
def models():
    """kind and dtype -> (transformers model in fp32, runner), made when first asked for."""

    @cache
    def get(kind="bamba", dtype=torch.float32):
        model = tiny_bamba(kind)
        return model, from_transformers(model, dtype=dtype)

    return get


@torch.inference_mode()
def step_by_step(model, prompt, new_tokens):
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
    model, runner = models(kind)
    context = random_tokens(2)  # shorter than the convolution
    runner.prefill([context], capacity=200)
    for seed in range(5):
        tree = random_tree(3 + 5 * seed, seed)
        check_nodes(runner, model, context, tree, every=4)
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_what_is_beside_them(models, dtype):
    check_row_rule(models(dtype=dtype)[1])


@torch.inference_mode()
def test_random_rounds_of_a_ragged_batch_are_plain_decoding(models):
    """Random trees, paths and sequences that sit out; what belongs to nobody is NaN. The two states stay in step."""
    _, runner = models()
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
    prompt, count = random_tokens(12), 256 if dtype in (torch.float32, torch.bfloat16) and kind == "bamba" else 48
    plain = generate(runner, prompt, drafter=None, max_new_tokens=count)
    text = prompt + plain.tokens
    for drafts in ("right", "wrong", "branches", "sometimes none"):
        result = generate(runner, prompt, drafter=Knows(text, drafts), budget=9, max_new_tokens=count)
        assert result.tokens == plain.tokens, drafts
        assert (result.stats.mean_accepted_length > 7) == (drafts == "right")
        assert (result.stats.mean_accepted_length == 1) == (drafts == "wrong")
    assert generate(runner, prompt, drafter="merged", budget=12, max_new_tokens=40).tokens == plain.tokens[:40]


def test_batches_and_sampling_give_the_plain_texts(models):
    check_batches(models(dtype=torch.bfloat16)[1], new_tokens=24)


# ==== loading, and what does not fit ====


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_loads(models, kind, tmp_path):
    model, runner = models(kind)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path), dtype=torch.float32, device="cpu")
    prompt = random_tokens(9)
    assert torch.equal(loaded.prefill([prompt])[0], runner.prefill([prompt])[0])
    assert loaded.fingerprint == runner.fingerprint
    state = model.state_dict()
    for name, tensor in loaded.weights.named(loaded.config).items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"mlp_bias": True}, "has mlp_bias True, HybridRunner has none"),
        ({"time_step_limit": [0.1, 1.0]}, r"has time_step_limit .*, HybridRunner has no limit"),
        ({"hidden_act": "gelu"}, "has hidden_act 'gelu', HybridRunner has silu"),
    ],
)
def test_what_is_not_supported_is_named(changed, message):
    model = transformers.BambaForCausalLM(transformers.BambaConfig(**SHAPE | changed))
    with pytest.raises(ValueError, match=message):
        from_transformers(model)


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
