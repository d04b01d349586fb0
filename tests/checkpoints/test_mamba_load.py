"""Where Mamba and Mamba-2 models come from: folders and names of all who publish them, and live models."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import from_transformers, load
from pyspec.ops.linear import LinearWeight
from pyspec.runners.attention import AttentionRunner
from pyspec.runners.foreign import TransformersRunner
from pyspec.runners.recurrent import RecurrentRunner
from tests.helpers.random_llama import VOCABULARY
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_mambas import FAMILIES, KINDS, tiny_mamba

transformers = pytest.importorskip("transformers")


def load_cpu(folder, dtype=torch.float32):
    return load(str(folder), dtype=dtype, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_transformers_are_read(kind, tmp_path):
    model = tiny_mamba(kind)
    model.save_pretrained(tmp_path)
    runner = load_cpu(tmp_path)
    assert isinstance(runner, RecurrentRunner if KINDS[kind][0] == "Mamba" else RecurrentRunner)
    check_last(runner, model)
    assert runner.config.tied_embedding == (runner.weights.head is runner.weights.embedding)
    assert load_cpu(tmp_path, torch.int8).weight_dtype == torch.int8


def renamed(model, prefix="") -> dict[str, torch.Tensor]:
    """The state of a model under mamba_ssm's names."""
    state = model.state_dict()
    return {prefix + name.replace(".embeddings.", ".embedding."): values.clone() for name, values in state.items()}


def mamba_ssm_models():
    """(transformers model, its config.json as mamba_ssm writes it), with a vocabulary that was padded."""
    shared = {"vocab_size": 104, "hidden_size": 64, "num_hidden_layers": 2}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**shared))
    groups = {"n_groups": 2, "num_heads": 2, "head_dim": 64, "state_size": 128, "chunk_size": 8}
    mamba2 = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**shared, **groups, tie_word_embeddings=True))
    description = {"d_model": 64, "n_layer": 2, "vocab_size": 99, "pad_vocab_size_multiple": 8, "rms_norm": True}
    description |= {"residual_in_fp32": True, "fused_add_norm": True, "ssm_cfg": {}}
    newer = description | {"ssm_cfg": {"layer": "Mamba2", "ngroups": 2}, "attn_layer_idx": [], "tie_embeddings": True}
    return [(mamba.eval(), description), (mamba2.eval(), newer)]


@pytest.mark.parametrize("index", [0, 1], ids=FAMILIES)
def test_folders_of_mamba_ssm_are_read(index, tmp_path):
    model, description = mamba_ssm_models()[index]
    (tmp_path / "config.json").write_text(json.dumps(description))
    torch.save(renamed(model), tmp_path / "pytorch_model.bin")
    check_last(load_cpu(tmp_path), model)

    for changed, message in (
        ({"rms_norm": False}, "rms_norm False"),
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \[1\]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layers of Mamba3, the families are Mamba1 and Mamba2"),
        ({"n_layer": 3}, "has no tensor backbone.layers.2"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(description | changed))
        with pytest.raises(ValueError, match=message):
            load_cpu(tmp_path)
    del description["n_layer"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="config.json is incomplete: it has no 'n_layer'"):
        load_cpu(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(description | {"n_layer": 2}))
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "pytorch_model.bin").read_bytes()[:-100])
    with pytest.raises(ValueError, match="pytorch_model.bin is truncated or corrupt"):
        load_cpu(tmp_path)


def test_a_hub_repository_without_safetensors_brings_its_pytorch_file(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    model, description = mamba_ssm_models()[1]

    def download(hub_id, allow_patterns):
        if "pytorch_model.bin" in allow_patterns:
            torch.save(renamed(model), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps(description))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    check_last(load_cpu("state-spaces/mamba2-tiny"), model)


def test_codestral_mambas_folder_is_read(tmp_path):
    model, _ = mamba_ssm_models()[1]
    description = {"dim": 64, "n_layers": 2, "vocab_size": 104, "n_groups": 2, "pad_vocab_size_multiple": 1}
    description |= {"rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "tie_embeddings": True}
    (tmp_path / "params.json").write_text(json.dumps(description))
    save_file(renamed(model, "model."), tmp_path / "consolidated.safetensors")
    check_last(load_cpu(tmp_path), model)


@pytest.mark.parametrize(
    "kind, changed, message",
    [
        ("mamba", {"hidden_act": "gelu"}, "hidden_act 'gelu', RecurrentRunner has silu"),
        ("mamba", {"state_size": 24}, "RecurrentRunner has .* state_size in multiples of 16, got 96 and 24"),
        ("mamba2", {"hidden_act": "gelu"}, "hidden_act 'gelu', RecurrentRunner has silu"),
        ("mamba2", {"time_step_limit": [0.0, 1.0]}, "time_step_limit .* RecurrentRunner has no limit"),
        ("mamba2", {"head_dim": 24}, "RecurrentRunner has head_dim in multiples of 16"),
        ("mamba2", {"n_groups": 2}, "heads must be a multiple of groups, got 3 and 2"),
        ("mamba2", {"num_hidden_layers": 0}, "layers must be at least 1, got 0"),
        ("mamba2", {"vocab_size": 90}, r"embeddings.weight must have shape \(90, 48\)"),
    ],
)
def test_configurations_that_are_not_supported_are_named(kind, changed, message, tmp_path):
    tiny_mamba(kind).save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(description | changed))
    with pytest.raises(ValueError, match=message):
        load_cpu(tmp_path)


def test_missing_tensors_are_named(tmp_path):
    tiny_mamba("mamba2").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "backbone.layers.1.mixer.A_log"
    save_file({key: values for key, values in tensors.items() if key != name}, file)
    with pytest.raises(ValueError, match=f"has no tensor {name}"):
        load_cpu(tmp_path)
    save_file(tensors | {name: tensors[name] * torch.nan}, file)
    with pytest.raises(ValueError, match=f"tensor {name} has values that are NaN or infinite"):
        load_cpu(tmp_path)


def test_live_models_run_on_our_kernels_where_there_are_some():
    runner = from_transformers(tiny_mamba("mamba_untied_with_biases"))
    assert isinstance(runner, RecurrentRunner) and runner.eos_tokens == frozenset()
    assert from_transformers(tiny_mamba("mamba2").to(torch.bfloat16)).dtype == torch.bfloat16
    shape = {"vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, intermediate_size=64, eos_token_id=7))
    runner = from_transformers(llama.eval())
    assert isinstance(runner, AttentionRunner) and runner.eos_tokens == {7}
    check_last(runner, llama)
    other = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2))
    assert isinstance(from_transformers(other), TransformersRunner)
    with pytest.raises(ValueError, match="dtype must be the model's own"):
        from_transformers(other, dtype=torch.float16)
    recurrent = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="RwkvForCausalLM is not supported: it keeps a recurrent state"):
        from_transformers(transformers.RwkvForCausalLM(recurrent))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_exist_once(kind):
    runner = from_transformers(tiny_mamba(kind))
    config = runner.config
    dense = type(runner.weights).empty(config, torch.float32, torch.device("cpu"))
    places = dense.named(config)  # views, no copies
    for name, values in runner.weights.named(config).items():
        places[name].copy_(values)
    dense.lay_out(torch.float32)
    assert (dense.head is dense.embedding) == config.tied_embedding
    assert all(isinstance(getattr(layer, name), LinearWeight) for layer in dense.layers for name in layer.MATRICES)
    other = type(runner)(config, dense)
    assert other.fingerprint == runner.fingerprint
    assert torch.equal(other.prefill([[1, 2, 3]])[0], runner.prefill([[1, 2, 3]])[0])
