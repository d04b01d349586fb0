"""Which files of a folder are the model, and what is said where that is not clear."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import load
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_models import tiny_model

MODEL = tiny_model("llama")
OTHER = {name: tensor + 1 for name, tensor in MODEL.state_dict().items()}


def load_cpu(folder):
    return load(str(folder), dtype=torch.float32, device="cpu")


@pytest.fixture
def whole(tmp_path):
    MODEL.save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    MODEL.save_pretrained(tmp_path, max_shard_size="100KB")
    return tmp_path


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


def change_index(folder, changed, name="model.safetensors.index.json"):
    index = json.loads((folder / name).read_text())
    changed(index["weight_map"])
    (folder / name).write_text(json.dumps(index))


STRAY = [
    "adapter_model.safetensors",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "optimizer.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "consolidated-00001-of-00001.safetensors",
]


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize("kind", ["whole", "sharded", "without index", "pickle"])
def test_what_lies_beside_the_model_is_not_read(kind, stray, tmp_path):
    MODEL.save_pretrained(tmp_path, max_shard_size="5GB" if kind in ("whole", "pickle") else "100KB")
    if kind == "without index":
        (tmp_path / "model.safetensors.index.json").unlink()
    if kind == "pickle":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    save_file(OTHER, tmp_path / stray)
    (tmp_path / "training_args.bin").write_bytes(b"x")
    check_last(load_cpu(tmp_path), MODEL)


def test_the_plain_name_wins_over_an_index(whole):
    """As in transformers."""
    (whole / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    check_last(load_cpu(whole), MODEL)


@pytest.mark.parametrize("name", ["consolidated.safetensors", "model.fp16.safetensors", "weights.safetensors"])
def test_the_only_file_is_the_model(name, whole):
    (whole / "model.safetensors").rename(whole / name)
    check_last(load_cpu(whole), MODEL)
    save_file(OTHER, whole / "adapter_model.safetensors")  # which is never a model
    check_last(load_cpu(whole), MODEL)
    save_file(OTHER, whole / "a.safetensors")
    with pytest.raises(
        ValueError, match="has a.safetensors, adapter.*, and neither model.safetensors nor an index says"
    ):
        load_cpu(whole)


def test_the_index_says_in_which_file_a_tensor_is(sharded):
    first, second = [file for file in shards(sharded) if len(load_file(file)) > 1][:2]
    name = next(iter(load_file(first)))
    save_file(load_file(second) | {name: OTHER[name]}, second)
    check_last(load_cpu(sharded), MODEL)
    change_index(sharded, lambda places: places.pop(name))
    with pytest.raises(ValueError, match=f"has tensor {name}, which another file has too"):
        load_cpu(sharded)


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda places: places.update(x="gone.safetensors"), "index.json names gone.safetensors, which is missing"),
        (
            lambda places: places.update(x="../secret.safetensors"),
            "names '../secret.safetensors', which is no file beside it",
        ),
        (lambda places: places.update(x="/etc/passwd"), "names '/etc/passwd', which is no file beside it"),
        (lambda places: places.update(x=next(iter(places.values()))), "has no tensor x, which the index names"),
        (lambda places: places.update(x=3), "weight_map must name the file of each tensor"),
        (lambda places: places.clear(), "weight_map must name the file of each tensor"),
    ],
)
def test_an_index_that_is_wrong_is_named(changed, message, sharded):
    change_index(sharded, changed)
    with pytest.raises(ValueError, match=message):
        load_cpu(sharded)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": null}', "\xff", ""])
def test_an_index_that_is_none_is_named(text, sharded):
    (sharded / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
        load_cpu(sharded)


def test_a_shard_that_is_missing_is_named(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    second = shards(sharded)[1]
    second.unlink()
    with pytest.raises(ValueError, match=f"has no {second.name}, one of"):
        load_cpu(sharded)


def test_pickles_are_read_whole_and_in_shards(whole):
    tensors = load_file(whole / "model.safetensors")
    (whole / "model.safetensors").unlink()
    names = sorted(tensors)
    for new_format in (True, False):
        torch.save(tensors, whole / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
        check_last(load_cpu(whole), MODEL)
    (whole / "pytorch_model.bin").unlink()
    places = {name: f"pytorch_model-0000{1 + index % 2}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: tensors[name] for name in names if places[name] == file}, whole / file)
    (whole / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    check_last(load_cpu(whole), MODEL)
    (whole / file).unlink()
    with pytest.raises(ValueError, match=f"names {file}, which is missing"):
        load_cpu(whole)
    (whole / file).write_bytes(b"broken")
    with pytest.raises(ValueError, match=f"{file} is truncated or corrupt"):
        load_cpu(whole)
    torch.save([1, 2], whole / file)
    with pytest.raises(ValueError, match=f"{file} must hold tensors by their names, got list"):
        load_cpu(whole)


def test_an_adapter_says_what_it_needs(tmp_path, whole):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(OTHER, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(
        FileNotFoundError, match="no config.json but an adapter .*merge it into its base model org/base"
    ):
        load_cpu(folder)
    (folder / "config.json").write_text((whole / "config.json").read_text())
    with pytest.raises(
        ValueError, match="holds an adapter .* alone, adapter_model.safetensors: merge it into its base"
    ):
        load_cpu(folder)


def test_a_single_file_names_its_folder(whole):
    with pytest.raises(ValueError, match="must be a .gguf file or a folder, got the file .*; name its folder"):
        load_cpu(whole / "model.safetensors")


def test_more_layers_than_there_are_tensors_are_named_at_once(whole):
    description = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(json.dumps(description | {"num_hidden_layers": 2**20, "layer_types": None}))
    with pytest.raises(ValueError, match=r"has no tensor model.layers.1048575.\*, for 1048576 layers"):
        load_cpu(whole)
    (whole / "config.json").write_text(json.dumps(description | {"hidden_size": 2**24, "intermediate_size": 2**24}))
    with pytest.raises(ValueError, match="must have shape|larger than any memory"):
        load_cpu(whole)


def test_a_layer_that_guesses_further_tokens_is_left_in_the_file(whole):
    plain, tensors = load_cpu(whole), load_file(whole / "model.safetensors")
    save_file(tensors | {"mtp.fc.weight": torch.ones(4, 8)}, whole / "model.safetensors", {"format": "pt"})
    found = load_cpu(whole)
    assert torch.equal(found.prefill([[1, 2, 3]])[0], plain.prefill([[1, 2, 3]])[0])
    assert plain.weights.mtp is None and found.weights.mtp is not None


@pytest.mark.parametrize("stated", ["2", [1, "2"], 2.5, {"a": 1}, True])
def test_an_end_that_is_no_token_is_named(stated, whole):
    (whole / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    with pytest.raises(ValueError, match="generation_config.json is corrupt: its eos_token_id must be"):
        load_cpu(whole)
    (whole / "generation_config.json").write_text('{"eos_token_id": -1}')
    assert load_cpu(whole).eos_tokens == {3}


def test_json_may_begin_with_a_byte_order_mark(whole):
    (whole / "config.json").write_bytes(b"\xef\xbb\xbf" + (whole / "config.json").read_bytes())
    check_last(load_cpu(whole), MODEL)
    (whole / "config.json").write_text("[" * 10**5)
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_cpu(whole)
