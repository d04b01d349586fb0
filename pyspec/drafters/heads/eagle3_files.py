"""EAGLE-3 heads as people have them: what their config.json says.

Two layouts are in use. That of the speculators library nests the layer's configuration; the original one is flat, calls
the layer "midlayer", and may keep its flags in an entry of their own. Where they leave open what is meant, `choices`
says what was taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyspec.architectures.llama import LlamaConfig
from pyspec.drafters.heads.files import kind_of, read_layers, read_taps, read_values
from pyspec.entries import Entries

__all__ = ["Eagle3Config", "read_config"]

_TAPS = "eagle_aux_hidden_state_layer_ids"
# other names of a flag, in the flat layout
_FLAGS = {
    "norm_before_residual": (),
    "norm_before_fc": (),
    "fc_norm": (),
    "norm_output": ("return_hidden_post_norm",),
}


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
    path, values = read_values(folder)
    entries, choices = Entries(str(path), values), []
    aliases = "speculators_model_type" not in entries
    if kind_of(values) != "eagle3":
        raise ValueError(
            f"{path} must describe an EAGLE-3 head (speculators_model_type eagle3, or an architecture such as "
            f"LlamaForCausalLMEagle3), got {kind_of(values)!r}"
        )
    if aliases:
        of_layer, flags, layer_values = entries, _flat_flags(entries, values), values
    else:
        of_layer, flags = entries.part("transformer_layer_config"), entries
        layer_values = values.get("transformer_layer_config") or {}
    has_head_norms = "layers.0.self_attn.q_norm.weight" in shapes
    layers = read_layers(path, of_layer, layer_values, has_head_norms, choices)
    found = {name: _flag(flags, (name, *others) if aliases else (name,)) for name, others in _FLAGS.items()}
    if found["norm_before_fc"] and found["fc_norm"]:
        raise ValueError(f"{path} is corrupt: its norm_before_fc and fc_norm must not both be true")
    vocabulary = layers.vocab_size
    target_hidden = flags.get("target_hidden_size") or entries.get("target_hidden_size") or layers.hidden_size
    return Eagle3Config(
        layers=layers,
        draft_vocab_size=entries.whole("draft_vocab_size", 32000 if not aliases else vocabulary),
        target_hidden_size=target_hidden,
        taps=read_taps(path, flags, target_layers, taps, choices, _TAPS, aliases),
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
