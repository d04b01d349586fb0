"""What files have that people made: what is beside a model's weights, names that differ, and one thing said twice."""

import json
from functools import partial

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import load
from tests.helpers.quantised_folders import SHAPE, awq, compressed_tensors, fp8, gptq, write_folder
from tests.helpers.random_llama import random_tokens
from tests.helpers.runner_checks import check_last, check_row_rule
from tests.helpers.tiny_models import IN_GGUF, split_experts, tiny_model, write_gguf

KIND = gguf.GGMLQuantizationType


def load_cpu(path, dtype=torch.float32):
    return load(str(path), dtype=dtype, device="cpu")


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def change_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))


# ==== GGUF ====


@pytest.fixture
def more(monkeypatch):
    """Tensors and metadata that the next file has too."""
    tensors, metadata, close = {}, {}, gguf.GGUFWriter.write_header_to_file

    def write(writer, *args):
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        for key, value in metadata.items():
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        close(writer, *args)

    monkeypatch.setattr(gguf.GGUFWriter, "write_header_to_file", write)
    return tensors, metadata


def test_what_is_beside_the_weights_of_a_text_model_is_not_read(more, tmp_path):
    """Frequencies of old converters, an image encoder in files of Ollama, and what the quantiser says of itself."""
    tensors, metadata = more
    tensors |= {f"blk.{layer}.attn_rot_embd.weight": np.ones(32, np.float32) for layer in range(2)}
    tensors |= {
        name: np.ones((4, 4), np.float32) for name in ("v.blk.0.attn_q.weight", "mm.0.weight", "a.conv1.weight")
    }
    metadata |= {"quantize.imatrix.file": "imatrix.dat", "quantize.imatrix.entries_count": 14, "general.file_type": 15}
    model = tiny_model("llama")
    write_gguf(tmp_path / "tiny.gguf", model)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


@pytest.mark.parametrize("kind", ["llama_tied_with_biases", "gemma3", "qwen3"])
def test_an_output_of_its_own_wins_over_the_tie(kind, more, tmp_path):
    changed, metadata = IN_GGUF.get(kind, ({}, {}))
    model = tiny_model(kind, **changed, tie_word_embeddings=True)
    head = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    more[0]["output.weight"] = head.numpy()
    write_gguf(tmp_path / "tiny.gguf", model, **metadata)
    model.lm_head.weight = torch.nn.Parameter(head)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


def test_types_of_rows_that_are_no_whole_blocks(tmp_path):
    """llama.cpp then takes Q5_0, Q8_0 or IQ4_NL where the rest has Q4_K or Q6_K, and leaves vectors in 32 bits."""
    model = tiny_model("qwen2", hidden_size=256, intermediate_size=352, num_attention_heads=4)

    def kind_of(name):
        return KIND.IQ4_NL if "blk.0.ffn_down" in name else KIND.Q5_0 if "ffn_down" in name else KIND.Q4_K

    write_gguf(tmp_path / "tiny.gguf", model, kind_of)
    runner, exact = load_cpu(tmp_path / "tiny.gguf", None), load_cpu(tmp_path / "tiny.gguf")
    assert [layer.down.dtype for layer in runner.weights.layers] == ["iq4_nl", "q5_0"]
    found, expected = (each.weights.named(each.config) for each in (runner, exact))
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    check_row_rule(runner)


def test_vectors_and_embeddings_in_16_bits(tmp_path):
    """Some converters write all tensors in one type."""
    model = tiny_model("llama")
    with torch.no_grad():
        for values in model.state_dict().values():
            values.copy_(values.bfloat16())
    write_gguf(tmp_path / "tiny.gguf", model, KIND.BF16)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


# ==== folders: names ====

NAMES = {
    "without its head's class": lambda name: name.removeprefix("model."),
    "a text model among others": lambda name: f"language_model.{name}",
    "the same in transformers 5": lambda name: (
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
    ),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_names_of_tensors(kind, tied, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: {NAMES[kind](name): tensor for name, tensor in tensors.items()})
    check_last(load_cpu(tmp_path), model)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_a_model_that_was_saved_without_its_head(kind, tmp_path):
    """Such as embedders, whose head is the embedding."""
    model = tiny_model(kind, tie_word_embeddings=True)
    base = getattr(model, model.base_model_prefix)
    base.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(base).__name__]
    check_last(load_cpu(tmp_path), model)


def test_without_a_head_or_a_tie_the_head_is_missed(tmp_path):
    tiny_model("llama", tie_word_embeddings=False).model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tensor lm_head.weight"):
        load_cpu(tmp_path)


def test_tied_weights_may_be_saved_twice(tmp_path):
    model = tiny_model("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors | {"lm_head.weight": model.lm_head.weight.detach().clone()})
    runner = load_cpu(tmp_path)
    assert runner.config.tied_embedding and runner.weights.head is runner.weights.embedding
    check_last(runner, model)


def test_what_old_folders_have_beside_their_weights(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(32)})
    check_last(load_cpu(tmp_path), model)


# ==== quantised folders ====


def check_values(folder, model):
    named = (runner := load_cpu(folder)).weights.named(runner.config)
    for name, values in model.state_dict().items():
        if "proj" in name or "lm_head" in name:
            assert torch.equal(named[name], values), name


@pytest.mark.parametrize("method", [gptq, awq, compressed_tensors])
def test_heads_may_be_quantised_and_layers_left_out(method, tmp_path):
    """Whatever lists of modules say: the tensors are looked at."""
    model = tiny_model("llama", **SHAPE, vocab_size=128)
    write_folder(tmp_path, model, lambda _, weight: method(weight), leave=("1.mlp.down_proj", "1.self_attn.o_proj"))
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    lists = {"modules_to_not_convert": ["lm_head"], "ignore": ["lm_head"], "lm_head": False}
    change_config(tmp_path, quantization_config=settings | lists)
    check_values(tmp_path, model)
    runner = load_cpu(tmp_path, None)
    assert runner.weights.head.dtype == "int4_128" and runner.weights.layers[1].down.dtype == torch.bfloat16


SCALES = ["k_proj.k_scale", "v_proj.v_scale", "self_attn.k_scale", "self_attn.q_scale", "k_proj.kv_scale"]
SCALES += ["q_proj.input_scale", "q_proj.activation_scale", "q_proj.output_scale"]


@pytest.mark.filterwarnings("ignore:.*it becomes floats:RuntimeWarning")
@pytest.mark.parametrize("method", [compressed_tensors, fp8], ids=lambda method: method.__name__)
def test_scales_of_caches_and_activations_are_not_read(method, tmp_path):
    model = tiny_model("llama", **SHAPE)
    write_folder(tmp_path, model, lambda _, weight: method(weight))
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    change_config(tmp_path, quantization_config=config | {"kv_cache_scheme": {"num_bits": 8, "type": "float"}})
    stem = "model.layers.0.self_attn."
    scales = {stem + name.removeprefix("self_attn."): torch.ones(1) for name in SCALES}
    change_tensors(tmp_path, lambda tensors: tensors | scales)
    check_values(tmp_path, model)


def test_fp8_with_one_scale_for_all(tmp_path):
    """Under either of its names; blocks may be null then, and scales without a dimension."""
    for number, part in enumerate(("weight_scale", "weight_scale_inv")):
        folder, model = tmp_path / str(number), tiny_model("llama", **SHAPE)
        folder.mkdir()

        def quantise(_, weight, part=part):
            scale = torch.tensor(np.abs(weight).max() / 448).bfloat16()
            floats = (torch.from_numpy(weight) / scale.double()).to(torch.float8_e4m3fn)
            settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
            parts = {"weight": floats, part: scale, "input_scale": torch.tensor(0.5)}
            return parts, (floats.double() * scale.double()).numpy(), settings

        write_folder(folder, model, quantise)
        check_values(folder, model)


@pytest.mark.parametrize(
    "method, kind",
    [(gptq, "auto_round:auto_gptq"), (gptq, None), (awq, "auto_round:auto_awq"), (gptq, "gptq:exllamav2")],
)
@pytest.mark.parametrize("name", ["auto-round", "intel/auto-round"])
def test_auto_round_has_the_tensors_of_others(name, method, kind, tmp_path):
    model = tiny_model("llama", **SHAPE)
    write_folder(tmp_path, model, lambda _, weight: method(weight))
    key = "backend" if kind and "exllama" in kind else "packing_format"
    settings = {"quant_method": name, "bits": 4, "group_size": 128, "sym": False} | ({key: kind} if kind else {})
    change_config(tmp_path, quantization_config=settings)
    check_values(tmp_path, model)
    change_config(tmp_path, quantization_config=settings | {"packing_format": "auto_round:llm_compressor"})
    with pytest.raises(ValueError, match="has AutoRound's packing_format auto_round:llm_compressor, supported are"):
        load_cpu(tmp_path)


def test_compressed_tensors_first_name_for_its_settings(tmp_path):
    model = tiny_model("llama", **SHAPE)
    write_folder(tmp_path, model, lambda _, weight: compressed_tensors(weight))
    config = json.loads((tmp_path / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_values(tmp_path, model)
    assert load_cpu(tmp_path, None).weights.layers[0].qkv.dtype == "int4_128"


@pytest.mark.parametrize(
    "method, kept", [(gptq, True), (awq, True), (partial(gptq, group_size=32, desc_act=True), False)]
)
@pytest.mark.parametrize("kind, size", [("qwen3_moe", "moe_intermediate_size"), ("mixtral", "intermediate_size")])
def test_experts_have_tensors_each(kind, size, method, kept, tmp_path, recwarn):
    """Under their published names. Groups in the order of activations differ: floats then, and a warning says so."""
    model, tensors, expected, settings = tiny_model(kind, hidden_size=128, **{size: 256}), {}, {}, {}
    model.save_pretrained(tmp_path)
    for name, values in split_experts(model.state_dict()):
        stem = name.removesuffix(".weight")
        names = [stem.replace(".experts.", f".experts.{number}.") for number in range(len(values))]
        matrices = dict(zip(names, values, strict=True)) if values.dim() == 3 else {stem: values}
        for stem, matrix in matrices.items():
            if not stem.endswith("proj"):
                tensors[name] = matrix.contiguous()
                continue
            parts, rounded, settings = method(matrix.double().numpy())
            tensors |= {f"{stem}.{part}": tensor.contiguous() for part, tensor in parts.items() if part != "bias"}
            expected[f"{stem}.weight"] = torch.from_numpy(rounded).float()
    if kind == "mixtral":
        names = {"mlp.gate": "block_sparse_moe.gate", "mlp.experts": "block_sparse_moe.experts"}
        names |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
        for ours, published in names.items():
            tensors = {name.replace(ours, published): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    change_config(tmp_path, quantization_config=settings)
    runner = load_cpu(tmp_path, None)
    named, layer = runner.weights.named(runner.config), runner.weights.layers[0]
    for name, values in expected.items():
        assert torch.equal(named[name], values if kept or ".experts." not in name else values.bfloat16().float()), name
    assert layer.gate_up.dtype == layer.down.dtype == ("int4_128" if kept else torch.bfloat16)
    assert kept != any("in another order of groups" in str(found.message) for found in recwarn)


def test_null_settings_are_none(tmp_path):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=None)
    check_last(load_cpu(tmp_path), model)
    assert (load_cpu(tmp_path).prefill([random_tokens(9)])[0]).isfinite().all()
