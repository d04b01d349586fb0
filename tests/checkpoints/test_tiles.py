"""Files whose matrices keep their bits on a GPU: as its kernels read them, here in the CPU's memory."""

import sys
from functools import partial
from types import SimpleNamespace

import gguf
import pytest
import torch

from pyspec import load
from pyspec.checkpoints import memory
from pyspec.checkpoints.load import _default_dtype
from pyspec.checkpoints.matrix_plan import plan_matrices
from pyspec.ops import linear_codes_tiles
from pyspec.ops.lay_out import StoredMatrix
from tests.helpers.quantised_folders import SHAPE, gptq, write_folder
from tests.helpers.random_llama import random_llama
from tests.helpers.tiny_models import tiny_model, write_gguf

KIND = gguf.GGMLQuantizationType
ROWS = torch.tensor([5, 0])
MIXED = {
    "token_embd.weight": KIND.Q4_1,
    "output.weight": KIND.Q5_0,
    "blk.0.attn_q.weight": KIND.Q4_0,
    "blk.0.attn_k.weight": KIND.Q4_0,
    "blk.0.attn_v.weight": KIND.Q8_0,
    "blk.0.ffn_up.weight": KIND.F32,
    "blk.1.ffn_up.weight": KIND.Q5_1,
    "blk.1.attn_output.weight": KIND.IQ4_NL,
}


def mixed(name: str) -> KIND:
    return MIXED.get(name, KIND.Q8_0 if "down" in name else KIND.Q5_1)


@pytest.fixture
def load_in_tiles(monkeypatch):
    def load_so(path, **options):
        with monkeypatch.context() as patch:
            patch.setattr(linear_codes_tiles, "in_tiles", lambda device: True)
            patch.setattr(sys.modules[StoredMatrix.__module__], "AT_ONCE", 1)  # as many parts as can be
            patch.setattr(StoredMatrix, "columns", lambda self, step: self.values()[:, ::step])
            runner = load(path, device="cpu", **options)
            values = {name: place.clone() for name, place in runner.weights.named(runner.config).items()}
            rows = runner.embed(ROWS)
        return SimpleNamespace(runner=runner, values=values, rows=rows)

    return load_so


def check_values(found, exact, is_float=lambda name: False):
    expected = exact.weights.named(exact.config)
    assert found.values.keys() == expected.keys() and found.runner.fingerprint == exact.fingerprint
    for name, values in expected.items():
        values = values.bfloat16() if is_float(name) else values
        assert torch.equal(found.values[name].float(), values.float()), name
    assert torch.equal(found.rows, exact.embed(ROWS)) and found.rows.is_contiguous()


@pytest.mark.parametrize("kind", ["llama", "llama_tied_with_biases"])
def test_no_value_changes(kind, load_in_tiles, tmp_path, monkeypatch):
    """Of several types, in joined matrices too; and what is announced is what is taken."""
    write_gguf(tmp_path / "tiny.gguf", tiny_model(kind), mixed)
    path, needs = str(tmp_path / "tiny.gguf"), []
    monkeypatch.setattr(memory, "available_memory", lambda device: 10**12)
    with pytest.warns(RuntimeWarning, match="becomes bfloat16"):
        found = load_in_tiles(path, announce=needs.append)
    weights = found.runner.weights
    layers = weights.layers
    assert layers[0].qkv.dtype == "q4_0, q8_0" and layers[1].qkv.dtype == "q5_1" and layers[1].output.dtype == "iq4_nl"
    assert layers[0].gate_up.dtype == torch.bfloat16 and layers[0].down.dtype == torch.int8
    assert weights.embedding.dtype == "q4_1"
    exact = load(path, dtype=torch.float32, device="cpu")
    check_values(found, exact, lambda name: name.startswith("model.layers.0.mlp") and "down" not in name)
    matrices = {id(part): part for part in [getattr(o, n) for o, n in weights.in_order()] + [weights.embedding]}
    vectors = [weights.norm, *(norm for layer in layers for norm in layer.norms.values())]
    biases = [bias for layer in layers for bias in (layer.qkv_bias, layer.output_bias) if bias is not None]
    assert needs[0].weights == sum(part.nbytes for part in (*matrices.values(), *vectors, *biases))
    assert needs[0].kept.startswith("q4_0, q8_0")


def test_experts(load_in_tiles, tmp_path):
    """Gates and ups in two formats, and downs in 8 bits."""
    kinds = {"ffn_gate_exps": KIND.Q4_0, "ffn_up_exps": KIND.Q5_1, "ffn_down_exps": KIND.Q8_0}
    model = tiny_model("qwen3_moe", moe_intermediate_size=64)
    stated = {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 64}
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model, lambda name: kinds.get(name.split(".")[-2], KIND.Q5_0), **stated)
    found = load_in_tiles(str(path))
    layer = found.runner.weights.layers[0]
    assert layer.gate_up.dtype == "q4_0, q5_1" and layer.down.dtype == torch.int8
    check_values(found, load(str(path), dtype=torch.float32, device="cpu"))


def test_columns_in_another_order(load_in_tiles, tmp_path):
    quantise = partial(gptq, group_size=32, desc_act=True)
    write_folder(tmp_path, tiny_model("llama", **SHAPE), lambda _, weight: quantise(weight))
    found = load_in_tiles(tmp_path)
    assert found.runner.weights.layers[0].qkv.dtype == "int4_32"
    assert found.runner.weights.layers[0].qkv.order is not None
    exact = load(tmp_path, dtype=torch.float32, device="cpu")
    check_values(found, exact, lambda name: "lm_head" in name)


@pytest.mark.parametrize("dtype", [torch.int8, "int4"], ids=str)
def test_floats_are_rounded_as_on_a_cpu(dtype, load_in_tiles, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    found, expected = load_in_tiles(tmp_path, dtype=dtype), load(tmp_path, dtype=dtype, device="cpu")
    check_values(found, expected)


def test_what_is_planned_for_a_gpu():
    """Before it is asked for memory: tiles have whole panels of 64 or 128 outputs."""
    runner = random_llama()
    config, weights = runner.config, type(runner.weights)
    blank = weights.empty(config, torch.float32, torch.device("meta"), torch.device("meta"))
    checkpoint = SimpleNamespace(stored=lambda name: None)
    sizes = {}
    for device in ("cpu", "cuda"):
        plans = plan_matrices(blank, config, checkpoint, "int4", keeps_bits=False, device=torch.device(device))
        sizes[device] = {plan.name: plan.nbytes for plan in plans.values()}
    rows, inputs = blank.layers[0].qkv.shape
    assert sizes["cuda"]["qkv"] == -(-rows // 128) * -(-inputs // 128) * 128 * (8 + 4 + 64)
    assert sizes["cpu"]["qkv"] == -(-rows // 32) * -(-inputs // 32) * 32 * (2 + 1 + 16)


def test_gpus_without_bfloat16_get_floats(monkeypatch):
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert _default_dtype(torch.device("cuda")) == dtype


@pytest.mark.parametrize("first, count", [(0, 128), (64, 40), (100, 200), (37, 1)])
@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q8_0", "int4_64", "q4_1"])
def test_any_outputs_are_written(kind, first, count):
    """And none beside them."""
    from pyspec.ops.weight_formats import FORMATS, quantise
    from tests.helpers.weight_formats import random_codes

    format, inputs, outputs = FORMATS[kind], 512, 320

    def draw(rows, seed):
        if kind.startswith("int4"):
            return quantise(torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)), format)
        return random_codes(kind, rows, inputs, seed)

    before, new = draw(outputs, 1), draw(count, 2)
    data = linear_codes_tiles.lay_out_tiles(before)
    assert data.shape == linear_codes_tiles.tiles_shape(format, outputs, inputs)
    linear_codes_tiles.write_tiles(data, first, new)
    expected = before.values()
    expected[first : first + count] = new.values()
    found = linear_codes_tiles.read_tiles(data, format, inputs, torch.arange(outputs)).values()
    assert torch.equal(found, expected)
