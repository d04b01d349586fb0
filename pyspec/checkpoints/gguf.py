"""Reads GGUF files: metadata, and tensors under the names of Hugging Face, by blocks of values or as they lie."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyspec.architectures import FAMILIES, NEXT_TOKENS, Family, Unsupported
from pyspec.checkpoints.rare_types import RARE_TYPES, write_codes
from pyspec.entries import Entries
from pyspec.machine.mapped import map_file, release_pages
from pyspec.ops.lay_out import STORED_KINDS, StoredCodes, StoredMatrix
from pyspec.ops.weight_formats import GGUF_KINDS, join_codes

__all__ = ["GGUFCheckpoint", "GGUFFile", "read_gguf_config"]

BLOCK_ELEMENTS = 2**22  # dequantised at a time, so that the fp32 values of a large tensor never exist together

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Tensors that are no weights of a text model: frequencies, and what reads images and sound in files of Ollama.
_NOT_READ = re.compile(r"rope_f|blk\.\d+\.attn_rot_embd\.|(v|a|mm)\.")


@dataclass(frozen=True)
class _TensorInfo:
    path: Path  # of the part that it is in
    data: mmap.mmap
    shape: tuple[int, ...]  # outermost first, as in torch
    kind: int  # ggml type
    offset: int
    bytes: int

    def parts(self, name: str) -> Iterator[tuple[str, _TensorInfo]]:
        """The matrices of a tensor [experts, outputs, inputs], which get a number each: NAME.3.weight; others whole."""
        if len(self.shape) != 3 or not self.shape[0]:
            yield name, self
            return
        stem, _, suffix = name.rpartition(".")
        size = self.bytes // self.shape[0]
        for number in range(self.shape[0]):
            part = replace(self, shape=self.shape[1:], offset=self.offset + number * size, bytes=size)
            yield f"{stem}.{number}.{suffix}", part


class GGUFFile:
    """A GGUF file, or all parts of a split one: `metadata`, a dict of plain values, and `shapes` of tensors by name.

    Args:
        path: of the file, or of any of the parts NAME-00001-of-00003.gguf; all must lie in its folder.

    Raises:
        ValueError: not a GGUF file, a version other than 2 and 3, a truncated file or an unknown tensor type; a part is
            missing, or belongs to another model.
    """

    def __init__(self, path: Path):
        self.path = path
        parts = _parts(_Part(path))
        self.metadata = parts[0].metadata
        self._tensors: dict[str, _TensorInfo] = {}
        for part in parts:
            if again := part.tensors.keys() & self._tensors.keys():
                raise ValueError(f"{part.path} has tensor {min(again)}, which another part has too")
            self._tensors |= part.tensors
        count = len(self._tensors)
        stated = Entries(str(path), self.metadata, noun="metadata ").whole("split.tensors.count", count, least=0)
        if len(parts) > 1 and stated != count:
            raise ValueError(f"{path} and the other parts have {count} tensors, split.tensors.count is {stated}")
        self._tensors = {name: part for whole, info in self._tensors.items() for name, part in info.parts(whole)}

    @property
    def is_quantised(self) -> bool:
        """Whether a matrix has a type that keeps its bits, see `stored`."""
        matrices = (name for name, shape in self.shapes.items() if len(shape) == 2)
        return any(self._kind(name) in GGUF_KINDS or self._is_rare(name) for name in matrices)

    @property
    def rare(self) -> dict[str, int]:
        """How many matrices there are of each type of RARE_TYPES, which are written in other formats."""
        matrices = (name for name, shape in self.shapes.items() if len(shape) == 2)
        return Counter(self._kind(name) for name in matrices if self._is_rare(name))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._tensors.items()}

    def rows(self, name: str) -> Iterator[Tensor]:
        """The fp32 values of a tensor: blocks of rows (of elements for a vector), in order."""
        is_vector = len(self._tensors[name].shape) == 1
        for _, values in self._rows(name):
            yield values.view(-1) if is_vector else values

    def _rows(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Bytes and fp32 values of blocks of rows."""
        gguf = _gguf()
        info = self._tensors[name]
        kind, width = gguf.GGMLQuantizationType(info.kind), info.shape[-1]
        data = torch.frombuffer(info.data, dtype=torch.uint8, count=info.bytes, offset=info.offset)
        data = data.view(math.prod(info.shape[:-1]), -1)
        for part in data.split(max(1, BLOCK_ELEMENTS // width)):
            values = gguf.quants.dequantize(part.numpy().view(_storage(kind, gguf)), kind)
            yield part, torch.from_numpy(np.ascontiguousarray(values, np.float32)).view(-1, width)

    def stored(self, name: str) -> StoredMatrix | StoredCodes | None:
        """A matrix in the bytes of the file, or in the nearest format to its type; None for other tensors."""
        info = self._tensors[name]
        kind = self._kind(name)
        if len(info.shape) == 2 and self._is_rare(name):
            return StoredCodes(
                RARE_TYPES[kind].format,
                *info.shape,
                lambda: join_codes([write_codes(kind, data, values) for data, values in self._rows(name)]),
                lambda: torch.cat(list(self.rows(name))),
            )
        kind = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}.get(kind, kind)
        if kind not in STORED_KINDS or len(info.shape) != 2:
            return None
        data = torch.frombuffer(info.data, dtype=torch.uint8, count=info.bytes, offset=info.offset)
        return StoredMatrix(kind, data, *info.shape)

    def release(self, name: str) -> None:
        """Says that a tensor is done with: its pages leave memory."""
        info = self._tensors[name]
        release_pages(info.data, info.offset, info.bytes)

    def _is_rare(self, name: str) -> bool:
        """Whether a matrix has one of RARE_TYPES; these take whole blocks of their format."""
        return self._kind(name) in RARE_TYPES and self._tensors[name].shape[-1] % 256 == 0

    def _kind(self, name: str) -> str:
        return _gguf().GGMLQuantizationType(self._tensors[name].kind).name.lower()


def read_gguf_config(file: GGUFFile) -> tuple[Family, Any]:
    """The family of the model in a GGUF file, and its configuration.

    Raises:
        Unsupported: no family has the architecture, or its runner lacks a feature.
        ValueError: metadata is missing, or is not what it should be.
    """
    found = file.metadata.get("general.architecture")
    if found == "llama" and file.metadata.get("llama.expert_count"):
        found = "mixtral"  # which llama.cpp does not tell from llama
    families = {name: family for family in FAMILIES.values() if family.gguf for name in family.gguf.architectures}
    if not isinstance(found, str) or found not in families:
        raise Unsupported(
            f"{file.path} has architecture {found!r}, supported in GGUF files are {', '.join(sorted(families))}"
        )
    prefix = f"{file.metadata['general.architecture']}."
    entries = Entries(str(file.path), file.metadata, prefix=prefix, noun="metadata ")
    return families[found], families[found].gguf.read(file, entries)


class GGUFCheckpoint:
    """The tensors of a GGUF file under their Hugging Face names: `shapes` of all; one in `blocks`, or as `stored`."""

    def __init__(self, file: GGUFFile, family: Family, config):
        self._file, self._family, self._config = file, family, config
        self._names = {self._hugging_face_name(name): name for name in file.shapes if not _NOT_READ.match(name)}
        self.shapes = {name: self._shape(original) for name, original in self._names.items()}

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers and the fp32 values of these rows."""
        if (restore := self._restore(self._names[name])) is not None:
            yield slice(None), restore(torch.cat(list(self._file.rows(self._names[name]))))
            return
        order, start = self._order(name), 0
        order = torch.arange(self.shapes[name][0], device="cpu") if order is None else order
        for values in self._file.rows(self._names[name]):
            yield order[start : start + len(values)], values
            start += len(values)

    def stored(self, name: str) -> StoredMatrix | StoredCodes | None:
        """The matrix as it lies in the file, see GGUFFile.stored."""
        if self._restore(self._names[name]) is not None:
            return None
        stored, order = self._file.stored(self._names[name]), self._order(name)
        return stored if stored is None or order is None else stored.ordered(order.argsort())

    def release(self, name: str) -> None:
        self._file.release(self._names[name])

    def _order(self, name: str) -> Tensor | None:
        """Which row of the model each row of a tensor in the file is; None where it is the same."""
        return self._family.gguf.row_order(self._config, _parts_of(self._names[name])[1], self.shapes[name][0])

    def _restore(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What makes of a tensor of the file that of the checkpoint, whole; None where its rows are the same."""
        return self._family.gguf.restored.get(re.sub(r"^blk\.\d+\.", "", name))

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, restore = self._file.shapes[name], self._restore(name)
        return shape if restore is None else tuple(restore(torch.empty(shape, device="meta")).shape)

    def _hugging_face_name(self, name: str) -> str:
        layer, stem, kind = _parts_of(name)
        tensors, whole = self._family.gguf.tensors, f"{stem}.{kind}".rstrip(".")
        if whole in tensors:
            found = tensors[whole]
        elif stem in tensors:
            found = f"{tensors[stem].replace('*.', '')}.{kind}"  # a vector of all experts, such as their biases
        else:
            stem, dot, number = stem.partition(".")  # of an expert
            stem = tensors.get(stem, stem)
            found = stem.replace("*", number) if "*" in stem else stem + dot + number
            found = f"{found}.{kind}" if kind else found
        if layer is None:
            return found
        if (further := int(layer) - self._config.layers) >= 0:  # of what guesses further tokens
            return NEXT_TOKENS + (found if stem.startswith("nextn.") else f"layers.{further}.{found}")
        return f"{self._family.weights.LAYERS}{layer}.{found}"


def _parts_of(name: str) -> tuple[str | None, str, str]:
    """The layer's number or None, the tensor's own name, and "weight" or "bias", or nothing where it has neither."""
    layer, name = match.groups() if (match := re.fullmatch(r"blk\.(\d+)\.(.*)", name)) else (None, name)
    stem, _, kind = name.rpartition(".")
    return (layer, stem, kind) if stem else (layer, name, "")


def _parts(part: _Part) -> list[_Part]:
    """All parts of the model that a part is of, in order."""
    count = Entries(str(part.path), part.metadata, noun="metadata ").whole("split.count", 1, least=0)
    if count <= 1:
        return [part]
    named = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", part.path.name, re.IGNORECASE)
    if named is None or int(named[3]) != count:
        raise ValueError(
            f"{part.path} is one of {count} parts by its split.count, so its name must end in "
            f"-00001-of-{count:05}.gguf, or another number"
        )
    parts = []
    for number in range(1, count + 1):
        path = part.path.with_name(f"{named[1]}-{number:05}-of-{count:05}{part.path.suffix}")
        if not path.is_file():
            raise ValueError(f"{part.path} is one of {count} parts, of which {path.name} is missing")
        other = part if path == part.path else _Part(path)
        for key, expected in (
            ("split.count", count),
            ("split.no", number - 1),
            ("split.tensors.count", part.metadata.get("split.tensors.count")),
        ):
            if (found := other.metadata.get(key)) != expected:
                raise ValueError(f"{path} is not part {number} of the same model: its {key} is {found}, not {expected}")
        parts.append(other)
    return parts


class _Part:
    """One file: its `metadata`, and its `tensors` by name."""

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
        self._data = map_file(path)
        self._at = 4
        try:
            self._read_header()
        except (struct.error, LookupError, OverflowError, TypeError, RecursionError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or corrupt: its header cannot be read ({error})") from None

    def _read_header(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"{self.path} has GGUF version {version}, supported are 2 and 3 (little-endian)")
        tensors, entries = self._scalar("Q"), self._scalar("Q")
        self.metadata = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        described = [self._tensor_description() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"{self.path} is corrupt: its general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.tensors = {}
        for name, shape, kind, offset in described:
            info = _TensorInfo(self.path, self._data, shape, kind, start + offset, self._size(name, shape, kind))
            if info.offset + info.bytes > len(self._data):
                raise ValueError(
                    f"{self.path} is truncated: tensor {name} ends at byte {info.offset + info.bytes}, "
                    f"the file has {len(self._data)}"
                )
            self.tensors[name] = info

    def _tensor_description(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        shape = tuple(self._scalar("Q") for _ in range(self._scalar("I")))
        return name, shape[::-1], self._scalar("I"), self._scalar("Q")

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        gguf = _gguf()
        try:
            block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"{self.path}: tensor {name} has an unknown type {kind}") from None
        if not _can_read(kind):
            kind = gguf.GGMLQuantizationType(kind).name
            raise ValueError(f"{self.path}: tensor {name} has type {kind}, which the package gguf cannot dequantise")
        elements = int(np.prod(shape, dtype=np.float64))
        if not shape or shape[-1] % block:
            raise ValueError(f"{self.path} is corrupt: tensor {name} of shape {shape} is no multiple of {block}")
        return elements // block * block_bytes

    def _scalar(self, code: str):
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._data):
            raise IndexError(f"a string of {length} bytes at byte {self._at}")
        self._at += length
        return self._data[self._at - length : self._at].decode()

    def _strings(self, count: int) -> list[str]:
        """As many strings as a vocabulary has: without a call for each."""
        found, data, at, end = [], self._data, self._at, len(self._data)
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = length_at(data, at)
            start, at = at + 8, at + 8 + length
            if at > end:
                raise IndexError(f"a string of {length} bytes at byte {start}")
            found.append(data[start:at].decode())
        self._at = at
        return found

    def _value(self, kind: int):
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in (_STRING, _ARRAY):
            if length > len(self._data):
                raise IndexError(f"an array of {length} values at byte {self._at}")
            if kind == _STRING:
                return self._strings(length)
            return [self._value(kind) for _ in range(length)]
        size = struct.calcsize("<" + _SCALARS[kind])
        if self._at + size * length > len(self._data):
            raise IndexError(f"an array of {length} values at byte {self._at}")
        values = list(struct.unpack_from(f"<{length}{_SCALARS[kind]}", self._data, self._at))
        self._at += size * length
        return values


def _gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files need the package gguf: pip install pyspec-kernels[hf]") from None
    return gguf


@cache
def _can_read(kind: int) -> bool:
    """Whether gguf dequantises a type, as it does all but those of integers, of doubles, and of activations."""
    gguf = _gguf()
    kind = gguf.GGMLQuantizationType(kind)
    try:
        gguf.quants.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8).view(_storage(kind, gguf)), kind)
    except NotImplementedError:
        return False
    return True


def _storage(kind, gguf) -> type:
    """The element type in which gguf's dequantize expects plain floats; bytes for everything else."""
    kinds = gguf.GGMLQuantizationType
    return {kinds.F32: np.float32, kinds.F16: np.float16}.get(kind, np.uint8)
