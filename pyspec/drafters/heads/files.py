"""What the files of all trained heads share: config.json, the layers in it, and tensors that fit or are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures import family_of
from pyspec.architectures.llama import LlamaConfig
from pyspec.checkpoints.safetensors_file import SafetensorsFile
from pyspec.entries import Entries

__all__ = ["check_target", "fill", "kind_of", "read_layers", "read_taps", "read_tensors", "read_values", "tokens_of"]

CONTEXT = 2**24  # positions: that of a head is the target's, whatever its config.json was trained at
_TRAINING_ONLY = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


def read_values(folder: Path) -> tuple[Path, dict]:
    """Where a head's config.json is, and what it holds.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is corrupt.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no draft head at {folder}: it has no config.json")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is corrupt: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is corrupt: it must hold entries, got {type(values).__name__}")
    return path, values


def kind_of(values: Mapping) -> object:
    """What kind of head a config.json describes: its speculators_model_type, or eagle3 for the flat layout of that."""
    names = [name for name in values.get("architectures") or () if isinstance(name, str)]
    if values.get("speculators_model_type") is not None:
        return values["speculators_model_type"]
    return "eagle3" if any("eagle3" in name.lower() for name in names) else names or values.get("model_type")


def read_layers(path: Path, entries: Entries, values: dict, has_head_norms: bool, choices: list[str]) -> LlamaConfig:
    """The shape of a head's layers, of Llama or Qwen3, by their entries and whether there is a q_norm."""
    kind = values.get("model_type")
    if kind is None:
        kind = "qwen3" if has_head_norms else "llama"
        found = "there" if has_head_norms else "missing"
        choices.append(f"its layers are {kind}'s, for model_type is left out and q_norm is {found}")
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(kind)
    if architecture is None:
        raise ValueError(f"{path} has layers of model_type {kind!r}, supported are llama and qwen3")
    if (kind == "qwen3") != has_head_norms:
        raise ValueError(
            f"{path} has layers of {kind}, but self_attn.q_norm.weight is {'there' if has_head_norms else 'missing'}"
        )
    family = family_of(architecture)
    config = family.read(path, entries.with_defaults(family.architectures[architecture]), architecture)
    return replace(config, context_length=CONTEXT, tied_embedding=False)


def read_taps(
    path: Path,
    entries: Entries,
    layers: int,
    given: Sequence[int] | None,
    choices: list[str],
    key: str,
    is_flat: bool = False,
) -> tuple[int, ...]:
    """The target's layers that a head reads: those that are given, or that its entry `key` names.

    Args:
        layers: of the target.
        choices: gets what was taken.
        key: its entry; where that is absent, the default of EAGLE-3 is taken.
        is_flat: whether ids that begin with 1 name what layers give.
    """
    if given is not None:
        taps = list(given)
    elif key not in entries:
        taps = [2, layers // 2, layers - 3]
        choices.append(f"taps are {taps}, the default for {layers} layers, for {key} is left out")
    else:
        taps = entries.array(key, int)
        if is_flat and taps[:1] == [1]:
            taps = [tap + 1 for tap in taps]
            choices.append(f"{key} names what layers give, for the first is 1: taps are {taps}")
        else:
            choices.append(f"{key} names what layers take in: taps are {taps}")
    if taps != sorted(set(taps)) or not taps or taps[0] < 0 or taps[-1] > layers:
        origin = "taps" if given is not None else f"{path} is for another target: its {key}"
        raise ValueError(f"{origin} must ascend and be in [0, {layers}] for {layers} layers, got {taps}")
    return tuple(taps)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """A head's tensors by the names of the speculators layout: views of a mapped file, or what a pickle held.

    Raises:
        FileNotFoundError: there is neither a safetensors file nor pytorch_model.bin.
        ValueError: a file is corrupt, holds more than tensors, or a name is there twice.
    """
    files = sorted(folder.glob("*.safetensors"))
    if files:
        found = [(name, file.tensor(name)) for file in map(SafetensorsFile, files) for name in file.shapes]
    elif (pickle := folder / "pytorch_model.bin").is_file():
        try:
            found = list(torch.load(pickle, map_location="cpu", weights_only=True, mmap=True).items())
        except Exception as error:  # unpickling raises whatever it likes
            raise ValueError(f"{pickle} must hold tensors and nothing else: {error}") from None
    else:
        raise FileNotFoundError(f"there is no draft head at {folder}: no .safetensors file and no pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for name, tensor in found:
        name = name.removeprefix("model.")
        name = "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
        if name in tensors:
            raise ValueError(f"{folder} has two tensors for {name}")
        if name not in _TRAINING_ONLY:
            tensors[name] = tensor
    return tensors


def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path | str) -> None:
    """Copies tensors to their places, once all are known to fit."""
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"{source} has no {', '.join(missing[:3])}, which its config.json asks for")
    if unknown := sorted(tensors.keys() - places.keys()):
        raise ValueError(f"{source} has {', '.join(unknown[:3])}, which contradicts its config.json")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            raise ValueError(f"{source} must have {name} {list(place.shape)}, got {list(tensors[name].shape)}")
        if not tensors[name].is_floating_point():
            raise ValueError(f"{source} must have {name} in floating point, got {tensors[name].dtype}")
        if not torch.isfinite(tensors[name].float()).all():
            raise ValueError(f"{source} has NaN or infinity in {name}")
    for name, place in places.items():
        place.copy_(tensors[name])


def tokens_of(offsets: Tensor | None, size: int, vocabulary: int, source: Path | str) -> Tensor | None:
    """[draft vocabulary] int64, the target's token of each of the head's; None where they are the same."""
    if offsets is None:
        if size != vocabulary:
            raise ValueError(f"{source} has no d2t, but {size} of the target's {vocabulary} tokens")
        return None
    if offsets.shape != (size,) or offsets.is_floating_point():
        raise ValueError(f"{source} must have d2t [{size}] of integers, got {offsets.dtype} {list(offsets.shape)}")
    tokens = offsets.long() + torch.arange(size)
    if tokens.min() < 0 or tokens.max() >= vocabulary or len(tokens.unique()) < size:
        raise ValueError(f"{source} has a d2t that names tokens outside of [0, {vocabulary}), or one of them twice")
    return None if size == vocabulary and not offsets.any() else tokens


def check_target(folder: Path, layers: LlamaConfig, hidden_size: int, target) -> None:
    """Raises ValueError where a head in a folder is for a target of another vocabulary or hidden size."""
    for name, found, expected in (
        ("vocabulary", layers.vocab_size, target.vocab_size),
        ("hidden size", hidden_size, target.hidden_size),
    ):
        if found != expected:
            raise ValueError(f"{folder} is a head for a target with a {name} of {found}, got one of {expected}")
