"""Where each matrix of a checkpoint will lie: known from names, shapes and formats alone, before memory is taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from pyspec.architectures.weights import NativeLayer, NativeWeights
from pyspec.ops.expert_linear import ExpertWeight, JoinedExperts
from pyspec.ops.lay_out import CPU, StoredCodes, StoredMatrix, empty_weight, is_same_order, laid_out_shape, lay_out
from pyspec.ops.linear import JoinedWeight, LinearWeight
from pyspec.ops.weight_formats import FORMATS

__all__ = ["MatrixPlan", "plan_matrices"]


@dataclass
class MatrixPlan:
    """A matrix of a model.

    Attributes:
        owner: what has it: a layer, or the weights.
        name: of the attribute.
        inputs: its columns.
        parts: format, as laid_out_shape takes it, and outputs of its parts, one below another; of each expert.
        experts: how many there are where it is [experts, outputs, inputs], else None.
        tensors: of the checkpoint, by name: their first outputs. Empty where they are not whole rows, in order: such a
            matrix is filled in dense and laid out then.
        loses_bits: whether one of them had fewer bits, which were to be kept.
        column_order: of the weight, see LinearWeight.order.
        device: where it will lie.
    """

    owner: NativeLayer | NativeWeights
    name: str
    inputs: int
    parts: list[tuple[str, int]]
    experts: int | None
    tensors: dict[str, int]
    loses_bits: bool = False
    column_order: Tensor | None = None
    device: torch.device = CPU
    _places: list[list[LinearWeight]] = field(default_factory=list)  # of each expert the parts
    weight: LinearWeight | None = None

    @property
    def nbytes(self) -> int:
        return (self.experts or 1) * sum(map(self._bytes, self.parts))

    def take(self, data: Tensor) -> None:
        """Takes memory, uint8 [nbytes] of zeros; `weight` is then to be filled by `write`."""
        if self.column_order is not None:
            self.column_order = self.column_order.to(self.device)
        experts, sizes = self.experts or 1, [self._bytes(part) for part in self.parts]
        pieces = [piece.chunk(experts) for piece in data.split([experts * size for size in sizes])]
        self._places = [
            [
                empty_weight(*part, self.inputs, piece, self.column_order)
                for part, piece in zip(self.parts, own, strict=True)
            ]
            for own in zip(*pieces, strict=True)
        ]
        first, several = self._places[0][0], {}
        outputs = sum(outputs for _, outputs in self.parts)
        if len(self.parts) > 1:
            several = {"parts": tuple((FORMATS[format], outputs) for format, outputs in self.parts)}
        if self.experts is None:
            self.weight = first
            if several:
                self.weight = JoinedWeight(data, outputs, self.inputs, order=self.column_order, **several)
        elif several:
            self.weight = JoinedExperts(data, outputs, self.inputs, **several, experts=experts)
        else:
            stacked = data.view(first.data.dtype).view(-1, *first.data.shape[1:])
            self.weight = ExpertWeight(stacked, outputs, self.inputs, first.format, experts=experts)

    def write(self, tensor: str, matrix: StoredMatrix | StoredCodes) -> None:
        """Lays out a tensor of the checkpoint.

        Raises:
            ValueError: a value is NaN, infinite or too large for the format.
        """
        expert, first = divmod(self.tensors[tensor], sum(outputs for _, outputs in self.parts))
        for weight in self._places[expert]:
            if first < weight.outputs:
                return lay_out(weight, first, matrix)
            first -= weight.outputs

    def _bytes(self, part: tuple[str, int]) -> int:
        dtype, shape = laid_out_shape(*part, self.inputs, self.device)
        return math.prod(shape) * dtype.itemsize


def plan_matrices(
    weights: NativeWeights,
    config,
    checkpoint,
    dtype: torch.dtype | str,
    *,
    keeps_bits: bool,
    device: torch.device = CPU,
) -> dict[int, MatrixPlan]:
    """Plans of the matrices of weights that are on "meta", by `storage_of` them, in the order of a step.

    Args:
        weights: the blank model.
        config: its shape.
        checkpoint: see read_weights.
        dtype: that matrices are laid out in where they do not keep the bits of the checkpoint: of floats, int8, "int4".
        keeps_bits: whether they do where the checkpoint has them in fewer than 16 bits.
        device: where they will lie.
    """
    places: dict[int, dict[str, Tensor]] = {}
    for name, place in weights.named(config).items():
        if place.is_meta:
            places.setdefault(storage_of(place), {})[name] = place
    format = "int4_32" if dtype == "int4" else str(dtype).removeprefix("torch.")
    plans = {}
    for owner, name in (*weights.in_order(), (weights, "embedding")):
        matrix = getattr(owner, name)
        if not matrix.is_meta or (key := storage_of(matrix)) in plans:
            continue
        *experts, outputs, inputs = matrix.shape
        tensors = {} if name in owner.REORDERED else _whole_rows(places[key], matrix)
        stored = {tensor: checkpoint.stored(tensor) for tensor in tensors}
        if None in stored.values():
            tensors = {}
        parts = [(format, outputs)]
        is_kept = keeps_bits or name == "embedding" and weights.embedding is not weights.head
        has_bits = [found.kind in FORMATS for found in stored.values()] if tensors else []
        column_order = None
        if is_kept and has_bits and all(has_bits):
            if (kept := _kept(stored, tensors, outputs, bool(experts))) is not None:
                (parts, column_order), has_bits = kept, []
        elif name == "embedding" and weights.embedding is not weights.head:
            continue  # it is read by rows alone, as it is
        count, loses_bits = experts[0] if experts else None, is_kept and any(has_bits)
        plans[key] = MatrixPlan(owner, name, inputs, parts, count, tensors, loses_bits, column_order, device)
    return plans


def _kept(
    stored: dict[str, StoredMatrix | StoredCodes], firsts: dict[str, int], outputs: int, is_stacked: bool
) -> tuple[list[tuple[str, int]], Tensor | None] | None:
    """Formats and outputs of a matrix, or of each of several experts, and the order of its columns.

    None where experts differ, or parts of one matrix have their columns in several orders.
    """
    orders = [getattr(found, "column_order", None) for found in stored.values()]
    if not all(is_same_order(order, None if is_stacked else orders[0]) for order in orders):
        return None
    experts: dict[int, list[StoredMatrix | StoredCodes]] = {}
    for tensor, found in stored.items():
        experts.setdefault(firsts[tensor] // outputs, []).append(found)
    parts = [
        [(kind, sum(found.outputs for found in group)) for kind, group in groupby(own, lambda found: found.kind)]
        for own in experts.values()
    ]
    return (parts[0], orders[0]) if all(own == parts[0] for own in parts) else None


def storage_of(tensor: Tensor) -> int:
    """What a tensor and its views have in common."""
    return tensor.untyped_storage()._cdata


def _whole_rows(places: dict[str, Tensor], matrix: Tensor) -> dict[str, int]:
    """The first row of each view of a matrix, ascending; nothing where they are not all its rows."""
    inputs = matrix.shape[-1]
    if any(place.shape[1:] != (inputs,) or not place.is_contiguous() for place in places.values()):
        return {}
    firsts = {name: place.storage_offset() // inputs for name, place in places.items()}
    firsts = dict(sorted(firsts.items(), key=lambda item: item[1]))
    return firsts if sum(map(len, places.values())) * inputs == matrix.numel() else {}
