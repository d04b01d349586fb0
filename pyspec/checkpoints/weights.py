"""Weights out of a checkpoint: checked before anything is made, then each tensor laid out where it will lie."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyspec.architectures import NEXT_TOKENS, Family
from pyspec.architectures.weights import Matrix, NativeLayer, NativeWeights
from pyspec.checkpoints.matrix_plan import MatrixPlan, plan_matrices, storage_of
from pyspec.checkpoints.memory import MemoryNeed, cache_bytes, check_memory
from pyspec.fingerprint import WeightSample
from pyspec.machine.huge_pages import HugePages
from pyspec.ops._checks import FLOATS
from pyspec.ops.lay_out import StoredCodes, StoredMatrix

__all__ = ["NextTokens", "read_weights"]

SMALLER = {"int8": torch.int8, "int4": "int4"}  # what is proposed where a model does not fit


def read_weights(
    family: Family,
    checkpoint,
    config,
    path: Path | str,
    dtype: torch.dtype | str | None,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    announce: Callable[[MemoryNeed], None] | None = None,
) -> tuple[Any, NativeWeights]:
    """A model's configuration, and its weights, each matrix laid out in its place straight from the checkpoint.

    Args:
        family: the model's.
        checkpoint: has the `shapes` of all tensors by name; `blocks(name)` of one: rows and their values;
            `stored(name)`, the StoredMatrix that it is, or None; and `release(name)`, called when it is done with.
        config: the model's shape, as its description has it.
        path: what errors name.
        dtype: that matrices are laid out in: float32, float16, bfloat16, int8 or "int4"; or None: in the bits that the
            checkpoint has them in, or in bfloat16.
        device: where the weights will be.
        progress: called with (tensors read, all tensors).
        announce: called with what they need of memory, before any is taken.

    Returns:
        The configuration, without a tie of embedding and head that the checkpoint does not have; and the weights.

    Raises:
        ValueError: tensors are missing, unknown or of another shape than config says, or hold NaN or infinity.
        MemoryError: they cannot fit.
    """
    checkpoint = family.weights.checkpoint(checkpoint, config)
    checkpoint = _InModelOrder(checkpoint, family, config)
    config = _tied_as_stored(checkpoint, config, family.weights.EMBEDDING)
    _check_tensors(family.weights, checkpoint, config, path)

    def need(dtype: torch.dtype | str | None) -> tuple[int, str, int, int]:
        blank = _blank(family, checkpoint, config, dtype, device, torch.device("meta"))
        return *_need(*blank, config), *cache_bytes(config, dtype if dtype in FLOATS else torch.bfloat16)

    check_memory(path, device, need, dtype, SMALLER, announce)
    weights, plans = _blank(family, checkpoint, config, dtype, device, device)
    if lost := next((plan for plan in plans.values() if plan.loses_bits), None):
        warnings.warn(
            f"{path}: {next(iter(lost.tensors))} is one matrix with tensors of other types, or in another "
            f"order of groups, which no kernel reads together: it, and maybe others, becomes {lost.parts[0][0]}",
            RuntimeWarning,
            stacklevel=5,  # who called load, which as_stored wraps
        )
    weights.is_together = device.type == "cpu"
    buffer = HugePages([plan.nbytes for plan in plans.values()]) if weights.is_together else None
    for plan in plans.values():
        plan.take(buffer.take(plan.nbytes) if buffer else torch.zeros(plan.nbytes, dtype=torch.uint8, device=device))
    dtype = dtype or torch.bfloat16
    reader = _Reader(checkpoint, path, plans, len(weights.named(config)), progress, device)
    reader.read(weights, config, dtype)
    for index, layer in enumerate(weights.layers):
        reader.read(layer, config, dtype, f"{weights.LAYERS}{index}.")
    weights.sample = reader.sample.hexdigest()
    weights.mtp = NextTokens.of(checkpoint, path)
    return config, weights


def _blank(
    family: Family, checkpoint, config, dtype: torch.dtype | str | None, device: torch.device, blank: torch.device
) -> tuple[NativeWeights, dict[int, MatrixPlan]]:
    """Weights to be filled, and plans of those that have no memory yet: all matrices, but for floats on a GPU.

    The weights are for device, what has memory is on blank: there too, or on "meta", where there is none.
    """
    keeps_bits, dtype = dtype is None, dtype or torch.bfloat16
    floats = dtype if dtype in FLOATS else torch.float32
    if blank.type not in ("cpu", "meta") and not keeps_bits and dtype in FLOATS:  # rows, as a checkpoint has them
        return family.weights.empty(config, floats, blank), {}
    weights = family.weights.empty(config, floats, blank, torch.device("meta"))
    plans = plan_matrices(weights, config, checkpoint, dtype, keeps_bits=keeps_bits, device=device)
    if storage_of(weights.embedding) not in plans:  # it is only read by rows: in its own dtype where none was named
        stored = checkpoint.stored(weights.EMBEDDING) if keeps_bits or dtype not in FLOATS else None
        floats = floats if stored is None else getattr(torch, stored.kind)
        weights.embedding = torch.empty_like(weights.embedding, dtype=floats, device=blank)
    return weights, plans


def _need(weights: NativeWeights, plans: dict[int, MatrixPlan], config) -> tuple[int, str]:
    """Bytes of weights, and what their matrices are kept in."""
    others = {storage_of(place): place.untyped_storage().nbytes() for place in weights.named(config).values()}
    kept = dict.fromkeys(format for plan in plans.values() for format, _ in plan.parts)
    planned = sum(plan.nbytes for plan in plans.values())
    return planned + sum(size for key, size in others.items() if key not in plans), ", ".join(kept)


class _InModelOrder:
    """A checkpoint whose rows are in the order of the model, see Family.row_order."""

    def __init__(self, checkpoint, family: Family, config):
        self._checkpoint, self._family, self._config = checkpoint, family, config
        self.shapes, self.release = checkpoint.shapes, checkpoint.release

    def blocks(self, name: str) -> Iterator[tuple[Tensor | slice, Tensor]]:
        order = self._order(name)
        for rows, values in self._checkpoint.blocks(name):
            yield rows if order is None else order[rows], values

    def stored(self, name: str) -> StoredMatrix | StoredCodes | None:
        stored, order = self._checkpoint.stored(name), self._order(name)
        if stored is None or order is None:
            return stored
        order = order.argsort()
        if isinstance(stored, StoredCodes):
            return replace(stored, read=lambda: stored.codes.rows(order))
        return replace(stored, order=order if stored.order is None else stored.order[order])

    def _order(self, name: str) -> Tensor | None:
        return self._family.row_order(self._config, name, self.shapes[name][0])


class _Reader:
    """Fills the tensors of a model's weights and layers, one after another."""

    def __init__(
        self, checkpoint, path: Path | str, plans: dict[int, MatrixPlan], expected: int, progress, device: torch.device
    ):
        self._checkpoint, self._path, self._plans, self._progress = checkpoint, path, plans, progress
        self._expected, self._done, self._device = expected, 0, device
        self.sample = WeightSample()

    def read(self, owner: NativeWeights | NativeLayer, config, dtype: torch.dtype | str, prefix: str = "") -> None:
        """Fills and lays out what `owner` has, its layers aside."""
        plans = self._begin(owner)
        places = owner.named(config, prefix) if prefix else owner.named_outside(config)
        for name, place in places.items():
            plan = plans.get(storage_of(place))
            tensor = f"{self._path}: tensor {name}"
            if plan is not None and plan.tensors:
                matrix = self._checkpoint.stored(name)
                try:
                    plan.write(name, matrix)
                except ValueError as error:
                    raise ValueError(f"{tensor} {str(error).removeprefix('source ')}") from None
                self.sample.add([(name, matrix)])
            else:
                _fill(place, self._checkpoint.blocks(name), tensor)
                self.sample.add([(name, place)])
            self._checkpoint.release(name)
            self._done += 1
            if self._progress is not None:
                self._progress(self._done, self._expected)
        for plan in plans.values():
            if plan.tensors:
                _replace(owner, getattr(owner, plan.name), plan.weight)
        if isinstance(owner, NativeWeights):
            owner.lay_out_outside(dtype)
        else:
            owner.lay_out(dtype)
        for plan in plans.values():
            if not plan.tensors:
                plan.weight.data.copy_(getattr(owner, plan.name).data)
                _replace(owner, getattr(owner, plan.name), plan.weight)

    def _begin(self, owner: NativeWeights | NativeLayer) -> dict[int, MatrixPlan]:
        """The plans of an owner's matrices, by `storage_of` them. Those that are filled in dense get memory."""
        plans = {}
        for name in owner.MATRICES:
            matrix = getattr(owner, name)
            plan = self._plans.get(storage_of(matrix)) if isinstance(matrix, Tensor) else None
            if matrix.is_meta and (plan is None or not plan.tensors):
                dense = torch.empty_like(matrix, device=self._device)
                _replace(owner, matrix, dense)
                matrix = dense
            if plan is not None:
                plans[storage_of(matrix)] = plan
        return plans


class NextTokens:
    """The tensors mtp.* of a checkpoint, of a layer that guesses further tokens, left there until they are asked for.

    Args:
        checkpoint: see read_weights.
        names: of the tensors.
        path: what errors name.
    """

    def __init__(self, checkpoint, names: Sequence[str], path: Path | str):
        self._checkpoint, self._names, self._path = checkpoint, names, path

    @classmethod
    def of(cls, checkpoint, path: Path | str) -> NextTokens | None:
        """Those of a checkpoint; None if it has none."""
        names = [name for name in checkpoint.shapes if name.startswith(NEXT_TOKENS)]
        return cls(checkpoint, names, path) if names else None

    def fill(self, places: Mapping[str, Tensor]) -> None:
        """Copies all of them to their places, by what follows mtp. in their names.

        Raises:
            ValueError: one is missing, unknown, of another shape, or holds NaN or infinity.
        """
        expected = {NEXT_TOKENS + name: tuple(place.shape) for name, place in places.items()}
        if missing := sorted(expected.keys() - set(self._names)):
            raise ValueError(f"{self._path} has no tensor {', '.join(missing[:5])}")
        for name in self._names:
            if (shape := self._checkpoint.shapes[name]) != expected.get(name):
                wanted = f"must have shape {expected[name]}" if name in expected else "must not be there"
                raise ValueError(f"{self._path}: tensor {name} {wanted}, got {shape}")
        for name, place in places.items():
            _fill(place, self._checkpoint.blocks(NEXT_TOKENS + name), f"{self._path}: tensor {NEXT_TOKENS}{name}")
            self._checkpoint.release(NEXT_TOKENS + name)


def _replace(owner: NativeWeights | NativeLayer, old: Matrix, new: Matrix) -> None:
    """Puts a matrix in the place of another, under all names that it has."""
    for name in owner.MATRICES:
        if getattr(owner, name) is old:
            setattr(owner, name, new)


def _fill(place: torch.Tensor, blocks: Iterable[tuple[torch.Tensor, torch.Tensor]], tensor: str) -> None:
    """Writes the values of a tensor, by rows, to its place."""
    for rows, values in blocks:
        place[rows] = values.to(place.device, dtype=place.dtype)
        # a sum is finite only where all values are, and far quicker; fp16 can overflow on the way
        is_sure = values.sum().isfinite() and place.dtype != torch.float16
        if not is_sure and not place[rows].isfinite().all():
            raise ValueError(f"{tensor} has values that are NaN or infinite in {place.dtype}")


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


def _check_tensors(weights_class: type[NativeWeights], checkpoint, config, path: Path | str) -> None:
    """Raises ValueError naming the tensors that are missing, have another shape or are unknown."""
    shapes = checkpoint.shapes
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
        elif not name.startswith(NEXT_TOKENS) and not name.endswith(
            ("rotary_emb.inv_freq", "lm_head.weight")
        ):  # computed, or tied to another
            if name.endswith(".bias") and not any(values.any() for _, values in checkpoint.blocks(name)):
                continue  # quantisers give one to every matrix
            raise ValueError(f"{path} has tensor {name}, which a model of its architecture does not have")
