"""GGUF files of architectures that run through transformers: the same logits, whatever a file may leave out or add."""

import gguf
import numpy as np
import pytest
import torch

import pyspec
from pyspec.checkpoints.foreign_gguf import _ARCHITECTURES
from pyspec.runners.foreign import TransformersRunner

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*through transformers instead")
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
SHAPE |= {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HALF = {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}
KINDS = {  # by architecture: the model, its configuration, and what a file states of it
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 128}, {}),
    "starcoder": ("GPTBigCodeForCausalLM", {"n_inner": 128, "multi_query": True}, {"attention.head_count_kv": 1}),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        GROUPED | {"rope_parameters": ROPE | {"rope_theta": 500.0}, "sliding_window": None},
        {"attention.head_count_kv": 2, "rope.freq_base": 500.0},
    ),
    "gptneox": (
        "GPTNeoXForCausalLM",
        {"intermediate_size": 128, "use_parallel_residual": False} | HALF,
        {"rope.dimension_count": 8, "use_parallel_residual": False},
    ),
    "phi2": ("PhiForCausalLM", {"intermediate_size": 128} | HALF, {"rope.dimension_count": 8}),
    "falcon": (
        "FalconForCausalLM",
        {"new_decoder_architecture": True, "multi_query": False, "num_kv_heads": 2, "ffn_hidden_size": 128},
        {"attention.head_count_kv": 2, "tensor_data_layout": "jploski"},
    ),
    "nemotron": (
        "NemotronForCausalLM",
        GROUPED | HALF | {"head_dim": 16},
        {"attention.head_count_kv": 2, "rope.dimension_count": 8, "rope.scaling.type": "none"},
    ),
    "hunyuan-dense": (
        "HunYuanDenseV1ForCausalLM",
        GROUPED | {"head_dim": 16, "rms_norm_eps": 1e-3, "rope_parameters": ROPE | {"rope_theta": 777.0}},
        {"attention.head_count_kv": 2, "attention.layer_norm_rms_epsilon": 1e-3, "rope.freq_base": 777.0}
        | {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.original_context_length": 128},
    ),
    "olmo": (
        "OlmoForCausalLM",
        GROUPED | {"clip_qkv": 0.5},
        {"attention.head_count_kv": 2, "attention.clamp_kqv": 0.5},
    ),
}


def tiny(architecture):
    name, options, _ = KINDS[architecture]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**(SHAPE | options))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    return model


def as_in_the_file(architecture, name, values, groups):
    """What llama.cpp's converter makes of a tensor."""
    if architecture == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return values.T
    if architecture == "gptneox" and "query_key_value" in name:
        return values.reshape(4, 3, 16, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    if architecture == "falcon" and "query_key_value" in name:
        parts = values.reshape(groups, 4 // groups + 2, 16, 64)
        return np.concatenate([part.reshape(-1, 64) for part in (parts[:, :-2], parts[:, -2], parts[:, -1])])
    if architecture == "nemotron" and name.endswith("norm.weight"):
        return values + 1
    if architecture == "olmo" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return values.reshape(-1, 2, 8, 64).swapaxes(1, 2).reshape(values.shape)
    return values


def write(path, architecture, model, parts=0, tokens=(), **more):
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=parts)
    sizes = {"context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128}
    sizes |= {"attention.head_count": 4, "attention.layer_norm_epsilon": 1e-5} | KINDS[architecture][2] | more
    for key, value in sizes.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    if tokens:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])
        writer.add_eos_token_id(7)
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, 2)
    groups = getattr(model.config, "num_kv_heads", None)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        values = as_in_the_file(architecture, name, tensor.numpy(), groups)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path, dtype=torch.float32):
    return pyspec.load(path, dtype=dtype, device="cpu")


@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_logits_are_those_of_the_model_that_the_file_was_made_of(architecture, tmp_path):
    model = tiny(architecture)
    write(tmp_path / "m.gguf", architecture, model)
    runner = load(tmp_path / "m.gguf")
    assert isinstance(runner, TransformersRunner) and runner.tokenizer is None and runner.eos_tokens == frozenset()
    tokens = torch.randint(3, 96, (1, 40))
    with torch.no_grad():
        torch.testing.assert_close(runner.model(tokens).logits, model(tokens).logits, rtol=0, atol=0)


def test_it_is_said_once_with_the_memory_and_speculates(tmp_path):
    model = tiny("starcoder2")
    write(tmp_path / "m.gguf", "starcoder2", model, parts=20)
    part = tmp_path / "m-00001-of-00002.gguf"
    with pytest.warns(RuntimeWarning, match="'starcoder2', supported in GGUF files are .* through transformers instead,"
                                            r" with weights of 0.000\d+ GB in bfloat16"):  # fmt: skip
        assert load(part, torch.bfloat16).dtype == torch.bfloat16
    tokens = torch.randint(3, 96, (1, 20))
    expected = model.generate(tokens, max_new_tokens=20, do_sample=False, eos_token_id=95)[0, 20:].tolist()
    expected = expected[: expected.index(95)] if 95 in expected else expected
    found = pyspec.generate(load(part), tokens[0].tolist(), drafter="lookup", max_new_tokens=20).tokens
    assert found[: len(expected)] == expected


def test_text_and_its_ends_come_from_the_file(tmp_path):
    tokens = [*(chr(97 + index) for index in range(20)), "ab", *(f"<{index}>" for index in range(75))]
    write(tmp_path / "m.gguf", "phi2", tiny("phi2"), tokens=tokens)
    runner = load(tmp_path / "m.gguf")
    assert runner.tokenizer.encode("abc") == [20, 2] and runner.eos_tokens == {7}
    write(tmp_path / "m.gguf", "phi2", tiny("phi2"), tokens=[*tokens, "more"])
    with pytest.raises(ValueError, match="has 97 tokens, its embedding only 96 rows"):
        load(tmp_path / "m.gguf")


def test_memory_is_said_and_missed_before_it_is_taken(tmp_path, monkeypatch):
    write(tmp_path / "m.gguf", "phi2", tiny("phi2"))
    said = []
    pyspec.load(tmp_path / "m.gguf", dtype=torch.float32, device="cpu", announce=said.append)
    assert [need.kept for need in said] == ["float32"] and 10**5 < said[0].weights < 10**6
    monkeypatch.setattr("pyspec.checkpoints.memory.available_memory", lambda device: 300_000)
    with pytest.raises(MemoryError, match="m.gguf needs .* dtype bfloat16 would take"):
        load(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("architecture", "more", "message"),
    [
        (
            "starcoder2",
            {"rope.scaling.factor": 2.0},
            "metadata 'starcoder2.rope.scaling.factor', which is not read for",
        ),
        ("falcon", {"logit_scale": 2.0}, "metadata 'falcon.logit_scale', which is not read for this architecture"),
        ("nemotron", {"rope.scaling.type": "yarn"}, "has rope scaling 'yarn', which is not read for this architecture"),
        ("phi2", {"attention.key_length": 32}, "has heads whose width is not 64 / 4"),
        ("gptneox", {"feed_forward_length": 96}, r"tensor blk.0.ffn_\w+.\w+ has shape \(\S+.*, which does not fit its"),
        ("olmo", {"block_count": 3}, r"has no tensor blk.2.attn_\w+.weight, which does not fit its architecture"),
        ("olmo", {"block_count": 1}, r"has a tensor blk.1.attn_\w+.weight, which does not fit its architecture"),
        ("gpt2", {"attention.layer_norm_epsilon": "small"}, "its metadata gpt2.attention.layer_norm_epsilon must be"),
    ],
)
def test_what_transformers_would_not_read_is_named(architecture, more, message, tmp_path):
    write(tmp_path / "m.gguf", architecture, tiny(architecture), **more)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "m.gguf")


def test_what_nobody_runs_is_refused_with_both_lists(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    foreign = "; through transformers run GGUF files of falcon, gpt2, gptneox, "
    with pytest.raises(ValueError, match=f"'rwkv7', supported in GGUF files are .*llama, .*{foreign}"):
        load(tmp_path / "m.gguf")
    write(tmp_path / "p.gguf", "phi2", tiny("phi2"))
    for name, dtype, architecture in (("m.gguf", torch.int8, "rwkv7"), ("p.gguf", "int4", "phi2")):
        with pytest.raises(ValueError, match=f"dtype int[48] needs a model of the .* family: .*'{architecture}'"):
            load(tmp_path / name, dtype)
