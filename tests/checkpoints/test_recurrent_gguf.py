"""GGUF files of models with recurrent layers say what the folders say that they were made from."""

import gguf
import pytest
import torch

from pyspec import generate, load
from pyspec.checkpoints.gguf import GGUFFile, read_gguf_config
from tests.helpers.random_llama import random_tokens
from tests.helpers.recurrent_gguf import write_recurrent_gguf
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_hybrids import tiny_hybrid
from tests.helpers.tiny_mambas import KINDS as MAMBAS
from tests.helpers.tiny_mambas import tiny_mamba

pytest.importorskip("transformers")

KIND = gguf.GGMLQuantizationType
HYBRIDS = ("qwen3_5", "qwen3_5_tied_with_biases", "qwen3_5_moe", "qwen3_next")
# a super-block of 256 columns has two heads of values, which are no neighbours in the file
WIDE = {
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "linear_value_head_dim": 128,
    "linear_key_head_dim": 32,
}
WIDE |= {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}


def tiny(kind, **changed):
    if kind in MAMBAS:
        return tiny_mamba(kind)
    if kind == "qwen3_next":
        changed["mlp_only_layers"] = []  # llama.cpp knows layers with experts alone
    return tiny_hybrid(kind, **changed)


def load_cpu(path, dtype=torch.float32):
    return load(str(path), dtype=dtype, device="cpu")


def metadata_of(model):
    kinds = getattr(model.config, "layer_types", ())
    return {"attention.recurrent_layers": [kind != "full_attention" for kind in kinds]} if len(kinds) == 3 else {}


@pytest.mark.parametrize("kind", [*HYBRIDS, *MAMBAS])
def test_values_are_those_of_the_model(kind, tmp_path):
    model = tiny(kind)
    write_recurrent_gguf(tmp_path / "tiny.gguf", model, **metadata_of(model))
    runner = load_cpu(tmp_path / "tiny.gguf")
    check_last(runner, model)
    prompt = random_tokens(20)
    plain = generate(runner, prompt, drafter=None, max_new_tokens=30).tokens
    assert generate(runner, prompt, budget=8, max_new_tokens=30).tokens == plain


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe", "qwen3_next"])
@pytest.mark.parametrize("bits", [KIND.Q8_0, KIND.Q4_0, KIND.Q4_K], ids=lambda kind: kind.name)
def test_bits_of_the_file_are_kept(kind, bits, tmp_path):
    """In the bits of the file and as floats, all weights are the same."""
    model = tiny(kind, **WIDE)
    write_recurrent_gguf(tmp_path / "tiny.gguf", model, bits)
    runner, floats = load_cpu(tmp_path / "tiny.gguf", None), load_cpu(tmp_path / "tiny.gguf", torch.float32)
    kept = {getattr(owner, name).dtype for owner, name in runner.weights.in_order()}
    assert {str(dtype).removeprefix("torch.") for dtype in kept} <= {bits.name.lower(), "int8", "float32"}
    found, expected = (each.weights.named(each.config) for each in (runner, floats))
    for name, values in expected.items():
        torch.testing.assert_close(found[name].float(), values, rtol=0, atol=0, msg=name)
    prompt = random_tokens(20)
    text = generate(runner, prompt, drafter=None, max_new_tokens=20).tokens
    assert generate(runner, prompt, budget=8, max_new_tokens=20).tokens == text


def test_older_files_of_qwen3_next_have_one_matrix(tmp_path, monkeypatch):
    from tests.helpers import recurrent_gguf

    model, converted = tiny("qwen3_next"), recurrent_gguf._converted

    def as_one(name, values, config):
        if "in_proj_qkvz" in name:
            yield f"blk.{name.split('.')[2]}.ssm_in.weight", values
        else:
            yield from converted(name, values, config)

    monkeypatch.setattr(recurrent_gguf, "_converted", as_one)
    write_recurrent_gguf(tmp_path / "tiny.gguf", model)
    assert any(name.endswith("ssm_in.weight") for name in GGUFFile(tmp_path / "tiny.gguf").shapes)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


def test_a_gate_may_have_lost_its_dimension(tmp_path, monkeypatch):
    """llama.cpp's own tools write [1, hidden] as [hidden]."""
    from tests.helpers import recurrent_gguf

    model, converted = tiny("qwen3_5_moe"), recurrent_gguf._converted

    def without(name, values, config):
        for own, part in converted(name, values, config):
            yield own, part[0] if "shared_expert_gate" in own else part

    monkeypatch.setattr(recurrent_gguf, "_converted", without)
    write_recurrent_gguf(tmp_path / "tiny.gguf", model)
    check_last(load_cpu(tmp_path / "tiny.gguf"), model)


@pytest.mark.parametrize(
    "kind, changed, message",
    [
        ("qwen3_5", {"ssm.group_count": 3}, "value heads must be a multiple of key heads, got 4 and 3"),
        ("qwen3_5", {"ssm.state_size": 24}, "key heads in multiples of 16, got 32 and 24"),
        ("mamba2", {"ssm.time_step_rank": 7}, "must be heads that share 96 channels, got 7"),
    ],
)
def test_what_does_not_fit_is_named(kind, changed, message, tmp_path):
    write_recurrent_gguf(tmp_path / "tiny.gguf", tiny(kind), **changed)
    with pytest.raises(ValueError, match=message):
        read_gguf_config(GGUFFile(tmp_path / "tiny.gguf"))
