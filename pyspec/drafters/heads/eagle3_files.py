"""EAGLE-3 heads as people have them: what their config.json says, and their tensors by one set of names.

Two layouts are in use. That of the speculators library nests the layer's configuration; the original one is flat, calls
the layer "midlayer", and may keep its flags in an entry of their own. Where they leave open what is meant, `choices`
says what was taken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures import family_of
from pyspec.architectures.llama import LlamaConfig
from pyspec.checkpoints.safetensors_file import SafetensorsFile
from pyspec.entries import Entries

__all__ = ["Eagle3Config", "read_config", "read_tensors"]

CONTEXT = 2**24  # positions: that of a head is the target's, whatever its config.json was trained at
# other names of a flag, in the flat layout
_FLAGS = {
    "norm_before_residual": (),
    "norm_before_fc": (),
    "fc_norm": (),
    "norm_output": ("return_hidden_post_norm",),
}
_TRAINING_ONLY = ("t2d", "verifier_lm_head.weight", "verifier_norm.weight", "rotary_emb.inv_freq")


@dataclass(frozen=True)
class Eagle3Config:
    """What a head is; see trained heads in docs/drafting.md for the computation.

    Attributes:
        layers: the shape of its layers, of Llama or Qwen3.
        draft_vocab_size: tokens that it can guess.
        target_hidden_size: width of the target's residual stream.
        taps: the target's layers whose residual stream it reads, see Runner.prefill.
        norm_before_residual: whether the first layer's residual stream begins with the normed hidden row.
        norm_before_fc: whether all taps of a row are normed together before they are joined.
        fc_norm: whether each tap is normed by itself before they are joined.
        norm_output: whether a guess takes in the normed rows of the guess before it.
        choices: what was taken where the files leave it open, one sentence each.
        layout: "speculators", or "flat" for the original one.
    """

    layers: LlamaConfig
    draft_vocab_size: int
    target_hidden_size: int
    taps: tuple[int, ...]
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    choices: tuple[str, ...] = ()
    layout: str = "speculators"


def read_config(
    folder: Path, shapes: Mapping[str, Sequence[int]], target_layers: int, taps: Sequence[int] | None = None
) -> Eagle3Config:
    """The head in a folder, for a target with so many layers.

    Args:
        shapes: of its tensors, as read_tensors names them.
        taps: to be read instead of those that config.json names.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it is no EAGLE-3 head, or an entry is not what it should be; the message names it.
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
    entries, choices = Entries(str(path), values), []
    names = [name for name in values.get("architectures") or () if isinstance(name, str)]
    if values.get("speculators_model_type") == "eagle3":
        of_layer, flags = entries.part("transformer_layer_config"), entries
        layer_values, aliases = values.get("transformer_layer_config") or {}, False
    elif "speculators_model_type" not in entries and any("eagle3" in name.lower() for name in names):
        of_layer, flags, aliases = entries, _flat_flags(entries, values), True
        layer_values = values
    else:
        kind = values.get("speculators_model_type", names or values.get("model_type"))
        raise ValueError(
            f"{path} must describe an EAGLE-3 head (speculators_model_type eagle3, or an architecture such as "
            f"LlamaForCausalLMEagle3), got {kind!r}"
        )
    has_head_norms = "layers.0.self_attn.q_norm.weight" in shapes
    layers = _read_layers(path, of_layer, layer_values, has_head_norms, choices)
    found = {name: _flag(flags, (name, *others) if aliases else (name,)) for name, others in _FLAGS.items()}
    if found["norm_before_fc"] and found["fc_norm"]:
        raise ValueError(f"{path} is corrupt: its norm_before_fc and fc_norm must not both be true")
    vocabulary = layers.vocab_size
    target_hidden = flags.get("target_hidden_size") or entries.get("target_hidden_size") or layers.hidden_size
    return Eagle3Config(
        layers=layers,
        draft_vocab_size=entries.whole("draft_vocab_size", 32000 if not aliases else vocabulary),
        target_hidden_size=target_hidden,
        taps=_taps(path, flags, target_layers, taps, aliases, choices),
        **found,
        choices=tuple(choices),
        layout="flat" if aliases else "speculators",
    )


def _flat_flags(entries: Entries, values: dict) -> Entries:
    """The entries that the flat layout has at the top or in eagle_config."""
    entries.part("eagle_config")
    return Entries(entries.name, {**values, **(values.get("eagle_config") or {})})


def _flag(entries: Entries, names: Sequence[str]) -> bool:
    return any(entries.flag(name, False) for name in names)


def _read_layers(path: Path, entries: Entries, values: dict, has_head_norms: bool, choices: list[str]) -> LlamaConfig:
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


def _taps(
    path: Path, entries: Entries, layers: int, given: Sequence[int] | None, is_flat: bool, choices: list[str]
) -> tuple[int, ...]:
    key = "eagle_aux_hidden_state_layer_ids"
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
