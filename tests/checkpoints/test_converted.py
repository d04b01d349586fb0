"""Converted models: the same runner out of a file that is used in place."""

import dataclasses
import json

import pytest
import torch

from pyspec import from_transformers
from pyspec.checkpoints import converted, load
from pyspec.checkpoints.converted import load_converted, save_converted
from pyspec.cli import main
from pyspec.ops.linear import LinearWeight
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.random_models import FAMILIES, random_model
from tests.helpers.tiny_models import tiny_model

TOKENS = [[5, 9, 2, 7]]


def logits(runner):
    return runner.prefill(TOKENS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "int4"], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_converted_model_is_the_same(family, dtype, tmp_path):
    runner = random_model(family, dtype=torch.bfloat16 if dtype == "int4" else dtype)
    save_converted(runner, tmp_path / "a.pyspec")
    assert [file.name for file in tmp_path.iterdir()] == ["a.pyspec"]
    found = load_converted(tmp_path / "a.pyspec")
    assert type(found) is type(runner) and found.config == runner.config and found.weight_dtype == runner.weight_dtype
    assert found.fingerprint == runner.fingerprint and found.eos_tokens == runner.eos_tokens
    assert torch.equal(torch.stack(list(logits(found))), torch.stack(list(logits(runner))))


@pytest.mark.parametrize("kind", ["stablelm", "gpt_oss", "gemma4", "gemma4_with_experts", "llama4"])
def test_weights_outside_of_layers_and_of_all_kinds_of_layers_are_kept(kind, tmp_path):
    runner = from_transformers(tiny_model(kind))
    save_converted(runner, tmp_path / "a.pyspec")
    found = load_converted(tmp_path / "a.pyspec")
    assert found.config == runner.config
    assert torch.equal(logits(found)[0], logits(runner)[0])


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama_tied_with_biases").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_weights_are_used_where_the_file_has_them(folder, tmp_path):
    path = tmp_path / "a.pyspec"
    save_converted(load(folder, device="cpu"), path)
    weights = load(path).weights
    assert weights.embedding is weights.head
    matrices = [getattr(owner, name) for owner, name in weights.in_order()]
    assert all(isinstance(matrix, LinearWeight) and matrix.data.data_ptr() % 64 == 0 for matrix in matrices)
    assert len({matrix.data.untyped_storage().data_ptr() // 2**20 for matrix in matrices}) <= 2  # one mapped file
    assert path.stat().st_size < 1.2 * sum(matrix.nbytes for matrix in matrices) + 2**16


def test_other_files_are_refused_in_one_sentence(folder, tmp_path, monkeypatch):
    path = tmp_path / "a.pyspec"
    save_converted(load(folder, device="cpu"), path)
    data = path.read_bytes()
    for options in ({"dtype": torch.int8}, {"device": "meta"}):
        with pytest.raises(ValueError, match="a.pyspec is converted: it has its dtype"):
            load(path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(converted, "LINEAR", 99)
        with pytest.raises(ValueError, match=r"another version of pyspec, .*: run pyspec convert on the original"):
            load(path)
    for size in (3, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="a.pyspec is truncated or corrupt"):
            load(path)
    path.write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="a.pyspec is no converted model"):
        load(path)
    for old, new in (
        (b'\\"hidden_size\\": 96', b'\\"hidden_size\\": 64'),
        (b'\\"llama.LlamaConfig\\"', b'\\"llama.LlamaWeight\\"'),
        (b'\\"outputs\\": ', b'\\"inputs \\": '),
    ):
        assert old in data and len(old) == len(new)
        path.write_bytes(data.replace(old, new, 1))
        with pytest.raises(ValueError, match="a.pyspec is corrupt"):
            load(path)


def test_a_runner_without_our_kernels_is_refused(tmp_path):
    with pytest.raises(ValueError, match="our kernels run on a CPU can be converted, got a FakeRunner"):
        save_converted(FakeRunner(), tmp_path / "a.pyspec")


def test_configurations_keep_their_types():
    @dataclasses.dataclass(frozen=True)
    class Other:
        part: object

    with pytest.raises(TypeError, match="cannot hold"):
        converted._plain(Other({1: 2}))
    config = random_model("gemma3").config
    assert converted._config(json.loads(json.dumps(converted._plain(config)))) == config


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "demo.pyspec"
    assert main(["convert", "demo", str(tmp_path / "demo.bin")]) == 2
    assert main(["convert", "demo", str(tmp_path / "none" / "demo.pyspec")]) == 2
    assert main(["convert", "demo", str(path), "--dtype", "int4"]) == 0
    assert "wrote" in capsys.readouterr().err and load(path).weight_dtype == "int4_32"
    assert main(["convert", "demo", str(path)]) == 0
    capsys.readouterr()
    texts = []
    for model in ("demo", str(path)):
        arguments = ["--model", model, "--max-new-tokens", "6", "--drafter", "none", "--json"]
        assert main(["generate", "What is a tree?", *arguments]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
