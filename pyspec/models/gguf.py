"""Reads GGUF files: metadata, and tensors dequantised block by block."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyspec.models.llama_weights import LlamaConfig, RopeScaling, Unsupported

__all__ = ["ARCHITECTURES", "GGUFCheckpoint", "GGUFFile", "llama_config"]

ARCHITECTURES = ("llama", "mistral", "qwen2")
BLOCK_ELEMENTS = 2**22  # dequantised at a time, so that the fp32 values of a large tensor never exist together

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_NAMES = {  # of a layer's tensors, in GGUF and in Hugging Face checkpoints
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class _TensorInfo:
    shape: tuple[int, ...]  # outermost first, as in torch
    kind: int  # ggml type
    offset: int
    bytes: int


class GGUFFile:
    """A GGUF file: `metadata`, a dict of plain Python values, and `shapes` of tensors by name.

    Raises:
        ValueError: not a GGUF file, a version other than 2 and 3, a truncated file or an unknown tensor type.
    """

    def __init__(self, path: Path):
        self.path = path
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ValueError(f"{path} is not a GGUF file: it does not begin with 'GGUF'")
            # private and writable, because torch wants writable arrays; pages are shared as long as nobody writes
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self._at = 4
        try:
            self._read_header()
        except (struct.error, LookupError, OverflowError, TypeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is truncated or corrupt: its header cannot be read ({error})") from None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self._tensors.items()}

    def rows(self, name: str) -> Iterator[Tensor]:
        """The fp32 values of a tensor: blocks of rows (of elements for a vector), in order."""
        gguf = _gguf()
        info = self._tensors[name]
        kind = gguf.GGMLQuantizationType(info.kind)
        width = info.shape[-1]
        height = int(np.prod(info.shape[:-1], dtype=np.int64))
        data = np.frombuffer(self._data, np.uint8, info.bytes, info.offset).reshape(height, -1)
        step = max(1, BLOCK_ELEMENTS // width)
        for start in range(0, height, step):
            try:
                values = gguf.quants.dequantize(data[start : start + step].view(_storage(kind, gguf)), kind)
            except NotImplementedError:
                raise ValueError(f"{self.path}: tensor {name} has type {kind.name}, which gguf cannot read") from None
            values = torch.from_numpy(np.ascontiguousarray(values, np.float32))
            yield values.view(-1, width) if len(info.shape) > 1 else values.view(-1)

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
        self._tensors = {}
        for name, shape, kind, offset in described:
            info = _TensorInfo(shape, kind, start + offset, self._size(name, shape, kind))
            if info.offset + info.bytes > len(self._data):
                raise ValueError(
                    f"{self.path} is truncated: tensor {name} ends at byte {info.offset + info.bytes}, "
                    f"the file has {len(self._data)}"
                )
            self._tensors[name] = info

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

    def _value(self, kind: int):
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._scalar(_SCALARS[kind])
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in (_STRING, _ARRAY):
            if length > len(self._data):
                raise IndexError(f"an array of {length} values at byte {self._at}")
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


def _storage(kind, gguf) -> type:
    """The element type in which gguf's dequantize expects plain floats; bytes for everything else."""
    kinds = gguf.GGMLQuantizationType
    return {kinds.F32: np.float32, kinds.F16: np.float16}.get(kind, np.uint8)


def llama_config(file: GGUFFile) -> LlamaConfig:
    """The shape of the model in a GGUF file.

    Raises:
        Unsupported: another architecture, or a feature that LlamaRunner does not have.
        ValueError: metadata is missing.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise Unsupported(
            f"{file.path} has architecture {architecture!r}, supported in GGUF files are {', '.join(ARCHITECTURES)}"
        )

    def value(key: str, default=None, types: type | tuple[type, ...] = int):
        found = file.metadata.get(f"{architecture}.{key}", default)
        if found is None:
            raise ValueError(f"{file.path} is incomplete: it has no metadata {architecture}.{key}")
        if isinstance(found, list):
            raise Unsupported(f"{file.path} has a {key} for each layer, which is not supported")
        if not isinstance(found, types) or (types is int and found < 0):
            raise ValueError(f"{file.path} is corrupt: its {architecture}.{key} is {found!r}")
        return found

    shapes = file.shapes
    hidden, heads, layers = value("embedding_length"), value("attention.head_count"), value("block_count")
    if f"blk.{layers - 1}.attn_norm.weight" not in shapes:  # before anything is made for so many layers
        raise ValueError(f"{file.path} has no tensor blk.{layers - 1}.attn_norm.weight, for {layers} layers")
    head_dim = value("attention.key_length", hidden // max(1, heads))
    if value("rope.dimension_count", head_dim) != head_dim:
        raise Unsupported(f"{file.path} rotates only part of each head, which is not supported")
    if value("expert_count", 0):
        raise Unsupported(f"{file.path} is a mixture of experts, which is not supported")
    return LlamaConfig(
        architecture=architecture,
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=value("attention.head_count_kv", heads),
        head_dim=head_dim,
        context_length=value("context_length"),
        norm_epsilon=value("attention.layer_norm_rms_epsilon", types=float),
        rope_base=value("rope.freq_base", 10000.0, types=float),
        rope_scaling=_rope_scaling(file, value, head_dim),
        windows=(value("attention.sliding_window", 0) or None,) * layers,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        tied_embedding="output.weight" not in shapes,
    )


def _rope_scaling(file: GGUFFile, value: Callable, head_dim: int) -> RopeScaling | None:
    if (shape := file.shapes.get("rope_freqs.weight")) is not None:
        if shape != (head_dim // 2,):
            raise ValueError(f"{file.path}: tensor rope_freqs.weight must have shape {(head_dim // 2,)}, got {shape}")
        return RopeScaling("table", table=tuple(torch.cat(list(file.rows("rope_freqs.weight"))).tolist()))
    kind = value("rope.scaling.type", "none", types=str)
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=value("rope.scaling.factor", types=float))
    raise Unsupported(f"{file.path} has rope scaling {kind!r}, supported are linear and llama3")


class GGUFCheckpoint:
    """The tensors of a GGUF file under their Hugging Face names: `shapes` of all, and `blocks` of one."""

    def __init__(self, file: GGUFFile, config: LlamaConfig):
        self._file = file
        self._config = config
        self._names = {_hugging_face_name(name): name for name in file.shapes if name != "rope_freqs.weight"}
        self.shapes = {name: file.shapes[original] for name, original in self._names.items()}

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers and the fp32 values of these rows."""
        original = self._names[name]
        order = torch.arange(self.shapes[name][0], device="cpu")
        if self._config.architecture == "llama" and original.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            # llama.cpp rotates neighbours, so its files have the two halves of each head interleaved
            order = order.view(-1, 2, self._config.head_dim // 2).transpose(1, 2).flatten()
        start = 0
        for rows in self._file.rows(original):
            yield order[start : start + len(rows)], rows
            start += len(rows)


def _hugging_face_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_GLOBAL_NAMES.get(stem, stem)}.{kind}"
    _, layer, part = (stem + ".").split(".", 2)
    part = part.rstrip(".")
    return f"model.layers.{layer}.{_NAMES.get(part, part)}.{kind}"
