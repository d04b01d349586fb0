"""Quantised folders: matrices that GPTQ, AWQ, compressed-tensors and others keep in several tensors, read as one.

A matrix is taken for quantised where its tensors are there, so layers that were left out need no list of names. What
the tensors say is in quantisation_methods.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.checkpoints.huggingface import read_json
from pyspec.checkpoints.quantisation_methods import METHODS, Method, Module
from pyspec.entries import Entries
from pyspec.ops.weight_formats import Codes

__all__ = ["QuantisedCheckpoint", "quantisation_of"]


def quantisation_of(source: Path | str, description: dict) -> Method | None:
    """The method that a config.json, or the quantize_config.json of early GPTQ folders, says; None without one.

    Raises:
        Unsupported: it is none of METHODS, or a variant that none of them reads.
        ValueError: an entry is missing, or is no such entry.
    """
    text = description.get("text_config")
    for place in (description, text if isinstance(text, dict) else {}):
        if place.get("quantization_config"):
            return _method(source, Entries(f"{source}: config.json", place).part("quantization_config"))
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
    """The tensors of a quantised folder: `shapes` of all, and `blocks` or `codes` of one, by the names of matrices.

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
            if name.endswith(method.mark):
                module = Module(checkpoint, name.removesuffix(method.mark), path)
                self._modules[module.name + method.matrix] = module
        parts = {module.name + part for module in self._modules.values() for part in method.parts}
        self.shapes = {
            name: shape
            for name, shape in checkpoint.shapes.items()
            if name not in parts and not name.endswith((".k_scale", ".v_scale", ".input_scale"))  # of caches in fp8
        }
        self.shapes |= {name: method.shape(module) for name, module in self._modules.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values, fp32 where they are of a quantised matrix."""
        if name not in self._modules:
            yield from self._checkpoint.blocks(name)
            return
        found = self._method.read(self._modules[name])
        yield slice(None), (found.values() if isinstance(found, Codes) else found).view(self.shapes[name])

    def codes(self, name: str) -> Codes | None:
        """A matrix in the bits that it has in the folder; None where it has floats, or no format has these values.

        Of the latter a warning says which is the first.
        """
        if name not in self._modules:
            return None
        if isinstance(found := self._method.read(self._modules[name]), Codes):
            return found
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{self._path}: {name}, and maybe others, has values that none of our formats in few bits has (8-bit "
                "floats, groups in no order as of desc_act, or scales out of fp16's range): it becomes bfloat16",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
