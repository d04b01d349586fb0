"""GGUF files whose matrices keep the bits that they have in the file."""

import gguf
import pytest
import torch

from pyspec import load
from pyspec.checkpoints.gguf import GGUFFile
from tests.helpers import runner_checks
from tests.helpers.random_llama import random_tokens
from tests.helpers.tiny_models import tiny_model, write_gguf

KIND = gguf.GGMLQuantizationType
MIXED = {
    "token_embd.weight": KIND.Q4_1,
    "output.weight": KIND.Q5_0,
    "blk.0.attn_q.weight": KIND.Q4_0,
    "blk.0.attn_k.weight": KIND.Q4_0,
    "blk.0.attn_v.weight": KIND.Q8_0,
    "blk.0.ffn_up.weight": KIND.F32,
    "blk.1.ffn_up.weight": KIND.Q5_1,
}


def mixed(name: str) -> KIND:
    return MIXED.get(name, KIND.Q8_0 if "down" in name else KIND.Q5_1)


@pytest.fixture(scope="module", params=["llama", "qwen2", "llama_tied_with_biases"])
def path(request, tmp_path_factory):
    """A file of several types, in joined matrices too; llama's queries and keys are in another order there."""
    path = tmp_path_factory.mktemp(request.param) / "tiny.gguf"
    write_gguf(path, tiny_model(request.param), mixed)
    return path


@pytest.fixture(scope="module")
def runner(path):
    return load(str(path), device="cpu")


def test_what_a_matrix_is_kept_in(runner):
    layers, weights = runner.weights.layers, runner.weights
    assert layers[0].qkv.dtype == "q4_0, q8_0" and layers[1].qkv.dtype == "q5_1"
    assert layers[0].gate_up.dtype == torch.bfloat16  # q5_1 above float32
    assert layers[1].gate_up.dtype == layers[0].output.dtype == "q5_1" and layers[0].down.dtype == torch.int8
    tied = runner.config.tied_embedding
    assert weights.embedding.dtype == "q4_1" and weights.head.dtype == ("q4_1" if tied else "q5_0")
    assert (weights.embedding is weights.head) == tied
    assert runner.dtype == torch.bfloat16
    assert runner.weight_dtype.startswith(
        "q4_0, q8_0, q5_1, torch.bfloat16, torch.int8"
    )  # what was measured is of these


def test_no_value_changes(path, runner):
    exact = load(str(path), dtype=torch.float32, device="cpu")
    assert runner.fingerprint == exact.fingerprint
    found, expected = (model.weights.named(model.config) for model in (runner, exact))
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        is_float = name.startswith("model.layers.0.mlp") and "down" not in name
        assert torch.equal(found[name], values.bfloat16() if is_float else values), name


def test_logits_are_those_of_the_values(path, runner):
    exact = load(str(path), dtype=torch.float32, device="cpu")
    prompt = random_tokens(20)
    found, expected = runner.prefill([prompt])[0], exact.prefill([prompt])[0]
    assert (found - expected).std() < 0.06 * expected.std()  # x has 8 bits, activations have bfloat16's


def test_the_row_rule_holds_through_the_model(runner):
    runner_checks.check_row_rule(runner)


def test_drafts_change_no_text(runner):
    runner_checks.check_batches(runner, 8)


def test_a_file_of_floats_is_not_quantised(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    assert not GGUFFile(tmp_path / "tiny.gguf").is_quantised
    assert load(str(tmp_path / "tiny.gguf"), device="cpu").weight_dtype in (torch.bfloat16, torch.float32)


def test_a_factor_that_is_not_finite_is_named(tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model("llama"), KIND.Q4_0)
    info = GGUFFile(path)._tensors["blk.0.ffn_down.weight"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = b"\x00\x7e"
    path.write_bytes(data)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ValueError, match="tiny.gguf: tensor .* has values that are NaN or infinite"):
            load(str(path), dtype=dtype, device="cpu")


def test_int4(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama"))
    runner = load(str(tmp_path / "tiny.gguf"), dtype="int4", device="cpu")
    assert runner.weight_dtype == runner.weights.layers[0].qkv.dtype == "int4_32" and runner.dtype == torch.bfloat16
    runner_checks.check_row_rule(runner)
    with pytest.raises(ValueError, match='dtype must be float32, float16, bfloat16, int8 or "int4", got int3'):
        load(str(tmp_path / "tiny.gguf"), dtype="int3", device="cpu")
