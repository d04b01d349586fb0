"""Reads safetensors files: tensors are views of the mapped file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from pyspec.machine.mapped import map_file, release_pages

__all__ = ["DTYPES", "SafetensorsFile"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"}
DTYPES |= {f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)} | {"U8": "uint8"}
DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


class SafetensorsFile:
    """A file: `shapes` of its tensors by name, and its `metadata`.

    Raises:
        ValueError: it is truncated or corrupt.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._data = map_file(path)
            size = int.from_bytes(self._data[:8], "little")
            if len(self._data) < 8 + size:
                raise ValueError(f"its header has {size} bytes, the file {len(self._data)}")
            header = json.loads(self._data[8 : 8 + size])
            self.metadata = header.pop("__metadata__", {})
            self._places = {name: self._place(8 + size, entry) for name, entry in header.items()}
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise ValueError(f"{path} is truncated or corrupt: {error}") from None
        self.shapes = {name: shape for name, (_, shape, _, _) in self._places.items()}

    def tensor(self, name: str) -> Tensor:
        """A tensor; who writes to it changes a copy of its page, not the file."""
        dtype, shape, start, size = self._places[name]
        if not size:
            return torch.empty(shape, dtype=dtype, device="cpu")
        count = size // dtype.itemsize
        return torch.frombuffer(self._data, dtype=dtype, count=count, offset=start).view(shape)

    def release(self, name: str) -> None:
        """Says that a tensor is done with: its pages leave memory."""
        release_pages(self._data, *self._places[name][2:])

    def _place(self, data: int, entry: dict) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        """dtype, shape, first byte and bytes of a tensor."""
        dtype = getattr(torch, DTYPES[entry["dtype"]])
        shape = tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if any(not isinstance(size, int) or size < 0 for size in shape):
            raise ValueError(f"a tensor has shape {shape}")
        if not 0 <= start <= end <= len(self._data) - data:
            raise ValueError(f"a tensor ends at byte {data + end}, the file has {len(self._data)}")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"a tensor of {dtype} {shape} has {end - start} bytes")
        return dtype, shape, data + start, end - start
