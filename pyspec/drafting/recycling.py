"""Token Recycling: what the target last thought could follow each token."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from pyspec.drafting.growing import GrowingDrafter

__all__ = ["RecyclingDrafter"]

FORMAT_VERSION = 1


class RecyclingDrafter(GrowingDrafter):
    """Keeps the 8 best tokens of every logits row it sees, by the token that it came after and by the last two.

    After Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling", arXiv 2408.08696, but grown to a budget instead of a fixed template, and read from the prompt too.
    The tables outlive a request: later ones start from them, and `save` keeps them for the next process.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
    """

    _lookup = False

    def __init__(self, vocab_size: int, fingerprint: str):
        super().__init__(vocab_size, lookup=self._lookup, recycling=True)
        self.fingerprint = fingerprint

    def save(self, path: str | os.PathLike) -> None:
        """Writes the tables as a NumPy archive (48 bytes a token and 3 MB); an existing file is replaced whole."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(file, **self._identity(), **self._tables())
        os.replace(unfinished, path)

    def load(self, path: str | os.PathLike) -> None:
        """Takes over saved tables, for all sequences that share this one's.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is damaged, or of another model or vocabulary; nothing changes then.
        """
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file), np.load(path, allow_pickle=False) as archive:
                saved = dict(archive)
        except (zipfile.BadZipFile, EOFError, ValueError) as error:
            raise ValueError(f"{path} is not a saved drafter, or damaged: {error}") from error
        for name, value in self._identity().items():
            if name not in saved or saved[name].shape or saved[name].item() != value:
                raise ValueError(f"{path} has {name} {saved.get(name)}, but this drafter needs {value!r}")
        tables = self._tables()
        for name, table in tables.items():
            if name not in saved or saved[name].shape != table.shape or saved[name].dtype != table.dtype:
                raise ValueError(f"{path} has no {name} of shape {list(table.shape)} and type {table.dtype}")
            least, bound = (0, self._adjacencies[0].level_count) if "levels" in name else (-1, self.vocab_size)
            if "keys" not in name and not (saved[name].min() >= least and saved[name].max() < bound):
                raise ValueError(f"{path} is damaged: {name} must be in [{least}, {bound})")
        for name, table in tables.items():
            table[:] = saved[name]

    def _identity(self) -> dict[str, int | str]:
        return {"format_version": FORMAT_VERSION, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}

    def _tables(self) -> dict[str, np.ndarray]:
        return {
            f"{field}_{context}": getattr(adjacency, field)
            for context, adjacency in enumerate(self._adjacencies, start=1)
            for field in ("keys", "successors", "levels")
        }
