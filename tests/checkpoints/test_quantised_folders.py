"""Quantised folders: every value is that of the method's definition, and matrices keep their bits."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import pyspec
from pyspec import load
from pyspec.checkpoints.converted import save_converted
from pyspec.checkpoints.huggingface import TensorCheckpoint
from pyspec.checkpoints.quantised_folders import QuantisedCheckpoint, quantisation_of
from tests.helpers import runner_checks
from tests.helpers.quantised_folders import (
    SHAPE,
    awq,
    compressed_tensors,
    fp8,
    gptq,
    mxfp4,
    mxfp4_bytes,
    write_folder,
)
from tests.helpers.random_llama import random_tokens
from tests.helpers.tiny_models import tiny_model

METHODS = {  # and the format of a matrix with 128 inputs, and of one with 256
    "gptq": (gptq, ("int4_128", "int4_128")),
    "gptq_v2_in_32s": (partial(gptq, version="gptq_v2", group_size=32), ("int4_32", "int4_32")),
    "gptq_in_64s_symmetric": (partial(gptq, group_size=64, symmetric=True), ("int4_64", "int4_64")),
    "gptq_of_outputs": (partial(gptq, group_size=-1), ("int4_128", "int4_128")),
    "gptq_2_bits": (partial(gptq, bits=2, group_size=32), ("int4_32", "int4_32")),
    "gptq_3_bits": (partial(gptq, bits=3), ("int4_128", "int4_128")),
    "gptq_8_bits": (partial(gptq, bits=8, symmetric=True), (torch.int8, torch.int8)),
    "gptq_8_bits_with_zero_points": (partial(gptq, bits=8), None),
    "gptq_desc_act": (partial(gptq, group_size=32, desc_act=True), ("int4_32", "int4_32")),
    "gptq_desc_act_in_128s": (partial(gptq, desc_act=True), ("int4_128", "int4_128")),
    "gptq_desc_act_8_bits": (partial(gptq, bits=8, symmetric=True, desc_act=True), (torch.int8, torch.int8)),
    "awq": (awq, ("int4_128", "int4_128")),
    "awq_in_64s": (partial(awq, group_size=64), ("int4_64", "int4_64")),
    "awq_gemv": (partial(awq, group_size=32, version="gemv"), ("int4_32", "int4_32")),
    "compressed_tensors": (compressed_tensors, ("int4_128", "int4_128")),
    "compressed_tensors_of_outputs": (partial(compressed_tensors, group_size=-1), ("int4_128", "int4_128")),
    "compressed_tensors_zero_points": (
        partial(compressed_tensors, group_size=32, symmetric=False),
        ("int4_32", "int4_32"),
    ),
    "compressed_tensors_actorder": (
        partial(compressed_tensors, group_size=64, actorder=True),
        ("int4_64", "int4_64"),
    ),
    "compressed_tensors_8_bits": (partial(compressed_tensors, bits=8), (torch.int8, torch.int8)),
    "compressed_tensors_int8": (
        partial(compressed_tensors, bits=8, group_size=-1, packed=False),
        (torch.int8, torch.int8),
    ),
    "compressed_tensors_fp8": (fp8, None),
    "compressed_tensors_mxfp4": (mxfp4, ("mxfp4", "mxfp4")),
    "fp8": (partial(fp8, block=48), None),
}


def folder_of(tmp_path, name: str, kind: str = "llama", **changed):
    model = tiny_model(kind, **SHAPE | changed)
    write_folder(tmp_path, model, lambda _, weight: METHODS[name][0](weight))
    return tmp_path, model


def logits_of(model, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([prompt])).logits[0, -1]


@pytest.mark.filterwarnings("ignore:.*it becomes floats:RuntimeWarning")
@pytest.mark.parametrize("name", METHODS)
def test_every_value(name, tmp_path):
    """Those of float64, in fp32 and in the folder's bits; and the model says what transformers says with them."""
    folder, model = folder_of(tmp_path, name)
    runner, exact = load(folder, device="cpu"), load(folder, dtype=torch.float32, device="cpu")
    prompt = random_tokens(20)
    torch.testing.assert_close(exact.prefill([prompt])[0], logits_of(model, prompt), rtol=1e-4, atol=1e-4)
    expected = {name: values for name, values in model.state_dict().items() if "proj" in name}
    formats = METHODS[name][1]
    kept, dense = (found.weights.named(found.config) for found in (runner, exact))
    for matrix, values in expected.items():
        assert torch.equal(dense[matrix], values), matrix
        assert torch.equal(kept[matrix], values if formats else values.bfloat16()), matrix
    layer = runner.weights.layers[1]
    assert (layer.qkv.dtype, layer.down.dtype) == (formats or (torch.bfloat16, torch.bfloat16))
    assert runner.dtype == torch.bfloat16 and runner.weights.head.dtype == torch.bfloat16
    assert runner.fingerprint == exact.fingerprint
    found = runner.prefill([prompt])[0]
    assert (found - exact.prefill([prompt])[0]).std() < 0.2 * found.std()  # x has 8 bits in blocks as long as a group


@pytest.mark.parametrize("kind", ["qwen2", "llama_tied_with_biases", "qwen3"])
def test_families_and_biases(kind, tmp_path):
    folder, model = folder_of(tmp_path, "gptq", kind)
    prompt = random_tokens(20)
    found = load(folder, dtype=torch.float32, device="cpu").prefill([prompt])[0]
    torch.testing.assert_close(found, logits_of(model, prompt), rtol=1e-4, atol=1e-4)


def mixed(name: str, weight: np.ndarray):
    """Layers that differ in groups and bits, joined matrices too."""
    if name.endswith("k_proj"):
        return gptq(weight, group_size=32)
    if name.endswith(("v_proj", "down_proj")):
        return gptq(weight, bits=8, symmetric=True)
    return gptq(weight)


def test_layers_that_differ(tmp_path):
    """And one that is not quantised at all, nor are those joined with it."""
    model = tiny_model("llama", **SHAPE)
    write_folder(tmp_path, model, mixed, leave=("lm_head", "1.mlp.up_proj"))
    runner = load(tmp_path, device="cpu")
    first, second = runner.weights.layers
    assert first.qkv.dtype == "int4_128, int4_32, q8_0" and first.down.dtype == torch.int8
    assert first.gate_up.dtype == "int4_128" and second.gate_up.dtype == torch.bfloat16
    named = runner.weights.named(runner.config)
    for name, values in model.state_dict().items():
        if "proj" in name:
            is_float = "1.mlp" in name and "down" not in name
            assert torch.equal(named[name], values.bfloat16().float() if is_float else values), name
    runner_checks.check_row_rule(runner)
    runner_checks.check_batches(runner, 8)


def test_drafts_change_no_text(tmp_path):
    runner = load(folder_of(tmp_path, "awq")[0], device="cpu")
    prompt = random_tokens(9) * 3
    plain = pyspec.generate(runner, prompt, drafter=None, max_new_tokens=20)
    for drafter in ("merged", "recycling"):
        assert pyspec.generate(runner, prompt, drafter=drafter, budget=8, max_new_tokens=20).tokens == plain.tokens


def test_g_idx_that_was_never_set_and_a_settings_file_of_its_own(tmp_path):
    folder, model = folder_of(tmp_path, "gptq_v2_in_32s")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {name: torch.zeros_like(values) if "g_idx" in name else values for name, values in tensors.items()},
        folder / "model.safetensors",
    )
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps({**settings, "quant_method": None}))
    named = load(folder, device="cpu").weights
    found = named.named(load(folder, device="cpu").config)["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(found, model.model.layers[1].mlp.down_proj.weight)


def test_a_warning_where_bits_cannot_be_kept(tmp_path):
    folder, _ = folder_of(tmp_path, "gptq_8_bits_with_zero_points")
    with pytest.warns(RuntimeWarning, match=r"model.layers.0.self_attn.[a-z]_proj.weight, and maybe .* becomes floats"):
        load(folder, device="cpu")


def test_groups_in_the_order_of_activations(tmp_path):
    """Rows of a tree, drafts, and a converted file; each matrix has an order of its own."""
    folder, _ = folder_of(tmp_path, "gptq_desc_act")
    runner = load(folder, device="cpu")
    layer = runner.weights.layers[0]
    assert layer.qkv.order is not None and len(layer.down.order) == 256
    runner_checks.check_row_rule(runner)
    runner_checks.check_batches(runner, 8)
    save_converted(runner, tmp_path / "tiny.pyspec")
    found, prompt = load(tmp_path / "tiny.pyspec"), random_tokens(20)
    assert torch.equal(found.prefill([prompt])[0], runner.prefill([prompt])[0])


def test_parts_of_a_matrix_in_several_orders_become_floats(tmp_path):
    """Which no quantiser makes, as the order comes from what the parts share: their inputs."""
    model = tiny_model("llama", **SHAPE)
    write_folder(
        tmp_path, model, lambda name, weight: gptq(weight, group_size=32, desc_act=not name.endswith("k_proj"))
    )
    with pytest.warns(
        RuntimeWarning, match="q_proj.weight is one matrix with tensors of .* in another order of groups"
    ):
        runner = load(tmp_path, device="cpu")
    named = runner.weights.named(runner.config)
    for name in ("q", "k"):
        name = f"model.layers.0.self_attn.{name}_proj.weight"
        assert torch.equal(named[name], model.state_dict()[name].bfloat16().float())
    assert runner.weights.layers[0].gate_up.dtype == "int4_32"


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_in_the_order_of_activations(tied, tmp_path):
    """And an embedding, whose rows are read by token."""
    model = tiny_model("llama", **SHAPE, vocab_size=128, tie_word_embeddings=tied)
    write_folder(tmp_path, model, lambda _, weight: gptq(weight, group_size=32, desc_act=True), leave=())
    runner, exact = load(tmp_path, device="cpu"), load(tmp_path, dtype=torch.float32, device="cpu")
    tokens = torch.tensor([5, 0, 70])
    assert torch.equal(runner.weights.embed(runner.config, tokens), exact.weights.embed(exact.config, tokens))
    assert torch.equal(runner.weights.head.unpack(), exact.weights.head.unpack())
    assert runner.weights.head.dtype == "int4_32"


def test_experts_in_mxfp4():
    """Three dimensions: codes have one expert's outputs below another's."""
    codes, exponents, values = mxfp4_bytes((3, 6, 64))
    tensors = {"experts.down_proj_blocks": codes.unflatten(2, (2, 16)), "experts.down_proj_scales": exponents}
    method = quantisation_of("folder", {"quantization_config": {"quant_method": "mxfp4"}})
    checkpoint = QuantisedCheckpoint(TensorCheckpoint(tensors), method, "folder")
    assert checkpoint.shapes == {"experts.down_proj": (3, 6, 64)}
    ((_, found),) = checkpoint.blocks("experts.down_proj")
    assert torch.equal(found, torch.from_numpy(values).float())
    assert torch.equal(checkpoint.stored("experts.down_proj").codes.values(), found.flatten(0, 1))


# ==== what is refused ====


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "hqq"}, "is quantised by hqq, which pyspec does not read; it reads folders of gptq, .* GGUF"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "is quantised by bitsandbytes, which pyspec does not"),
        ({"quant_method": "gptq", "bits": 5}, "has GPTQ's integers of 5 bits, supported are 2, 3, 4 and 8"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            "has GPTQ's checkpoint_format marlin, supported are gptq and gptq_v2",
        ),
        ({"quant_method": "awq", "version": "gemv_fast"}, "has AWQ's integers of 4 bits in the form gemv_fast"),
        (
            {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
            "has compressed-tensors in the format nvfp4-pack-quantized, supported are pack-quantized,",
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"format": "marlin-24"}}},
            "has compressed-tensors in the format marlin-24",
        ),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": {}}}},
            "has transform_config, which pyspec does not compute",
        ),
    ],
)
def test_methods_that_are_refused_by_name(settings, message, tmp_path):
    folder, _ = folder_of(tmp_path, "gptq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    (folder / "model.safetensors").unlink()  # before anything is read of it
    with pytest.raises(ValueError, match=message):
        load(folder, device="cpu")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "no 'quantization_config.quant_method'"),
        ({"quant_method": 4}, "its quantization_config.quant_method must be a string, got 4"),
        ({"quant_method": "gptq"}, "no 'quantization_config.bits'"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size must be two whole numbers above 0"),
        ("gptq", "its quantization_config must be entries of its own, got 'gptq'"),
    ],
)
def test_settings_that_are_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        quantisation_of("folder", {"quantization_config": settings or {"bits": 4}})


@pytest.mark.parametrize(
    "name, part, change, message",
    [
        ("gptq", "qzeros", None, "has no tensor model.layers.0.mlp.down_proj.qzeros"),
        ("gptq", "scales", lambda part: part[:1], r"down_proj.scales must have shape \(2, 128\), got \(1, 128\)"),
        ("gptq", "scales", lambda part: part * torch.nan, "down_proj.scales has values that are NaN or infinite"),
        ("gptq", "g_idx", lambda part: part + 1, r"down_proj.g_idx must be in \[0, 2\), got \[1, 2\]"),
        ("gptq", "qweight", lambda part: part.float(), "down_proj.qweight must have dtype torch.int32, got"),
        ("gptq", "qweight", lambda part: part[0], "down_proj.qweight must have 2 dimensions and not be empty"),
        ("gptq", "qzeros", lambda part: part[:, :5], "qzeros must have integers of 2, 3, 4 or 8 bits for 128"),
        ("awq", "qweight", lambda part: part[:, :5], r"down_proj.qweight must have shape \(256, 16\)"),
        ("awq_gemv", "scales", lambda part: part[:, :1], "down_proj.scales must have"),
        ("compressed_tensors", "weight_shape", lambda part: part + 64, "weight_packed must have integers of 4 or 8"),
        ("compressed_tensors", "weight_scale", lambda part: part[:3], "weight_scale must have 128 rows of groups"),
        ("fp8", "weight_scale_inv", lambda part: part[:2], "weight_scale_inv must have a scale for every 48 x 48"),
    ],
)  # fmt: skip
def test_tensors_that_are_wrong(name, part, change, message, tmp_path):
    folder, _ = folder_of(tmp_path, name, num_hidden_layers=1)
    tensors = load_file(folder / "model.safetensors")
    key = f"model.layers.0.mlp.down_proj.{part}"
    changed = tensors.pop(key)
    if change is not None:
        tensors[key] = change(changed).contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(folder, device="cpu")
