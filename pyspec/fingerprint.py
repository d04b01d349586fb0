"""Fingerprints: what names a model in files that hold what was computed with it, such as caches and drafters' tables.

Two fine-tunes of one shape are two models, so a fingerprint is of a sample of the weights too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from pyspec.ops.lay_out import StoredCodes, StoredMatrix

ROWS, COLUMNS = 64, 64  # of a tensor that are sampled; smaller ones are taken whole


class WeightSample:
    """A digest of some values of every tensor, rounded to bfloat16: a model has one in whatever it is kept in."""

    def __init__(self):
        self._digest = hashlib.sha256()

    def add(self, named: Iterable[tuple[str, Tensor | StoredMatrix | StoredCodes]]) -> WeightSample:
        """Takes in tensors with their names; their order counts."""
        for name, tensor in named:
            self._digest.update(f"{name} {list(tensor.shape)}".encode())
            if isinstance(tensor, StoredCodes):
                tensor = tensor.rows(_sampled_rows(tensor.outputs)).values()
            elif isinstance(tensor, StoredMatrix):
                tensor = tensor.rows(_sampled_rows(tensor.outputs)).columns(-(-tensor.inputs // COLUMNS))
            if tensor.numel() and not tensor.is_meta:
                self._digest.update(_sample(tensor.detach()).numpy().tobytes())
        return self

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _sampled_rows(rows: int) -> slice:
    return slice(None, None, -(-rows // ROWS))


def _sample(tensor: Tensor) -> Tensor:
    """Values of rows and columns that lie evenly, as integers of their bits."""
    matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor[_sampled_rows(len(tensor))].flatten(1)
    columns = COLUMNS if tensor.dim() > 1 else ROWS * COLUMNS
    values = matrix[:, :: -(-matrix.shape[1] // columns)].cpu().contiguous()
    if values.dtype.is_floating_point and values.element_size() > 1:
        return values.bfloat16().view(torch.int16)
    return values.view(torch.uint8)


def fingerprint_of(architecture: str, description: str, weights: str) -> str:
    """The name of a model: its architecture, and a hash of its shape, its vocabulary and a sample of its weights."""
    return f"{architecture}-{hashlib.sha256((description + weights).encode()).hexdigest()[:16]}"
