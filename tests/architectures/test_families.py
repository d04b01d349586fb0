"""A family of models is one file: what it registers is loaded and listed, and nobody else names it."""

import importlib
import importlib.util
import json
import sys

import gguf
import pytest
import torch
from safetensors.torch import save_file

from pyspec import from_transformers, load
from pyspec.architectures import FAMILIES, family_of
from pyspec.cli import main
from pyspec.runners.foreign_support import refuse
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens
from tests.helpers.site import DOCS, load_extension
from tests.helpers.tiny_mambas import tiny_mamba
from tests.helpers.tiny_models import tiny_model

PROMPT = random_tokens(20)
TOY = {"architectures": ["ToyForCausalLM"], "tokens": VOCABULARY, "width": 96}


@pytest.fixture
def toy(monkeypatch):
    """The toy family, registered until the test ends."""
    list(FAMILIES)
    monkeypatch.setattr(FAMILIES, "_members", dict(FAMILIES._members))
    monkeypatch.delitem(sys.modules, "tests.helpers.toy_family", raising=False)
    return importlib.import_module("tests.helpers.toy_family")


def toy_tensors(toy) -> dict[str, torch.Tensor]:
    """Those of random_llama, as toys have them."""
    runner = random_llama()
    names = {"model.embed_tokens.weight": toy.ToyWeights.EMBEDDING, "model.norm.weight": toy.ToyWeights.NORM}
    tensors = runner.weights.named(runner.config)
    return {
        names.get(name, name.replace("model.layers.", "toy.blocks.")): values.contiguous()
        for name, values in tensors.items()
    }


def write_folder(folder, toy, **entries):
    save_file(toy_tensors(toy), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TOY | entries))
    return str(folder)


def write_gguf(path, toy):
    ours = {name: stem for stem, name in toy.TENSORS.items()}
    writer = gguf.GGUFWriter(path, "toy")
    for key, number in (("tokens", VOCABULARY), ("width", 96), ("blocks", 2)):
        writer.add_uint32(f"toy.{key}", number)
    writer.add_bool("toy.has_wheels", False)
    for name, values in toy_tensors(toy).items():
        stem, _, kind = name.removeprefix("toy.blocks.").rpartition(".")
        layer, _, part = stem.partition(".") if name.startswith("toy.blocks.") else ("", "", stem)
        writer.add_tensor(f"{f'blk.{layer}.' if layer else ''}{ours[part]}.{kind}", values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_new_family_loads_and_runs(toy, tmp_path):
    expected = random_llama().prefill([PROMPT])[0]
    for source in (write_folder(tmp_path, toy), write_gguf(tmp_path / "toy.gguf", toy)):
        runner = load(source, dtype=torch.float32, device="cpu")
        assert isinstance(runner, toy.ToyRunner) and runner.fingerprint.startswith("toy-")
        assert torch.equal(runner.prefill([PROMPT])[0], expected)


def test_a_new_family_is_found_by_its_type(toy, tmp_path):
    source = write_folder(tmp_path, toy, architectures=None, model_type="toy")
    assert isinstance(load(source, device="cpu"), toy.ToyRunner)


def test_what_a_new_family_lacks_is_named(toy, tmp_path, monkeypatch):
    source = write_folder(tmp_path, toy, has_wheels=True)
    with pytest.raises(ValueError, match="dtype int8 needs a model of .* or Toy .*family: .* has wheels, ToyRunner has none"):
        load(source, dtype=torch.int8, device="cpu")
    monkeypatch.setattr("pyspec.runners.flash_attn.check_prompt_attention", lambda *arguments: None)
    source = write_folder(tmp_path, toy)
    with pytest.raises(ValueError, match="flash-attn needs a model of the .* or Llama or .* family, got toy"):
        load(source, device="cpu", prompt_attention="flash-attn")


def test_a_new_family_is_listed(toy, capsys, monkeypatch):
    monkeypatch.setattr("pyspec.cli.info._rates", dict)
    monkeypatch.setattr("pyspec.cli.info._costs", lambda arguments: {})
    monkeypatch.setattr("pyspec.cli.info._show_measured", lambda *found: None)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["families"]["toy"] == "Toy, of the tests"
    assert main(["info"]) == 0
    assert "Toy, of the tests" in capsys.readouterr().out
    page = load_extension("registries").filled((DOCS / "loading.md").read_text())
    assert "| toy | Toy, of the tests |" in page and "| llama | Llama 2" in page
    with pytest.raises(ValueError, match="supported are .*LlamaForCausalLM.*, ToyForCausalLM"):
        refuse(object, "it is no model")


@pytest.mark.parametrize("model", [lambda: tiny_model("qwen2"), lambda: tiny_mamba("mamba2")], ids=["llama", "mamba2"])
def test_the_runner_is_that_of_the_family(model):
    pytest.importorskip("transformers")
    model = model()
    family = family_of(type(model).__name__)
    runner = from_transformers(model)
    assert type(runner) is family.runner and type(runner.weights) is family.weights
    assert runner.config.architecture in type(model).__name__.lower()


def test_every_architecture_has_one_family():
    names = [name for family in FAMILIES.values() for name in family.architectures]
    names += [name for family in FAMILIES.values() if family.gguf for name in family.gguf.architectures]
    assert len(names) == len(set(names))
