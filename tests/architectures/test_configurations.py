"""What config.json says, and leaves out: the shapes that transformers' own classes make of it."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pyspec import load
from pyspec.architectures import FAMILIES, Unsupported, family_of
from pyspec.checkpoints.huggingface import read_config
from tests.helpers.random_llama import VOCABULARY
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_hybrids import tiny_hybrid
from tests.helpers.tiny_mambas import tiny_mamba
from tests.helpers.tiny_models import tiny_model

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 32, "max_position_embeddings": 256}
BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 64, "num_key_value_heads": 2}
SMALL = {
    "LlamaForCausalLM": SIZES | {"attention_bias": True, "tie_word_embeddings": True, "vocab_size": 77},
    "MistralForCausalLM": SIZES | {"num_key_value_heads": 2, "sliding_window": 9, "rms_norm_eps": 1e-5},
    "Qwen2ForCausalLM": SIZES
    | {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7},
    "Qwen3ForCausalLM": SIZES
    | {"num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": 7}
    | {"attention_bias": True, "head_dim": 64},
    "GemmaForCausalLM": SIZES | {"num_key_value_heads": 2, "head_dim": 64, "hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": SIZES
    | {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 7, "final_logit_softcapping": 20.0}
    | {"attn_logit_softcapping": 9.0, "query_pre_attn_scalar": 100, "tie_word_embeddings": False},
    "Gemma3ForCausalLM": SIZES
    | {"num_key_value_heads": 2, "head_dim": 64, "sliding_window": 7, "query_pre_attn_scalar": 100},
    "Phi3ForCausalLM": SIZES | {"num_key_value_heads": 2, "sliding_window": 7, "partial_rotary_factor": 0.5},
    "SmolLM3ForCausalLM": SIZES
    | {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 7, "no_rope_layer_interval": 2},
    "Olmo2ForCausalLM": SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    "Olmo3ForCausalLM": SIZES | {"num_key_value_heads": 2, "sliding_window": 7, "rope_theta": 900.0},
    "GraniteForCausalLM": SIZES
    | {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.0156,
        "logits_scaling": 8.0,
    },
    "Exaone4ForCausalLM": SIZES | {"num_key_value_heads": 2, "sliding_window": 7},
    "GraniteMoeHybridForCausalLM": SIZES
    | {"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 4, "shared_intermediate_size": 99}
    | {"position_embedding_type": "rope", "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    | {"mamba_n_heads": 64},
    "GptOssForCausalLM": SIZES
    | {"num_key_value_heads": 4, "sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "attention_bias": False},
    "GlmForCausalLM": SIZES | {"num_key_value_heads": 4, "head_dim": 64, "partial_rotary_factor": 0.25},
    "Glm4ForCausalLM": SIZES | {"num_key_value_heads": 4, "attention_bias": False, "rope_theta": 77.0},
    "HeliumForCausalLM": SIZES | {"num_attention_heads": 20, "num_key_value_heads": 4, "attention_bias": True},
    "Ernie4_5ForCausalLM": SIZES | {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False},
    "SeedOssForCausalLM": SIZES | {"num_key_value_heads": 4, "attention_bias": False, "attention_out_bias": True},
    "CohereForCausalLM": SIZES
    | {"hidden_size": 4096, "num_key_value_heads": 4, "logit_scale": 0.3, "layer_norm_eps": 1e-3},
    "Cohere2ForCausalLM": SIZES | {"hidden_size": 4096, "num_key_value_heads": 4, "sliding_window": 7, "head_dim": 128},
    "StableLmForCausalLM": SIZES | {"num_key_value_heads": 4, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "MinistralForCausalLM": SIZES
    | {"num_key_value_heads": 4, "sliding_window": 7}
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "Ministral3ForCausalLM": SIZES
    | {"num_key_value_heads": 4, "sliding_window": 7, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "MambaForCausalLM": {"hidden_size": 64, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 5, "expand": 4},
    "Mamba2ForCausalLM": {"hidden_size": 4096, "num_hidden_layers": 2, "num_heads": 128, "head_dim": 64, "n_groups": 2},
    "BambaForCausalLM": SIZES | BAMBA,
    "FalconMambaForCausalLM": {"hidden_size": 64, "num_hidden_layers": 2, "time_step_rank": 5, "mixer_rms_eps": 1e-3},
    "FalconH1ForCausalLM": SIZES | {"mamba_n_heads": 16, "key_multiplier": 0.7, "mlp_multipliers": [0.5, 2.0]},
    "JambaForCausalLM": SIZES | {"attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 4},
    "Lfm2ForCausalLM": SIZES | {"layer_types": ["conv", "full_attention", "conv"], "block_ffn_dim_multiplier": 1.5},
    "Lfm2MoeForCausalLM": SIZES | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "NemotronHForCausalLM": {"hidden_size": 2048, "num_attention_heads": 32, "max_position_embeddings": 256}
    | {"layers_block_type": ["mamba", "mlp", "attention"], "mamba_num_heads": 16, "intermediate_size": 77},
    "OlmoHybridForCausalLM": SIZES
    | {"hidden_size": 1920, "num_attention_heads": 30}
    | {"linear_key_head_dim": 48, "linear_value_head_dim": 96, "linear_allow_neg_eigval": False},
}


def of_transformers(architecture, description):
    """The configuration that transformers makes of a description, with everything in it."""
    name = architecture.removesuffix("ForCausalLM")
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    return config_class(**{name: value for name, value in description.items() if name != "architectures"})


def read(architecture, description):
    return read_config("folder", {"architectures": [architecture]} | description)[1]


def check_same(architecture, description):
    full = of_transformers(architecture, json.loads(json.dumps(description))).to_dict()
    assert read(architecture, description) == read(architecture, full), description


@pytest.mark.parametrize("architecture", SMALL)
def test_what_is_left_out_is_what_transformers_has(architecture):
    stated = SMALL[architecture]
    check_same(architecture, stated)
    needed = {"attn_layer_indices", "attn_layer_period", "attn_layer_offset"}  # without attention it is none of ours
    needed |= {"mamba_n_heads"}  # heads of the class's default are too small for some
    if "layer_types" in stated:
        needed |= {"layer_types", "num_hidden_layers", "num_local_experts"}
    for left_out in stated.keys() - needed:
        check_same(architecture, {name: value for name, value in stated.items() if name != left_out})
    others = {
        "BambaForCausalLM": {"attn_layer_indices": [2]},
        "FalconH1ForCausalLM": {"mamba_n_heads": 16},
        "GraniteMoeHybridForCausalLM": {"layer_types": ["full_attention"] * 4, "num_local_experts": 0},
        "JambaForCausalLM": {"attn_layer_offset": 2},
        "Lfm2ForCausalLM": {"full_attn_idxs": [1]},
        "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 2},
    }
    check_same(architecture, {"num_hidden_layers": 4} | others.get(architecture, {}))
    names = {"num_hidden_layers", *family_of(architecture).architectures[architecture]}
    names -= {"attention_bias", "mlp_bias", "hidden_act", "sliding_window_pattern"}
    assert names <= set(dir(of_transformers(architecture, {})))


@pytest.mark.parametrize("architecture", SMALL)
def test_a_file_without_architectures_is_of_its_type(architecture):
    description = SMALL[architecture] | {"model_type": architecture.removesuffix("ForCausalLM").lower()}
    expected = read(architecture, description)
    for stated in ({}, {"architectures": None}, {"architectures": []}):
        assert read_config("folder", description | stated)[1] == expected


def test_null_has_the_meaning_that_it_has_in_transformers():
    for name in ("num_key_value_heads", "head_dim"):
        check_same("LlamaForCausalLM", SIZES | {name: None})
    check_same("MistralForCausalLM", SIZES | {"sliding_window": None})
    check_same("Qwen2ForCausalLM", SIZES | {"num_key_value_heads": None, "layer_types": None})
    check_same("Qwen2ForCausalLM", SIZES | {"sliding_window": None, "use_sliding_window": True})
    assert read("MistralForCausalLM", SIZES).windows == (4096,) * 3
    # and where it has none, null is left out
    assert read("LlamaForCausalLM", SIZES | {"rms_norm_eps": None}) == read("LlamaForCausalLM", SIZES)


# ==== rotary frequencies ====

LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
THETA = {"rope_theta": 500.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
ROPES = [
    {},
    {"rope_theta": 777.0},
    {"rope_theta": 777},
    {"rope_parameters": THETA},
    {"rope_parameters": THETA, "rope_theta": 777.0},
    {"rope_parameters": THETA, "rope_scaling": None},
    {"rope_parameters": THETA, "rope_scaling": {}},
    {"rope_parameters": THETA | {"rope_type": "default"}, "rope_scaling": LINEAR},
    {"rope_parameters": THETA | {"rope_type": "default"}, "rope_scaling": LINEAR, "rope_theta": 777.0},
    {"rope_parameters": THETA | LINEAR, "rope_scaling": {"type": "default"}},
    {"rope_parameters": THETA | LINEAR, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 99.0}},
    {"rope_parameters": LINEAR, "rope_theta": 777.0},
    {"rope_scaling": {"type": "linear", "factor": 3}},
    {"rope_scaling": {"type": "llama3", "rope_type": "linear", "factor": 3.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 3.0}},
    {"rope_scaling": {"type": "default", "factor": 3.0}},
    {"rope_scaling": {"factor": 3.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
    {"rope_scaling": {"type": "default", "mrope_section": [1, 2]}, "partial_rotary_factor": 0.5},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 64},
    {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 64},
    {"rope_parameters": LLAMA3 | THETA | {"original_max_position_embeddings": 32}, "rope_scaling": LINEAR},
    {"rope_parameters": {"full_attention": LINEAR}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_scaling": YARN},
    {"rope_scaling": YARN | {"original_max_position_embeddings": 32, "truncate": False, "beta_fast": 4.0}},
    {"rope_scaling": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5, "beta_slow": 0.5}},
    {"rope_scaling": YARN | {"attention_factor": 1.5, "factor": 2.5}},
]


@pytest.mark.parametrize("rope", ROPES, ids=str)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_rotary_frequencies_are_those_of_transformers(architecture, rope):
    description = SIZES | {"sliding_window": None} | rope
    try:
        config = read(architecture, description)
    except Unsupported:
        assert "full_attention" in str(rope)  # which then runs, or fails, in transformers
        return
    family = architecture.removesuffix("ForCausalLM")
    module = getattr(transformers.models, family.lower())
    rotary = getattr(getattr(module, f"modeling_{family.lower()}"), f"{family}RotaryEmbedding")
    expected = rotary(of_transformers(architecture, json.loads(json.dumps(description))))
    torch.testing.assert_close(config.rope_frequencies(), expected.inv_freq, rtol=2e-6, atol=0)
    magnitude = 1.0 if config.rope_scaling is None else config.rope_scaling.magnitude
    assert magnitude == pytest.approx(expected.attention_scaling)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope scaling 'mrope'"),
        ({"rope_scaling": LINEAR, "partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor 4.0"),
    ],
)
def test_other_scaling_is_left_to_transformers(rope, message):
    with pytest.raises(Unsupported, match=message):
        read("LlamaForCausalLM", SIZES | rope)


@pytest.mark.parametrize(
    "rope, message",
    [
        ({"rope_scaling": {"type": "linear"}}, "config.json is incomplete: it has no 'rope_scaling.factor'"),
        ({"rope_parameters": {"type": "linear"}}, "it has no 'rope_parameters.factor'"),
        (
            {"rope_scaling": {"type": "linear", "factor": "4"}},
            "its rope_scaling.factor must be a number above 0, got '4'",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "its rope_scaling.factor must be a number above 0, got 0"),
        ({"rope_scaling": {"rope_type": 3}}, "its rope_scaling.rope_type must be a string, got 3"),
        ({"rope_scaling": [1]}, r"its rope_scaling must be entries of its own, got \[1\]"),
        ({"rope_theta": -1.0}, "its rope_theta must be a number above 0, got -1.0"),
        ({"rope_theta": math.nan}, "its rope_theta must be a number above 0, got nan"),
    ],
)
def test_wrong_scaling_is_named(rope, message):
    with pytest.raises(ValueError, match=f"^folder: config.json is .*{message}|^folder: {message}"):
        read("LlamaForCausalLM", SIZES | rope)


def test_a_bamba_obeys_the_same_entries():
    description = SIZES | BAMBA | {"rope_theta": 777.0}
    check_same("BambaForCausalLM", description)
    check_same("BambaForCausalLM", description | {"rope_parameters": THETA})
    check_same("BambaForCausalLM", description | {"rope_parameters": {"partial_rotary_factor": 1.0}})
    for scaling in ({"rope_scaling": LINEAR}, {"rope_scaling": LINEAR, "rope_parameters": THETA}):
        with pytest.raises(ValueError, match="rope scaling 'linear', HybridRunner has none"):
            read("BambaForCausalLM", description | scaling)


# ==== whole folders ====


def change(folder, **entries):
    description = json.loads((folder / "config.json").read_text())
    for name, value in entries.items():
        if value is ...:
            description.pop(name, None)
        else:
            description[name] = value
    (folder / "config.json").write_text(json.dumps(description))


def test_logits_are_those_of_transformers_whatever_is_said_twice(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    change(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}, architectures=..., num_key_value_heads=2)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert theirs.config.rope_parameters["rope_type"] == "linear"
    check_last(load(str(tmp_path), dtype=torch.float32, device="cpu"), theirs)


def test_other_models_are_found_by_their_type_too(tmp_path):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2)
    ).eval()
    model.save_pretrained(tmp_path)
    change(tmp_path, architectures=...)
    check_last(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)
    for wrong in ({"n_head": "2"}, {"n_embd": 3}, {"activation_function": "none"}, {"layer_norm_epsilon": [1]}):
        change(tmp_path, **wrong)
        with pytest.raises(ValueError, match=f"{tmp_path.name}|n_embd|num_heads"):
            load(str(tmp_path), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny_model("llama_tied_with_biases"),
        lambda: tiny_mamba("mamba"),
        lambda: tiny_hybrid("bamba_tied_with_biases"),
    ],
    ids=["llama", "mamba", "bamba"],
)
def test_a_head_that_is_not_the_embedding_is_not_tied(make, tmp_path):
    """transformers takes a configuration that ties two matrices for wrong where a file has two that differ."""
    make().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = next(name for name in tensors if "embed" in name)
    save_file(tensors | {"lm_head.weight": tensors[embedding].clone()}, tmp_path / "model.safetensors")
    assert load(str(tmp_path), dtype=torch.float32, device="cpu").config.tied_embedding
    head = tensors[embedding].roll(1, 0)
    save_file(tensors | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    runner = load(str(tmp_path), dtype=torch.float32, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for found in (runner.weights.named(runner.config), theirs.state_dict()):
        assert torch.equal(found["lm_head.weight"], head) and torch.equal(found[embedding], tensors[embedding])


# ==== whatever a file says ====

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.just(2**40),
    st.just(10**30),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 9), max_size=3),
    st.dictionaries(st.sampled_from(["factor", "type"]), st.integers(0, 2)),
    st.sampled_from(["linear", "auto", "silu", "4", [], {}, {"rope_type": "llama3"}, ["sliding_attention"] * 3]),
)
ENTRIES = sorted(
    {name for family in FAMILIES.values() for defaults in family.architectures.values() for name in defaults}
    | {
        "architectures",
        "model_type",
        "head_dim",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "layer_types",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        "attn_layer_indices",
        "mamba_d_head",
        "ssm_cfg",
        "time_step_limit",
        "time_step_rank",
        "intermediate_size",
        "quantization_config",
        "d_model",
        "n_layer",
        "dim",
        "n_layers",
        "pad_vocab_size_multiple",
        "attn_layer_idx",
        "rms_norm",
    }
)


@settings(max_examples=400, derandomize=True, deadline=None, database=None)
@given(st.sampled_from([*SMALL, None]), st.dictionaries(st.sampled_from(ENTRIES), ODD, min_size=1, max_size=3))
def test_any_entry_is_read_or_named(architecture, changed):
    if architecture is None:  # mamba_ssm's
        stated = {"d_model": 64, "n_layer": 2, "vocab_size": 99, "rms_norm": True, "ssm_cfg": {"layer": "Mamba2"}}
    else:
        stated = SMALL[architecture] | {"architectures": [architecture]}
    try:
        read_config("folder", stated | changed)
    except ValueError as error:
        assert str(error).startswith("folder") or any(
            name in str(error) for name in ("must", "head_dim", "multiples of")
        ), error


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.sampled_from(ENTRIES), ODD)
def test_a_folder_with_any_entry_loads_or_says_why(name, value):
    for folder in FOLDERS:
        config = folder / "config.json"
        stated = config.read_text()
        try:
            config.write_text(json.dumps(json.loads(stated) | {name: value}))
            load(str(folder), dtype=torch.float32, device="cpu")
        except ValueError as error:
            assert str(error)
        finally:
            config.write_text(stated)


FOLDERS = []


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory):
    for model in (tiny_model("qwen2"), tiny_mamba("mamba2")):
        FOLDERS.append(tmp_path_factory.mktemp("model"))
        model.save_pretrained(FOLDERS[-1])
    yield
    FOLDERS.clear()
