"""gpt-oss: experts in MXFP4, in folders and in GGUF files, against the same values in floats; and what is refused."""

import json

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import from_transformers, load
from pyspec.caches import cache_from_name
from tests.helpers.quantised_folders import mxfp4_bytes
from tests.helpers.runner_checks import check_prompt, check_row_rule
from tests.helpers.tiny_models import IN_GGUF, tiny_model, write_gguf

KINDS = gguf.GGMLQuantizationType


@pytest.fixture
def in_mxfp4(tmp_path):
    """A folder with experts in MXFP4, and the model of transformers that has their values."""
    model = tiny_model("gpt_oss")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors, own = load_file(tmp_path / "model.safetensors"), model.state_dict()
    for seed, name in enumerate(list(tensors)):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            codes, exponents, values = mxfp4_bytes((experts, outputs, inputs), seed)
            tensors[f"{name}_blocks"] = codes.unflatten(2, (-1, 16))
            tensors[f"{name}_scales"] = exponents
            own[name].copy_(torch.from_numpy(values).float().mT)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path, model


def test_a_folder_in_mxfp4_has_the_values_of_its_codes(in_mxfp4):
    folder, model = in_mxfp4
    check_prompt(load(str(folder), dtype=torch.float32, device="cpu"), model)


def test_a_folder_in_mxfp4_keeps_its_bits(in_mxfp4):
    folder, model = in_mxfp4
    runner = load(str(folder), device="cpu")
    layer, expected = runner.weights.layers[1], from_transformers(model).weights.layers[1]
    for name in ("gate_up", "down"):
        matrix = getattr(layer, name)
        assert matrix.dtype == "mxfp4"
        assert torch.equal(matrix.unpack(), getattr(expected, name).unpack())
    check_row_rule(runner)


def test_a_gguf_file_keeps_the_bits_of_its_experts(tmp_path):
    changed, metadata = IN_GGUF["gpt_oss"]

    def kind_of(name):
        return KINDS.MXFP4 if name.endswith("exps.weight") else KINDS.F32

    write_gguf(tmp_path / "tiny.gguf", tiny_model("gpt_oss", **changed), kind_of, **metadata)
    exact, runner = (load(str(tmp_path / "tiny.gguf"), dtype=dtype, device="cpu") for dtype in (torch.float32, None))
    layer, expected = runner.weights.layers[0], exact.weights.layers[0]
    assert layer.gate_up.dtype == layer.down.dtype == "mxfp4"
    for name in ("gate_up", "down"):
        assert torch.equal(getattr(layer, name).unpack(), getattr(expected, name).unpack())
    check_row_rule(runner)


def test_sinks_go_with_dense_caches_and_our_own_prompts():
    runner = from_transformers(tiny_model("gpt_oss"))
    with pytest.raises(ValueError, match="cache must be dense for a model with attention sinks"):
        runner.prefill([[1, 2, 3]], cache=cache_from_name("int8"))


def test_other_activations_are_left_to_transformers(tmp_path):
    tiny_model("gpt_oss", swiglu_limit=5.0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has swiglu_limit 5.0, our kernels have 7.0"):
        load(str(tmp_path), dtype=torch.int8, device="cpu")
