"""Codebooks: what keys and values of one model are made of, trained by python -m training.residual_vq."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from pyspec.ops.residual_vq import ResidualVqFormat, check_codebooks, format_of

KIND = "pyspec residual_vq codebooks"
KEYS = {"post-rope": "1", "pre-rope": "2"}  # what keys are coded as, and the version of such a file
DEMO_FILE = Path(__file__).with_name("demo_codebooks.safetensors")


@dataclass(frozen=True, eq=False, repr=False)
class Codebooks:
    """The codebooks of one model's layers.

    Args:
        tables: [layers, 2, depth, codes, 32] fp16, of each layer's keys and values.
        kv_heads, head_dim: of the model.
        fingerprint: of the model (runner.fingerprint): other models' keys are made of other things.
        frequencies: [head_dim / 2] fp32, the model's rotary frequencies, where keys are coded as they were before
            rotary embedding; None where they are coded as they are cached.

    Raises:
        TypeError, ValueError: tables are not codebooks, or hold NaN or infinity; frequencies do not fit the head_dim.
    """

    tables: Tensor
    kv_heads: int
    head_dim: int
    fingerprint: str
    frequencies: Tensor | None = None

    def __post_init__(self):
        check_codebooks(self.tables, "tables", dims=5)
        if not self.tables.isfinite().all():
            layer = int((~self.tables.isfinite()).nonzero()[0, 0])
            raise ValueError(f"tables must be finite, those of layer {layer} are not")
        self.format.check_head_dim(self.head_dim)
        turns = self.frequencies
        if turns is not None and (turns.dtype != torch.float32 or turns.shape != (self.head_dim // 2,)):
            raise ValueError(
                f"frequencies must be float32 [{self.head_dim // 2}] for head_dim {self.head_dim}, "
                f"got {turns.dtype} {tuple(turns.shape)}"
            )

    @functools.cached_property
    def format(self) -> ResidualVqFormat:
        return format_of(self.tables)

    @property
    def keys(self) -> str:
        """The form in which keys are coded, one of KEYS."""
        return "post-rope" if self.frequencies is None else "pre-rope"

    @functools.cached_property
    def digest(self) -> str:
        parts = [self.tables] if self.frequencies is None else [self.tables, self.frequencies]
        numbers = b"".join(part.cpu().contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
        return hashlib.sha256(numbers).hexdigest()[:16]

    def __repr__(self) -> str:
        shape = f"{self.format.depth} x {self.format.codes}, {self.keys} keys"
        return f"Codebooks({shape}, of {self.fingerprint}, {self.digest})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Codebooks) and (self.fingerprint, self.digest) == (other.fingerprint, other.digest)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.digest))

    def to(self, device: torch.device) -> Codebooks:
        """The codebooks on a device."""
        if self.tables.device == device:
            return self
        return replace(
            self,
            tables=self.tables.to(device),
            frequencies=None if self.frequencies is None else self.frequencies.to(device),
        )

    def check_model(self, layers: int, kv_heads: int, head_dim: int, fingerprint: str, frequencies: Tensor) -> None:
        """Raises ValueError unless these are codebooks of a model of this shape, name and rotary frequencies."""
        ours, theirs = (len(self.tables), self.kv_heads, self.head_dim), (layers, kv_heads, head_dim)
        if (*ours, self.fingerprint) != (*theirs, fingerprint):
            shape = "{} layers, {} KV heads of {}"
            raise ValueError(
                f"codebooks must be those of {fingerprint} ({shape.format(*theirs)}), got codebooks of "
                f"{self.fingerprint} ({shape.format(*ours)}): train them with python -m training.residual_vq "
                f"MODEL FILE"
            )
        if self.frequencies is not None and not torch.allclose(self.frequencies.cpu(), frequencies.cpu()):
            differing = int((~torch.isclose(self.frequencies.cpu(), frequencies.cpu())).nonzero()[0, 0])
            raise ValueError(
                f"codebooks of pre-rope keys must have the rotary frequencies of the model, "
                f"{float(frequencies[differing])} for channel {differing}, got {float(self.frequencies[differing])}"
            )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; an interruption leaves the file that was there before."""
        from safetensors.torch import save_file

        path = Path(path)
        metadata = {"kind": KIND, "version": KEYS[self.keys], "keys": self.keys, "fingerprint": self.fingerprint}
        metadata |= {"kv_heads": str(self.kv_heads), "head_dim": str(self.head_dim)}
        tensors = {"tables": self.tables.cpu().contiguous()}
        if self.frequencies is not None:
            tensors["frequencies"] = self.frequencies.cpu().contiguous()
        part = path.with_name(path.name + ".part")
        save_file(tensors, part, metadata)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Codebooks:
        """Reads codebooks that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not of this kind or version, or is cut off.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("kind") != KIND:
                    raise ValueError(f"{path} does not hold codebooks of residual_vq")
                if (version := metadata.get("version")) not in KEYS.values():
                    raise ValueError(
                        f"{path} is of format version {version}, this pyspec reads {' and '.join(KEYS.values())}"
                    )
                tables = file.get_tensor("tables")
                frequencies = file.get_tensor("frequencies") if version == KEYS["pre-rope"] else None
                kv_heads, head_dim = int(metadata["kv_heads"]), int(metadata["head_dim"])
                return cls(tables, kv_heads, head_dim, metadata["fingerprint"], frequencies)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is cut off or damaged: {error}") from None


@functools.cache
def demo_codebooks() -> Codebooks:
    """The codebooks of the demo model, which come with the package."""
    return Codebooks.load(DEMO_FILE)
