"""Quantised folders: matrices that GPTQ, AWQ, compressed-tensors and others keep in several tensors, read as one.

A matrix is taken for quantised where its tensors are there, so layers that were left out need no list of names. What
the tensors say is in quantisation_methods.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.checkpoints.huggingface import read_json
from pyspec.checkpoints.quantisation_methods import METHODS, Method
from pyspec.entries import Entries
from pyspec.ops.lay_out import StoredCodes, StoredMatrix
from pyspec.ops.weight_formats import Codes

__all__ = ["Module", "QuantisedCheckpoint", "quantisation_of"]

# Scales of what is computed, and of caches, which are not rounded here.
_OF_ACTIVATIONS = (
    ".input_scale",
    ".activation_scale",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
    ".kv_scale",
)


def quantisation_of(source: Path | str, description: dict) -> Method | None:
    """The method that a config.json, or the quantize_config.json of early GPTQ folders, says; None without one.

    Raises:
        Unsupported: it is none of METHODS, or a variant that none of them reads.
        ValueError: an entry is missing, or is no such entry.
    """
    text = description.get("text_config")
    for place in (description, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config"):  # compressed-tensors' first name for it
            if place.get(key):
                return _method(source, Entries(f"{source}: config.json", place).part(key))
    if (file := Path(source) / "quantize_config.json").is_file():
        return _method(source, Entries(str(file), read_json(file), {"quant_method": "gptq"}))
    return None


def _method(source: Path | str, entries: Entries) -> Method:
    name = entries.text("quant_method")
    if name not in METHODS:
        raise Unsupported(
            f"{source} is quantised by {name}, which pyspec does not read; it reads folders of {', '.join(METHODS)}, "
            'GGUF files, and folders in bfloat16, which dtype="int4" or int8 rounds'
        )
    return METHODS[name](source, entries)


class QuantisedCheckpoint:
    """The tensors of a quantised folder: `shapes` of all; `blocks` of one, or what is `stored`.

    Args:
        checkpoint: with the tensors that the folder has, a SafetensorsCheckpoint or TensorCheckpoint.
        method: of `quantisation_of`.
        path: what errors name.

    Raises:
        ValueError: a matrix lacks one of its tensors, or one does not have the shape that the others say.
    """

    def __init__(self, checkpoint, method: Method, path: Path | str):
        self._checkpoint, self._method, self._path, self._has_warned = checkpoint, method, path, False
        self._modules = {}
        for name in checkpoint.shapes:
            if mark := next((mark for mark in method.marks if name.endswith(mark)), None):
                module = Module(checkpoint, name.removesuffix(mark), path)
                self._modules[module.name + method.matrix] = module
        parts = {module.name + part for module in self._modules.values() for part in method.parts}
        self.shapes = {
            name: shape
            for name, shape in checkpoint.shapes.items()
            if name not in parts and not name.endswith(_OF_ACTIVATIONS)
        }
        self.shapes |= {name: method.shape(module) for name, module in self._modules.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values, fp32 where they are of a quantised matrix."""
        if name not in self._modules:
            yield from self._checkpoint.blocks(name)
            return
        found = self._method.read(self._modules[name])
        yield slice(None), (found.values() if isinstance(found, Codes) else found).view(self.shapes[name])

    def stored(self, name: str) -> StoredMatrix | StoredCodes | None:
        """A matrix as it lies in the folder; None for tensors that are none, and where no format has these values.

        Of the latter a warning says which is the first.
        """
        if name not in self._modules:
            return self._checkpoint.stored(name)
        module, shape = self._modules[name], self.shapes[name]
        kind, order = self._method.format(module)
        if kind is not None:
            read = partial(self._method.read, module)
            return StoredCodes(kind, math.prod(shape[:-1]), shape[-1], read, column_order=order)
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._path}: {name}, and maybe others, has values that none of our formats in few bits has (8-bit "
                "floats, 8 bits with zero points, groups of fewer than 32, or scales out of fp16's range): it becomes "
                "floats",
                RuntimeWarning,
                stacklevel=2,
            )
        return None

    def release(self, name: str) -> None:
        """Says that a tensor is done with: its pages leave memory."""
        if name in self._modules:
            self._modules[name].release((*self._method.parts, self._method.matrix))
        else:
            self._checkpoint.release(name)


class Module:
    """The tensors of one matrix, whose names begin with `name`."""

    def __init__(self, checkpoint, name: str, path: Path | str):
        self._checkpoint, self.name, self._path = checkpoint, name, path

    def __contains__(self, part: str) -> bool:
        return self.name + part in self._checkpoint.shapes

    def shape(self, part: str, dimensions: int = 2) -> tuple[int, ...]:
        if part not in self:
            raise ValueError(f"{self._path} has no tensor {self.name + part}")
        shape = self._checkpoint.shapes[self.name + part]
        if len(shape) != dimensions or not all(shape):
            raise self.wrong(part, f"have {dimensions} dimensions and not be empty", shape)
        return shape

    def expect(self, part: str, *shapes: tuple[int, ...]) -> None:
        """Raises ValueError where a part is missing or has none of the shapes."""
        if (shape := self.shape(part, len(shapes[0]))) not in shapes:
            raise self.wrong(part, f"have shape {' or '.join(map(str, shapes))}", shape)

    def tensor(self, part: str, *dtypes: torch.dtype) -> Tensor:
        """A part, of one of the dtypes; floats of 16 bits or more must be finite."""
        parts = [values for _, values in self._checkpoint.blocks(self.name + part)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts)
        if found.dtype not in dtypes:
            raise self.wrong(part, f"have dtype {' or '.join(map(str, dtypes))}", found.dtype)
        if found.dtype.is_floating_point and found.element_size() > 1 and not found.isfinite().all():
            raise ValueError(f"{self._path}: tensor {self.name + part} has values that are NaN or infinite")
        return found

    def groups(self, part: str, inputs: int, groups: int) -> Tensor:
        """The group of each input, int64, by a part that may be missing or never have been set: they are even then."""
        even = torch.arange(inputs, device="cpu") // -(-inputs // groups)
        if part not in self:
            return even
        self.expect(part, (inputs,))
        stated = self.tensor(part, torch.int32, torch.int64).long()
        if (stated <= 0).all():
            return even
        if stated.min() < 0 or stated.max() >= groups:
            raise self.wrong(part, f"be in [0, {groups})", [stated.min().item(), stated.max().item()])
        return stated

    def release(self, parts: tuple[str, ...]) -> None:
        for part in parts:
            if part in self:
                self._checkpoint.release(self.name + part)

    def wrong(self, part: str, expected: str, found) -> ValueError:
        return ValueError(f"{self._path}: tensor {self.name + part} must {expected}, got {found}")
