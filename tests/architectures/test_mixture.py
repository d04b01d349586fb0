"""Mixtures of experts: every checkpoint that they come in, every dtype, and what does not fit."""

import json
import re

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import from_transformers, load
from pyspec.architectures.mixture import ExpertCheckpoint, MixtureConfig
from pyspec.checkpoints.converted import save_converted
from pyspec.checkpoints.huggingface import TensorCheckpoint
from tests.helpers.random_llama import random_tokens, random_tree
from tests.helpers.runner_checks import check_batches, check_prompt, check_row_rule
from tests.helpers.tiny_models import IN_GGUF, tiny_model, write_gguf

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granite_moe"]
each_mixture = pytest.mark.parametrize("kind", MIXTURES)
Kinds = gguf.GGMLQuantizationType


def file_of(tmp_path, kinds, kind="mixtral", other=Kinds.Q4_0, **sizes):
    """A model in the bits of its file, and in floats; its tensors have the type in `kinds` by their name, or other."""
    changed, metadata = IN_GGUF[kind]
    if "moe_intermediate_size" in sizes:
        metadata = metadata | {"expert_feed_forward_length": sizes["moe_intermediate_size"]}

    def kind_of(name):
        own = [found for part, found in kinds.items() if f".{part}" in name]
        return Kinds.F32 if "gate_inp" in name else own[0] if own else other

    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model(kind, **changed | sizes), kind_of, **metadata)
    return [load(str(path), dtype=dtype, device="cpu") for dtype in (None, torch.float32)]


@each_mixture
def test_a_live_model_has_one_tensor_for_all_experts(kind):
    model = tiny_model(kind)
    assert any(name.endswith("experts.gate_up_proj") for name in model.state_dict())
    check_prompt(from_transformers(model), model)


@each_mixture
def test_folders_with_the_names_of_the_classes(kind, tmp_path):
    """As transformers may write them: stacked, under the names of the live model."""
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    check_prompt(load(str(tmp_path), dtype=torch.float32, device="cpu"), model)


def test_old_files_of_llama_cpp_have_a_tensor_for_each_expert():
    tensors = {f"model.layers.0.mlp.up_proj.{number}.weight": torch.full((2, 3), float(number)) for number in range(3)}
    checkpoint = ExpertCheckpoint(TensorCheckpoint(tensors))
    for number in range(3):
        name = f"model.layers.0.mlp.experts.{number}.up_proj.weight"
        assert checkpoint.shapes[name] == (2, 3)
        ((_, values),) = checkpoint.blocks(name)
        assert values.unique().tolist() == [number] and torch.equal(checkpoint.stored(name).values(), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "int4"], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe_some_dense", "qwen2_moe"])
def test_rows_do_not_depend_on_what_is_beside_them(kind, dtype):
    """Every node of a tree has the bits of plain decoding, also where rows share experts."""
    runner = from_transformers(tiny_model(kind).to(torch.bfloat16), dtype=dtype)
    check_row_rule(runner)
    prompt, tree = random_tokens(20), random_tree(24)
    runner.prefill([prompt])
    assert runner.verify({0: tree})[0].logits.std() > 0.1


@pytest.mark.parametrize("up_kind", [Kinds.Q4_0, Kinds.Q5_1, Kinds.Q8_0])
def test_gates_and_ups_keep_their_bits(up_kind, tmp_path):
    """Of one type or of two, and downs have another."""
    runner, exact = file_of(tmp_path, {"ffn_up": up_kind, "ffn_down": Kinds.Q5_0})
    layer, expected = runner.weights.layers[0], exact.weights.layers[0]
    kinds = dict.fromkeys(("q4_0", up_kind.name.lower()))
    assert layer.gate_up.dtype == ", ".join(kinds) and layer.down.dtype == "q5_0"
    assert (
        layer.gate_up.shape == layer.gate_up.unpack().shape and layer.gate_up.nbytes < layer.gate_up.unpack().nbytes / 3
    )
    for name in ("gate_up", "down"):
        assert torch.equal(getattr(layer, name).unpack(), getattr(expected, name).unpack())
    assert layer.router.dtype == torch.float32 and runner.fingerprint == exact.fingerprint
    prompt = random_tokens(20)
    assert (runner.prefill([prompt])[0] - exact.prefill([prompt])[0]).abs().mean() < 0.1
    check_row_rule(runner)


@pytest.mark.parametrize("up_kind", [Kinds.Q4_K, Kinds.Q5_K])
def test_what_llama_cpp_calls_a_mixture_keeps_its_bits(up_kind, tmp_path):
    """Q4_K_M has larger downs and values; other mixtures have larger ups too. Batches and trees are plain decoding."""
    kinds = {"ffn_up": up_kind, "ffn_down": Kinds.Q6_K, "attn_v": Kinds.Q6_K}
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256}
    runner, exact = file_of(tmp_path, kinds, "qwen3_moe", Kinds.Q4_K, **sizes)
    layer, expected = runner.weights.layers[0], exact.weights.layers[0]
    assert (layer.qkv.dtype, layer.down.dtype) == ("q4_k, q6_k", "q6_k")
    assert layer.gate_up.dtype == ", ".join(dict.fromkeys(("q4_k", up_kind.name.lower())))
    for name in ("qkv", "gate_up", "down"):
        assert torch.equal(getattr(layer, name).unpack(), getattr(expected, name).unpack())
    check_row_rule(runner)
    check_batches(runner, 8)


def test_gates_and_ups_of_two_types_are_converted(tmp_path):
    runner, _ = file_of(tmp_path, {"ffn_up": Kinds.Q5_1})
    save_converted(runner, tmp_path / "tiny.pyspec")
    found, prompt = load(str(tmp_path / "tiny.pyspec")), random_tokens(20)
    assert torch.equal(found.prefill([prompt])[0], runner.prefill([prompt])[0])


def test_experts_of_several_types_become_floats(tmp_path):
    """As in the first files of Mixtral, where a tensor is of one expert; a warning says so."""
    with pytest.warns(RuntimeWarning, match="tiny.gguf: model.layers.0.mlp.experts.0.down_proj.weight is one matrix"):
        runner, exact = file_of(tmp_path, {"ffn_down": [Kinds.Q4_0, *[Kinds.Q8_0] * 4]})
    layer, expected = runner.weights.layers[0], exact.weights.layers[0]
    assert layer.down.dtype == torch.bfloat16 and layer.gate_up.dtype == "q4_0"
    torch.testing.assert_close(layer.down.unpack(), expected.down.unpack(), rtol=2**-8, atol=0)


# ==== what does not fit ====


@pytest.fixture
def folder(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path)
    return tmp_path


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        load(str(folder), dtype=torch.float32, device="cpu")
    assert "\n" not in str(error.value)


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize("shape", [(5, 96), (6, 95), (7, 96)])
def test_a_router_of_another_width(folder, shape):
    name = "model.layers.1.mlp.gate.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(shape)}))
    refused(folder, rf"{re.escape(name)} must have shape \(6, 96\), got {re.escape(str(shape))}")


def test_experts_that_are_missing_or_too_many(folder):
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.pop(name.format(3)))
    refused(folder, r"has no tensor model.layers.1.mlp.experts.3.up_proj.weight")
    change_tensors(folder, lambda tensors: tensors.update({name.format(e): torch.zeros(40, 96) for e in (3, 6)}))
    refused(folder, r"has tensor model.layers.1.mlp.experts.6.up_proj.weight, which a model of its architecture does")


def test_an_expert_of_another_size(folder):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(41, 96)}))
    refused(folder, rf"{re.escape(name)} must have shape \(40, 96\), got \(41, 96\)")


def test_more_experts_for_a_token_than_there_are(folder):
    change_config(folder, num_experts_per_tok=7)
    refused(folder, "config.json is corrupt: its num_experts_per_tok must be at most 6, got 7")
    change_config(folder, num_experts_per_tok=0)
    refused(folder, "config.json is corrupt: its num_experts_per_tok must be at least 1, got 0")
    shape = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 8, "layers": 1, "heads": 1, "kv_heads": 1}
    shape |= {"head_dim": 64, "context_length": 9, "norm_epsilon": 1e-5, "rope_base": 1e4}
    with pytest.raises(ValueError, match="experts_per_token must be at most experts, got 3 of 2 experts"):
        MixtureConfig("qwen3_moe", **shape, experts=2, experts_per_token=3)


def test_more_experts_than_kernels_have(folder):
    change_config(folder, num_local_experts=1025)
    with pytest.raises(ValueError, match="1025 experts, our kernels have at most 1024"):
        load(str(folder), dtype=torch.int8, device="cpu")


def test_files_of_other_families_with_experts(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("qwen3"), **{"expert_count": 8})
    with pytest.raises(ValueError, match="is a mixture of experts, which is not supported"):
        load(str(tmp_path / "tiny.gguf"), dtype=torch.float32, device="cpu")
