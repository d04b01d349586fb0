"""Codebooks: what keys and values of one model are made of, trained by python -m pyspec.training.residual_vq."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyspec.ops.residual_vq import FORMAT_VERSION, ResidualVqFormat, check_codebooks, format_of

__all__ = ["Codebooks", "demo_codebooks"]

KIND = "pyspec residual_vq codebooks"
DEMO_FILE = Path(__file__).with_name("demo_codebooks.safetensors")


@dataclass(frozen=True, eq=False, repr=False)
class Codebooks:
    """The codebooks of one model's layers.

    Args:
        tables: [layers, 2, depth, codes, 32] fp16, of each layer's keys and values.
        kv_heads, head_dim: of the model.
        fingerprint: of the model (runner.fingerprint): other models' keys are made of other things.

    Raises:
        TypeError, ValueError: tables are not codebooks, or hold NaN or infinity.
    """

    tables: Tensor
    kv_heads: int
    head_dim: int
    fingerprint: str

    def __post_init__(self):
        check_codebooks(self.tables, "tables", dims=5)
        if not self.tables.isfinite().all():
            layer = int((~self.tables.isfinite()).nonzero()[0, 0])
            raise ValueError(f"tables must be finite, those of layer {layer} are not")
        self.format.check_head_dim(self.head_dim)

    @functools.cached_property
    def format(self) -> ResidualVqFormat:
        return format_of(self.tables)

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.tables.cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Codebooks({self.format.depth} x {self.format.codes} of {self.fingerprint}, {self.digest})"

    def __eq__(self, other) -> bool:
        return isinstance(other, Codebooks) and (self.fingerprint, self.digest) == (other.fingerprint, other.digest)

    def __hash__(self) -> int:
        return hash((self.fingerprint, self.digest))

    def to(self, device: torch.device) -> Codebooks:
        """The same on a device."""
        if self.tables.device == device:
            return self
        return Codebooks(self.tables.to(device), self.kv_heads, self.head_dim, self.fingerprint)

    def check_model(self, layers: int, kv_heads: int, head_dim: int, fingerprint: str) -> None:
        """Raises ValueError unless these are codebooks of a model of this shape and name."""
        ours, theirs = (len(self.tables), self.kv_heads, self.head_dim), (layers, kv_heads, head_dim)
        if (*ours, self.fingerprint) == (*theirs, fingerprint):
            return
        shape = "{} layers, {} KV heads of {}"
        raise ValueError(
            f"codebooks must be those of {fingerprint} ({shape.format(*theirs)}), got codebooks of {self.fingerprint} "
            f"({shape.format(*ours)}): train them with python -m pyspec.training.residual_vq MODEL FILE"
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file; an interruption leaves the file that was there before."""
        from safetensors.torch import save_file

        path = Path(path)
        metadata = {"kind": KIND, "version": str(FORMAT_VERSION), "fingerprint": self.fingerprint}
        metadata |= {"kv_heads": str(self.kv_heads), "head_dim": str(self.head_dim)}
        part = path.with_name(path.name + ".part")
        save_file({"tables": self.tables.cpu().contiguous()}, part, metadata)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Codebooks:
        """Reads what save wrote.

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
                if metadata.get("version") != str(FORMAT_VERSION):
                    raise ValueError(
                        f"{path} is of format version {metadata.get('version')}, this pyspec reads {FORMAT_VERSION}"
                    )
                tables = file.get_tensor("tables")
                kv_heads, head_dim = int(metadata["kv_heads"]), int(metadata["head_dim"])
                return cls(tables, kv_heads, head_dim, metadata["fingerprint"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is cut off or damaged: {error}") from None


@functools.cache
def demo_codebooks() -> Codebooks:
    """Those of the demo model, which come with the package."""
    return Codebooks.load(DEMO_FILE)
