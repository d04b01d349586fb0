"""Gemma 4: every dtype, layers that are left out, what files say of its kinds of layers, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyspec.runners.native
from pyspec import from_transformers, load
from pyspec.architectures import Unsupported
from pyspec.architectures.gemma4_layers import Gemma4Config
from pyspec.caches import GearSettings, ResidualVqSettings, cache_from_name
from pyspec.checkpoints.huggingface import read_config
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.quantised_caches import codebooks
from tests.helpers.random_llama import random_tokens, random_tree, root_path
from tests.helpers.runner_checks import check_prompt, check_quantised, check_row_rule
from tests.helpers.tiny_models import tiny_model

KINDS = ["gemma4", "gemma4_with_experts"]
# The sizes of published models, by their config.json.
E2B = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "tie_word_embeddings": True}
E2B["text_config"] = {
    "model_type": "gemma4_text",
    "hidden_size": 1536,
    "intermediate_size": 6144,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "global_head_dim": 512,
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "final_logit_softcapping": 30.0,
    "use_bidirectional_attention": None,
    "num_global_key_value_heads": None,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
}


def described(**changed):
    _, config = read_config("here", E2B | {"text_config": E2B["text_config"] | changed})
    return config


def test_a_description_of_each_kind_of_layers():
    config = described()
    assert isinstance(config, Gemma4Config) and config.architecture == "gemma4" and config.tied_embedding
    assert config.layer_heads[3:5] == [(1, 256), (1, 512)] and config.windows[3:5] == (512, None)
    assert config.key_layers[:16] == [*range(15), 13] and config.key_layers[-2:] == [13, 14]
    assert config.of_layer(14).intermediate_size == 6144 and config.of_layer(15).intermediate_size == 12288
    assert config.input_size == 256 and not config.experts and config.logits_softcap == 30
    frequencies = config.rope_frequencies()
    assert len(frequencies) == 256 and frequencies[63] > 0 and not frequencies[64:].any()
    larger = described(
        attention_k_eq_v=True, num_global_key_value_heads=4, num_key_value_heads=8, hidden_size_per_layer_input=0
    )
    assert larger.layer_heads[3:5] == [(8, 256), (4, 512)] and larger.input_size == 0


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"use_bidirectional_attention": "all"}, Unsupported, "use_bidirectional_attention 'all', which"),
        ({"attention_bias": True}, Unsupported, "attention_bias True, which"),
        ({"vocab_size_per_layer_input": 99}, Unsupported, "vocab_size_per_layer_input 99, its vocabulary is 262144"),
        ({"num_kv_shared_layers": 34}, ValueError, "num_kv_shared_layers must be few enough to leave a layer"),
        ({"num_kv_shared_layers": 35}, ValueError, "num_kv_shared_layers must be at most 34, got 35"),
        ({"global_head_dim": 320}, Unsupported, "global_head_dim 320: supported are"),
        ({"layer_types": ["full_attention"]}, ValueError, "layer_types must be 35 of"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}, "sliding_attention": {}}},
            Unsupported,
            "rope_type 'yarn'",
        ),
        (
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 9},
            ValueError,
            "top_k_experts must be at most 8",
        ),
        (
            {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64},
            Unsupported,
            "experts and layers that share keys",
        ),
        ({"per_layer_config": {"3": {"head_dim": 64}}}, Unsupported, "per_layer_config of layer 3 with head_dim"),
    ],
)
def test_what_is_refused_by_its_name(changed, error, message):
    with pytest.raises(error, match=message):
        described(**changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "int4"], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_what_is_beside_them(kind, dtype):
    runner = from_transformers(tiny_model(kind).to(torch.bfloat16), dtype=dtype)
    check_row_rule(runner)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_fewer_bits_say_about_the_same(kind, dtype):
    model, prompt = tiny_model(kind), random_tokens(40)
    expected = from_transformers(model).prefill([prompt])[0]
    found = from_transformers(model, dtype=dtype).prefill([prompt])[0]
    assert (found - expected).abs().mean() < (0.1 if dtype == torch.bfloat16 else 0.2) * expected.std()


def test_keys_of_layers_that_share_them_are_read_past(tmp_path):
    """Published files have them; nobody reads them."""
    model = tiny_model("gemma4")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in (3, 4, 5):
        for name in ("k_proj", "v_proj", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = torch.randn(7)
    save_file(tensors, tmp_path / "model.safetensors")
    check_prompt(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has no tensor model.layers.1.self_attn.k_proj.weight"):
        load(str(tmp_path), dtype=torch.float32, device="cpu")


def test_entries_of_published_files_say_what_those_of_each_layer_do(tmp_path):
    model = tiny_model("gemma4_with_experts")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["per_layer_config"]
    config |= {"global_head_dim": 128, "num_global_key_value_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_prompt(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)


def test_drafts_leave_out_layers_whose_keys_are_left_out():
    runner, tree = from_transformers(tiny_model("gemma4")), random_tree(9)
    runner.prefill([random_tokens(20)])
    whole = runner.draft(0, tree, range(6))
    assert torch.equal(whole, runner.verify({0: tree})[0].logits)
    without = runner.draft(0, tree, [0, 2, 3, 4, 5])  # 3 and 5 read the keys of 1
    assert torch.equal(without, runner.draft(0, tree, [0, 2, 4])) and not torch.equal(without, whole)


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_with_experts", "gemma4_wide"])
@pytest.mark.parametrize("cache", ["gear-2bit", "int8", GearSettings(4, 64, rank=1, window=30)], ids=str)
def test_a_tree_over_a_quantised_cache_has_the_bits_of_plain_decoding(kind, cache):
    """Layers of two shapes, which share keys, with windows and without; and heads of 512, which keep full precision."""
    model = tiny_model(kind, max_position_embeddings=1024, sliding_window=150).to(torch.bfloat16)
    cache = cache_from_name(cache) if isinstance(cache, str) else cache
    check_quantised(from_transformers(model), cache)


def test_quantised_keys_say_about_what_exact_ones_do():
    runner, prompt = from_transformers(tiny_model("gemma4", max_position_embeddings=1024)), random_tokens(400)
    (dense,) = runner.prefill([prompt])
    taken = runner.cache._parts
    (found,) = runner.prefill([prompt], cache=cache_from_name("int8"))
    assert 0 < (found - dense).abs().mean() < 0.05 * dense.std()
    assert runner.cache.nbytes < sum(part.nbytes for part in taken)
    with pytest.raises(ValueError, match="whose layers differ in their heads cannot be saved"):
        runner.save_cache("keys")


def test_the_layers_that_keep_full_precision_are_those_of_wide_heads():
    runner = from_transformers(tiny_model("gemma4_wide"))
    runner.prefill([[1, 2, 3]], cache=cache_from_name("int8"))
    assert runner.cache.unshifted == {1} and runner.config.layer_heads[1][1] == 512


@pytest.mark.parametrize("kind", ["gemma4", "gemma4_wide"])
def test_quantised_rounds_may_be_padded_as_on_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
    model = tiny_model(kind, max_position_embeddings=1024, sliding_window=150).to(torch.bfloat16)
    prompts, trees, found = [random_tokens(250), random_tokens(5)], {0: random_tree(20), 1: random_tree(3)}, []
    for runner in (from_transformers(model), with_graphs(from_transformers(model))):
        runner.prefill(prompts, cache=cache_from_name("gear-2bit"))
        verified = runner.verify(trees)
        runner.commit({0: root_path(trees[0], 19), 1: [0]})
        found.append([*(each.logits for each in verified.values()), runner.verify({0: trees[1]})[0].logits])
    assert all(map(torch.equal, *found))


def test_codes_are_refused():
    runner = from_transformers(tiny_model("gemma4"))
    with pytest.raises(ValueError, match="cache must not be codes for a model whose layers differ in their heads"):
        runner.prefill([[1, 2, 3]], cache=ResidualVqSettings(codebooks()))
