"""Converted models: weights as they lie in memory, in a file that is mapped and used where it is.

A file is a safetensors file: the laid out matrices, each at a multiple of 64 bytes, then the rest of the weights, and
as metadata "pyspec" a JSON object with the configuration, the tokenizer and what LinearWeights have beside their data.
"""

from __future__ import annotations

import json
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyspec.architectures import FAMILIES
from pyspec.architectures.weights import NativeLayer, NativeWeights
from pyspec.checkpoints.memory import MemoryNeed, cache_bytes
from pyspec.checkpoints.safetensors_file import DTYPES, SafetensorsFile
from pyspec.machine.memory import available_memory
from pyspec.ops.expert_linear import ExpertWeight, JoinedExperts
from pyspec.ops.linear import FORMAT_VERSION as LINEAR
from pyspec.ops.linear import JoinedWeight, LinearWeight
from pyspec.ops.linear_codes import FORMAT_VERSION as CODES
from pyspec.ops.weight_formats import FORMATS
from pyspec.runners import Runner
from pyspec.runners.native import NativeRunner

__all__ = ["load_converted", "save_converted"]

ALIGNMENT = 64
_CONFIGURATIONS = "pyspec.architectures."
_WEIGHTS = {kind.__name__: kind for kind in (LinearWeight, JoinedWeight, ExpertWeight, JoinedExperts)}


def _version() -> str:
    """Of the layouts, which are the same for all instruction sets, and of what is beside them here."""
    return f"1.{LINEAR}.{CODES}, {sys.byteorder}-endian"


def save_converted(runner: Runner, path: Path) -> None:
    """Writes a model to a file that load_converted maps.

    Raises:
        ValueError: the model does not run on our kernels on a CPU.
    """
    if not isinstance(runner, NativeRunner) or runner.device.type != "cpu":
        raise ValueError(f"only models that our kernels run on a CPU can be converted, got a {type(runner).__name__}")
    tensors: dict[str, Tensor] = {}
    layouts = {}
    weights = runner.weights
    is_tied = weights.embedding is weights.head
    for name, value in _named(weights):
        if is_tied and name == "head":
            continue
        if isinstance(value, LinearWeight):
            layouts[name] = {"kind": type(value).__name__} | {
                field.name: _plain(getattr(value, field.name))
                for field in fields(value)
                if field.name not in ("data", "order")
            }
            if value.order is not None:
                tensors[f"{name}.order"] = value.order
            value = value.data
        tensors[name] = value
    description = {
        "version": _version(),
        "family": next(
            name
            for name, family in FAMILIES.items()
            if family.weights is type(weights) and family.runner_of(runner.config) is type(runner)
        ),
        "config": _plain(runner.config),
        "tied": is_tied,
        "sample": weights.sampled(runner.config),
        "layouts": layouts,
        "eos_tokens": sorted(runner.eos_tokens),
        "tokenizer": None if runner.tokenizer is None else runner.tokenizer.to_json(),
    }
    part = path.with_suffix(".part")
    try:
        _write(part, description, dict(sorted(tensors.items(), key=lambda entry: entry[0] not in layouts)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_converted(path: Path, announce=None) -> Runner:
    """The runner of a converted model; its weights are the file's pages.

    Raises:
        ValueError: it is no converted model, truncated or corrupt, or laid out for another version.
    """
    from pyspec.checkpoints.tokenizer import Tokenizer

    file = SafetensorsFile(path)
    try:
        description = json.loads(file.metadata["pyspec"])
        version = description["version"]
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"{path} is no converted model: pyspec convert makes one") from None
    if version != _version():
        raise ValueError(
            f"{path} is laid out for another version of pyspec, {version} and not {_version()}: run pyspec convert on "
            "the original model again"
        )
    try:
        family, config = FAMILIES[description["family"]], _config(description["config"])
        weights = family.weights.empty(config, torch.bfloat16, torch.device("meta"))
        for name, value in _named(weights):
            if name != "head" or not description["tied"]:
                _put(weights, name, _weight(file, name, description["layouts"].get(name), value))
        if description["tied"]:
            weights.head = weights.embedding
        weights.is_together, weights.sample = True, description["sample"]
        tokenizer = None if description["tokenizer"] is None else Tokenizer.from_json(description["tokenizer"], path)
        eos_tokens = description["eos_tokens"]
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    if announce is not None:
        cache = cache_bytes(config, torch.bfloat16)
        kept = str(weights.dtype).removeprefix("torch.")
        size = path.stat().st_size
        announce(MemoryNeed(size, kept, *cache, available_memory(torch.device("cpu"))))
    return family.runner_of(config)(config, weights, tokenizer, eos_tokens)


# ==== weights by name ====


def _named(weights: NativeWeights) -> list[tuple[str, Tensor | LinearWeight]]:
    """Everything that was read from a checkpoint, where it lies: "layers.3.qkv", "layers.3.norms.attention"."""
    found = []
    for prefix, owner in [("", weights), *((f"layers.{i}.", layer) for i, layer in enumerate(weights.layers))]:
        for field in fields(owner):
            value = getattr(owner, field.name)
            entries = {f".{key}": part for key, part in value.items()} if isinstance(value, dict) else {"": value}
            for key, part in entries.items():
                if isinstance(part, (Tensor, LinearWeight)):
                    found.append((f"{prefix}{field.name}{key}", part))
    return found


def _put(weights: NativeWeights, name: str, value: Tensor | LinearWeight) -> None:
    owner: NativeWeights | NativeLayer | dict = weights
    *folders, last = name.split(".")
    for folder in folders:
        owner = owner[int(folder)] if isinstance(owner, list) else getattr(owner, folder)
    if isinstance(owner, dict):
        owner[last] = value
    else:
        setattr(owner, last, value)


def _weight(file: SafetensorsFile, name: str, layout: dict | None, blank: Tensor) -> Tensor | LinearWeight:
    data = file.tensor(name)
    if layout is None:
        if data.shape != blank.shape:
            raise RuntimeError(f"{name} must have shape {tuple(blank.shape)}, got {tuple(data.shape)}")
        return data
    values = dict(layout)
    kind = _WEIGHTS[values.pop("kind")]
    if values.get("format") is not None:
        values["format"] = FORMATS[values["format"]]
    if "parts" in values:
        values["parts"] = tuple((FORMATS[format], outputs) for format, outputs in values["parts"])
    if (order := f"{name}.order") in file.shapes:
        values["order"] = file.tensor(order)
    weight = kind(data, **values)
    if weight.shape != blank.shape:
        raise RuntimeError(f"{name} must have shape {tuple(blank.shape)}, got {tuple(weight.shape)}")
    return weight


# ==== configurations ====


def _plain(value: Any) -> Any:
    """A value of a configuration or layout as JSON has it; a configuration with its class."""
    if value in FORMATS.values():
        return value.name
    if is_dataclass(value):
        kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix(_CONFIGURATIONS)
        return {"class": kind} | {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    raise TypeError(f"a configuration cannot hold {value!r}")


def _config(value: Any) -> Any:
    """What _plain got."""
    if isinstance(value, list):
        return tuple(_config(part) for part in value)
    if not isinstance(value, dict):
        return value
    module, _, name = value["class"].rpartition(".")
    kind = getattr(import_module(_CONFIGURATIONS + module), name)
    if not is_dataclass(kind):
        raise TypeError(f"{value['class']} is no configuration")
    return kind(**{key: _config(part) for key, part in value.items() if key != "class"})


# ==== the file ====


def _write(path: Path, description: dict, tensors: dict[str, Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"pyspec": json.dumps(description)}}
    at = 0
    for name, tensor in tensors.items():
        dtype = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
