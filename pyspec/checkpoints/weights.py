"""Weights out of a checkpoint: checked before anything is made, then read and laid out part by part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pyspec.architectures import Family
from pyspec.architectures.weights import NativeLayer, NativeWeights
from pyspec.fingerprint import WeightSample
from pyspec.ops.linear import lay_out_parts
from pyspec.ops.weight_formats import Codes

__all__ = ["read_weights"]


def read_weights(
    family: Family,
    checkpoint,
    config,
    path: Path | str,
    dtype: torch.dtype | str | None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Any, NativeWeights]:
    """A model's configuration, and its weights, laid out part by part so that little is ever there twice.

    Args:
        family: the model's.
        checkpoint: has the `shapes` of all tensors by name, and `blocks(name)` of one: rows and their values. Where
            matrices are to keep their bits, it has `codes(name)` too, which may be None.
        config: the model's shape, as its description has it.
        path: what errors name.
        dtype: that matrices are laid out in: float32, float16, bfloat16, int8 or "int4"; or None, on a CPU: in the bits
            that the checkpoint has them in, or in bfloat16.
        device: where the weights will be.
        progress: called with (tensors read, all tensors).

    Returns:
        The configuration, without a tie of embedding and head that the checkpoint does not have; and the weights.

    Raises:
        ValueError: tensors are missing, unknown or of another shape than config says, or hold NaN or infinity.
    """
    config = _tied_as_stored(checkpoint, config, family.weights.EMBEDDING)
    _check_tensors(family.weights, checkpoint.shapes, config, path)
    keeps_bits, dtype = dtype is None, dtype or torch.bfloat16
    weights = family.weights.empty(config, torch.float32 if dtype in (torch.int8, "int4") else dtype, device)
    expected = len(weights.named(config))  # views: memory comes with the first write
    sample = WeightSample()
    done = 0

    def read(owner, places: dict[str, torch.Tensor]) -> None:
        nonlocal done
        kept = _Kept(owner) if keeps_bits else None
        for name, place in places.items():
            order = family.row_order(config, name, len(place))
            codes = None if kept is None or not kept.is_part(place) else checkpoint.codes(name)
            if codes is None:
                _fill(place, checkpoint.blocks(name), f"{path}: tensor {name}", order)
            else:
                codes = codes if order is None else codes.rows(order.argsort())
                kept.add(place, codes)
            sample.add([(name, place if codes is None else codes)])
            done += 1
            if progress is not None:
                progress(done, expected)
        if kept is not None:
            kept.lay_out()

    read(weights, weights.named_outside(config))
    weights.lay_out_outside(dtype)
    for index, layer in enumerate(weights.layers):
        read(layer, layer.named(config, f"{weights.LAYERS}{index}."))
        layer.lay_out(dtype)
    weights.sample = sample.hexdigest()
    return config, weights


def _fill(
    place: torch.Tensor,
    blocks: Iterable[tuple[torch.Tensor, torch.Tensor]],
    tensor: str,
    order: torch.Tensor | None,
) -> None:
    """Writes the values of a tensor, by rows, to its place; order: see Family.row_order."""
    for rows, values in blocks:
        rows = rows if order is None else order[rows]
        place[rows] = values.to(place.device, dtype=place.dtype)
        # a sum is finite only where all values are, and far quicker; fp16 can overflow on the way
        is_sure = values.sum().isfinite() and place.dtype != torch.float16
        if not is_sure and not place[rows].isfinite().all():
            raise ValueError(f"{tensor} has values that are NaN or infinite in {place.dtype}")


class _Kept:
    """The matrices of a layer, or those outside, that keep their bits: codes in the place of views of dense memory."""

    def __init__(self, owner: NativeLayer | NativeWeights):
        self._owner = owner
        self._matrices = {
            _address(getattr(owner, name)): name for name in owner.MATRICES if name not in owner.REORDERED
        }
        self._parts: dict[str, dict[int, Codes]] = {name: {} for name in self._matrices.values()}  # by first row

    def is_part(self, place: torch.Tensor) -> bool:
        """Whether a place is whole rows of a matrix."""
        name = self._matrices.get(_address(place))
        return name is not None and place.shape[1:] == getattr(self._owner, name).shape[1:]

    def add(self, place: torch.Tensor, codes: Codes) -> None:
        self._parts[self._matrices[_address(place)]][place.storage_offset() // codes.inputs] = codes

    def lay_out(self) -> None:
        """Lays out the matrices of which all rows are codes; fills in the others' rows."""
        for name, parts in self._parts.items():
            matrix, codes = getattr(self._owner, name), [parts[row] for row in sorted(parts)]
            if sum(part.outputs for part in codes) == len(matrix):
                laid_out = lay_out_parts(codes)
                for same in (name for name in self._owner.MATRICES if getattr(self._owner, name) is matrix):
                    setattr(self._owner, same, laid_out)
            else:
                for row, part in parts.items():
                    matrix[row : row + part.outputs] = part.values()


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tied_as_stored(checkpoint, config, embedding: str):
    """The configuration without its tie where the checkpoint has a head that is not its tensor `embedding`.

    transformers does not tie them either: it takes the configuration for wrong.
    """
    head = "lm_head.weight"
    if not config.tied_embedding or not {embedding, head} <= checkpoint.shapes.keys():
        return config
    pairs = zip(checkpoint.blocks(embedding), checkpoint.blocks(head), strict=True)
    if checkpoint.shapes[embedding] == checkpoint.shapes[head] and all(torch.equal(a, b) for (_, a), (_, b) in pairs):
        return config
    return _untied(config)


def _untied(config):
    parts = {field.name: getattr(config, field.name) for field in fields(config)}
    changed = {name: _untied(part) for name, part in parts.items() if is_dataclass(part)}
    if "tied_embedding" in parts:
        changed["tied_embedding"] = False
    return replace(config, **changed)


def _check_tensors(weights_class: type[NativeWeights], shapes: dict[str, tuple], config, path: Path | str) -> None:
    """Raises ValueError naming the tensors that are missing, have another shape or are unknown."""
    last = f"{weights_class.LAYERS}{config.layers - 1}."
    if not any(name.startswith(last) for name in shapes):  # before anything is made for so many layers
        raise ValueError(f"{path} has no tensor {last}*, for {config.layers} layers")
    try:
        places = weights_class.empty(config, torch.float32, torch.device("meta")).named(config)
    except RuntimeError as error:
        raise ValueError(f"{path} describes tensors that are larger than any memory: {error}") from None
    expected = {name: tuple(place.shape) for name, place in places.items()}
    if missing := sorted(expected.keys() - shapes.keys()):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(f"{path} has no tensor {', '.join(missing[:5])}{more}")
    for name, shape in shapes.items():
        if name in expected:
            if shape != expected[name]:
                raise ValueError(f"{path}: tensor {name} must have shape {expected[name]}, got {shape}")
        elif not name.endswith(("rotary_emb.inv_freq", "lm_head.weight")):  # computed, or tied to another
            raise ValueError(f"{path} has tensor {name}, which a model of its architecture does not have")
