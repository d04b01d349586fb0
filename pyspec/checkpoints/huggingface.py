"""Reads the files of model folders: config.json, safetensors and pytorch_model.bin, whole or in shards."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyspec.architectures import Family, Unsupported, family_of, supported_architectures
from pyspec.checkpoints.safetensors_file import SafetensorsFile
from pyspec.entries import Entries
from pyspec.ops.lay_out import StoredMatrix, stored_floats


def read_json(path: Path) -> dict:
    """A JSON object; ValueError naming the file if it is none. A byte order mark is skipped."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__}")
    return found


def read_description(folder: Path) -> dict:
    """Reads a folder's description of its model: config.json, or the params.json of Codestral-Mamba."""
    for name in ("config.json", "params.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise FileNotFoundError(
            f"{folder} is no model folder: it has no config.json but an adapter (LoRA); merge it into its base model "
            f"{base}, for example by peft's merge_and_unload, and load the result"
        )
    raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")


def read_config(source: Path | str, description: dict) -> tuple[Family, Any]:
    """The family of the model that a config.json, or the like, describes, and its configuration.

    What wins of what is stated twice, and what counts where something is left out, is as in transformers. source is the
    model's name in errors.

    Raises:
        Unsupported: no family has the architecture, or its runner lacks a feature.
        ValueError: an entry is missing, or is no such entry.
    """
    name = f"{source}: {'params.json' if 'dim' in description else 'config.json'}"
    stated = Entries(name, description)
    architecture = _architecture(source, stated)
    family = family_of(architecture)
    if family is None:
        raise Unsupported(f"{source} has architecture {architecture}, which our kernels do not run")
    if isinstance(text := stated.get("text_config"), dict):  # the part of a model of images and text that reads text
        description = text | {"tie_word_embeddings": stated.get("tie_word_embeddings")}
        stated = Entries(name, description)
    defaults = family.architectures[architecture]
    sizes = [size for size in ("num_attention_heads", "hidden_size", "num_hidden_layers") if size in defaults]
    # a file that says nothing is no model of 7 billion parameters
    if sizes and not any(size in stated for size in sizes):
        raise ValueError(f"{name} is incomplete: it has no {sizes[0]!r}")
    return family, family.read(source, Entries(name, description, defaults), architecture)


def _architecture(source: Path | str, stated: Entries) -> str | None:
    """The classes of a live model are what it is. A file may name none, and then its type tells, or its other names."""
    names, model_type = stated.array("architectures", str, []), stated.text("model_type", "")
    supported = supported_architectures()
    if names:  # a model that was saved without its head names that class
        whole = f"{names[0].removesuffix('Model')}ForCausalLM"
        return whole if names[0].endswith("Model") and whole in supported else names[0]
    if not model_type and ("d_model" in stated or "dim" in stated):  # of mamba_ssm, and Codestral's
        kind = "Mamba2" if "dim" in stated else stated.part("ssm_cfg").text("layer", "Mamba1")
        kinds = [name.removeprefix("mamba_ssm ") for name in supported if name.startswith("mamba_ssm ")]
        if kind not in kinds:
            raise ValueError(f"{source} has layers of {kind}, the families are {' and '.join(kinds)}")
        return f"mamba_ssm {kind}"
    by_type = {name.removesuffix("ForCausalLM").lower().replace("_", ""): name for name in supported}
    return by_type.get(model_type.removesuffix("_text").replace("_", ""), model_type or None)


def eos_tokens(folder: Path, tokenizer) -> frozenset[int]:
    """Tokens that end a text, by generation_config.json, config.json and the tokenizer.

    Raises:
        ValueError: one of the files names something else than tokens.
    """
    tokens = set(tokenizer.eos_tokens) if tokenizer else set()
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            entries = Entries(f"{folder}: {name}", read_json(folder / name))
            if isinstance(entries.get("eos_token_id"), list):
                tokens.update(entries.array("eos_token_id", int))
            elif "eos_token_id" in entries:
                tokens.add(entries.whole("eos_token_id", least=-1))
    return frozenset(token for token in tokens if token >= 0)  # some files write -1 for none


class SafetensorsCheckpoint:
    """The tensors of safetensors files: `shapes` of all; `blocks` of one, or what is `stored`.

    Args:
        files: the files, all of one model.
        places: by tensor, the name of the file that it is in, where an index says so.

    Raises:
        ValueError: a file is truncated or corrupt, has not what the index says, or has a tensor that another has too.
    """

    def __init__(self, files: Sequence[Path], places: dict[str, str] | None = None):
        places = places or {}
        self._shards: dict[str, SafetensorsFile] = {}
        for file in files:
            shard = SafetensorsFile(file)
            for name in shard.shapes:
                if places.get(name, file.name) != file.name:
                    continue
                if name in self._shards:
                    raise ValueError(f"{file} has tensor {name}, which another file has too")
                self._shards[name] = shard
        if missing := sorted(places.keys() - self._shards.keys()):
            raise ValueError(
                f"{files[0].parent / places[missing[0]]} has no tensor {missing[0]}, which the index names"
            )
        self._names = _hugging_face_names(self._shards)
        self.shapes = {ours: self._shards[name].shapes[name] for ours, name in self._names.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values."""
        name = self._names[name]
        yield slice(None), self._shards[name].tensor(name)

    def stored(self, name: str) -> StoredMatrix | None:
        """A matrix of floats as it lies in the file; None for other tensors."""
        name = self._names[name]
        return stored_floats(self._shards[name].tensor(name))

    def release(self, name: str) -> None:
        """Says that a tensor is done with: its pages leave memory."""
        name = self._names[name]
        self._shards[name].release(name)


class TensorCheckpoint:
    """Tensors by name: `shapes` of all; `blocks` of one, or what is `stored`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = {ours: tensors[name] for ours, name in _hugging_face_names(tensors).items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values."""
        yield slice(None), self._tensors[name]

    def stored(self, name: str) -> StoredMatrix | None:
        """A matrix of floats on the CPU; None for other tensors."""
        return stored_floats(self._tensors[name].detach())

    def release(self, name: str) -> None:
        """Nothing: who gave the tensors has them."""


def _hugging_face_names(names: Iterable[str]) -> dict[str, str]:
    """Names of tensors by what _hugging_face_name makes of them.

    A model that was saved without its head has them without "model." or "backbone.", which are put there.
    """
    found = {ours: name for name in names if (ours := _hugging_face_name(name)) is not None}
    if not any(name.startswith("layers.") for name in found):
        return found
    prefix = "backbone." if "embeddings.weight" in found else "model."
    return {name if name.startswith("lm_head.") else prefix + name: original for name, original in found.items()}


def _hugging_face_name(name: str) -> str | None:
    """The name that transformers gives a tensor of mamba_ssm's or Codestral's, or of a text model among others.

    None for what reads images or sound.
    """
    if re.match(
        r"(model\.)?(vision_tower|vision_model|audio_tower|embed_vision|embed_audio|multi_modal_projector|visual)\.",
        name,
    ):
        return None
    name = re.sub(r"^model\.language_model\.", "model.", re.sub(r"^language_model\.(?=model\.|lm_head\.)", "", name))
    name = re.sub(r"^model\.(?=backbone\.|lm_head\.)", "", name)
    return re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", name)


def read_checkpoint(folder: Path) -> SafetensorsCheckpoint | TensorCheckpoint:
    """A folder's tensors, from the files that transformers would take, whatever else lies beside them.

    These are model.safetensors, or the shards that its index names, or pytorch_model.bin, or the shards of that one.
    Without any of them: all shards of a numbered set, or else the only .safetensors file that there is.

    Raises:
        FileNotFoundError: there are none of these.
        ValueError: it is not clear which files are the model, a file is truncated, corrupt or missing, or has a tensor
            that another has too.
    """
    if (file := folder / "model.safetensors").is_file():
        return SafetensorsCheckpoint([file])
    if (index := folder / "model.safetensors.index.json").is_file():
        places = _read_index(index)
        return SafetensorsCheckpoint([folder / name for name in sorted(set(places.values()))], places)
    if (file := folder / "pytorch_model.bin").is_file():
        return TensorCheckpoint(_load_pickle(file))
    if (index := folder / "pytorch_model.bin.index.json").is_file():
        tensors = {}
        for name in sorted(set(_read_index(index).values())):
            tensors |= _load_pickle(folder / name)
        return TensorCheckpoint(tensors)
    return SafetensorsCheckpoint(_unindexed(folder))


def _read_index(index: Path) -> dict[str, str]:
    """Reads an index: the name of the file beside it that each tensor is in, by tensor."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} is corrupt: its weight_map must name the file of each tensor, got {places!r:.60}")
    for name in sorted(set(places.values())):
        if name != Path(name).name:
            raise ValueError(f"{index} names {name!r}, which is no file beside it")
        if not (index.parent / name).is_file():
            raise ValueError(f"{index} names {name}, which is missing")
    return places


def _unindexed(folder: Path) -> list[Path]:
    """The .safetensors files of a folder where nothing says which they are."""
    found = {file.name: file for file in sorted(folder.glob("*.safetensors"))}
    adapters = [name for name in found if name.startswith("adapter")]
    if found and len(adapters) == len(found):
        raise ValueError(f"{folder} holds an adapter (LoRA) alone, {adapters[0]}: merge it into its base model first")
    numbered = (re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.safetensors", name) for name in found)
    sets = {(match[1], int(match[2])) for match in numbered if match}
    named = [key for key in sets if key[0] == "model"] or list(sets)
    if len(named) == 1:
        ((stem, count),) = named
        names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"{folder} has no {missing[0]}, one of {count} shards")
        return [found[name] for name in names]
    if not found:
        raise FileNotFoundError(f"{folder} has no .safetensors files")
    if len(found) - len(adapters) > 1:
        raise ValueError(
            f"{folder} has {', '.join(found)}, and neither model.safetensors nor an index says which are the model"
        )
    return [file for name, file in found.items() if name not in adapters]


def _load_pickle(file: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # an unpickler that reads something else raises whatever it stumbles over
        raise ValueError(f"{file} is truncated or corrupt: {error}") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} must hold tensors by their names, got {type(tensors).__name__} of something else")
    return tensors
