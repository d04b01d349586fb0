"""Architectures: one file a family of models, which registers what its checkpoints look like and what runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyspec.entries import Entries
from pyspec.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

    from pyspec.architectures.weights import NativeWeights

__all__ = ["FAMILIES", "GGUF", "NEXT_TOKENS", "Family", "Unsupported", "family_of", "supported_architectures"]

NEXT_TOKENS = "mtp."  # what names of a layer that guesses further tokens begin with, as Qwen3-Next has it


class Unsupported(ValueError):
    """A model, or a feature of one, that our kernels do not run; the message names it."""


@dataclass(frozen=True)
class GGUF:
    """The form of a family's GGUF files.

    Attributes:
        architectures: names that general.architecture has.
        read: the model's configuration, from the file (a pyspec.checkpoints.gguf.GGUFFile) and the metadata that begin
            with its architecture's name. Raises Unsupported for features that the runner does not have.
        tensors: names of tensors in Hugging Face checkpoints by those in GGUF files, both without the layer's number
            and without "weight" or "bias", or both with what they have of these; * is the number of an expert.
        row_order: as a Family's, for a tensor's name in `tensors`: which row of the checkpoint each row of the file is.
        restored: by names with "weight" or "bias" where files have them, what makes of a small tensor, whole and in
            fp32, that of a Hugging Face checkpoint.
    """

    architectures: tuple[str, ...]
    read: Callable[[Any, Entries], Any]
    tensors: Mapping[str, str]
    row_order: Callable[[Any, str, int], Tensor | None] = lambda config, name, rows: None
    restored: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of models: how its checkpoints are read, and what runs them.

    Attributes:
        architectures: by each name that `architectures` in a config.json has, what counts where config.json leaves an
            entry out, as transformers' class has it. Files of mamba_ssm name none: theirs is "mamba_ssm" and the kind
            of its layers.
        read: the model's configuration, from the checkpoint's name in errors, the entries of its config.json and its
            architecture. Raises Unsupported for features that the runner does not have, and ValueError for entries
            that are not what they should be.
        weights: holds the tensors, by the names of Hugging Face.
        runner: made of a configuration, weights, a tokenizer or None, and the tokens that end a text. Where a family's
            models differ in it, their configurations have a `runner` of their own; see runner_of.
        gguf: its GGUF files; None where it has none.
        row_order: for the configuration, a tensor's name and its number of rows: [rows] int64, which row of the model
            each row of the checkpoint is; None where they are the same.
    """

    architectures: Mapping[str, Mapping[str, Any]]
    read: Callable[[Path | str, Entries, str], Any]
    weights: type[NativeWeights]
    runner: type
    gguf: GGUF | None = None
    row_order: Callable[[Any, str, int], Tensor | None] = lambda config, name, rows: None

    def runner_of(self, config) -> type:
        """What runs a model of this configuration."""
        return getattr(config, "runner", self.runner)


FAMILIES: Registry[Family] = Registry("pyspec.architectures")


def family_of(architecture: str | None) -> Family | None:
    """The family of an architecture of config.json; None where our kernels have none."""
    return next((family for family in FAMILIES.values() if architecture in family.architectures), None)


def supported_architectures() -> list[str]:
    """Every architecture of config.json that our kernels run."""
    return [name for family in FAMILIES.values() for name in family.architectures]
