"""Trained draft heads: small models that guess from the target's own residual stream."""

from __future__ import annotations

from pathlib import Path

from pyspec.checkpoints.sources import find_source
from pyspec.drafters.heads.files import kind_of, read_values
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.registry import Registry

__all__ = ["HEADS", "drafter_of_head"]

#: Drafters of trained heads, by the speculators_model_type of the heads' config.json.
HEADS: Registry = Registry("pyspec.drafters")


def drafter_of_head(head: str | Path, target, acceptance="exact", **options):
    """The drafter of a trained head: config.json says what kind it is.

    Args:
        head: a folder, or a hub id, with config.json and safetensors.
        target: the runner to draft for.
        acceptance: a rule or its name, which the trees are to fit.
        options: of the drafter, see Eagle3.

    Raises:
        FileNotFoundError: there is no such folder, or no config.json in it.
        ValueError: it describes no head of a kind that is known; or as for the drafter.
    """
    folder = find_source(head)
    path, values = read_values(Path(folder))
    kind = kind_of(values)
    if not isinstance(kind, str) or kind not in HEADS:
        raise ValueError(
            f"{path} must describe a draft head, with a speculators_model_type of {', '.join(HEADS)}, or an "
            f"architecture such as LlamaForCausalLMEagle3, got {kind!r}"
        )
    drafter = HEADS[kind]
    return drafter(folder, target, growth_for(acceptance, drafter.depth), **options)
