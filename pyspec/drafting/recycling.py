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
    """Keeps the 8 best tokens of every logits row it sees, by the token the row came after.

    After Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
    Recycling", arXiv 2408.08696, but grown to a budget instead of a fixed template, and read from the prompt too.
    The table outlives a request: later ones start from it, and `save` keeps it for the next process.

    Args:
        vocab_size: tokens of the target.
        fingerprint: names the target; a file saved with another one is refused.
    """

    _lookup = False

    def __init__(self, vocab_size: int, fingerprint: str):
        super().__init__(vocab_size, lookup=self._lookup, recycling=True)
        self.fingerprint = fingerprint

    def save(self, path: str | os.PathLike) -> None:
        """Writes the table (36 bytes a token) as a NumPy archive; an existing file is replaced whole."""
        path = Path(path)
        unfinished = path.with_name(path.name + ".unfinished")
        with open(unfinished, "wb") as file:
            np.savez(
                file,
                format_version=FORMAT_VERSION,
                fingerprint=self.fingerprint,
                vocab_size=self.vocab_size,
                successors=self._adjacency.successors,
                levels=self._adjacency.levels,
            )
        os.replace(unfinished, path)

    def load(self, path: str | os.PathLike) -> None:
        """Takes over a saved table, for all sequences that share this one's.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is damaged, or of another model or vocabulary; nothing changes then.
        """
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file), np.load(path, allow_pickle=False) as archive:
                saved = dict(archive)
        except (zipfile.BadZipFile, EOFError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved drafter, or damaged: {error}") from error
        expected = {
            "format_version": FORMAT_VERSION,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
        }
        for name, value in expected.items():
            if name not in saved or saved[name].shape or saved[name].item() != value:
                raise ValueError(f"{path} has {name} {saved.get(name)}, but this drafter needs {value!r}")
        tables = {"successors": self._adjacency.successors, "levels": self._adjacency.levels}
        for name, table in tables.items():
            if name not in saved or saved[name].shape != table.shape or saved[name].dtype != table.dtype:
                raise ValueError(f"{path} has no {name} of shape {list(table.shape)} and type {table.dtype}")
        if saved["successors"].min() < -1 or saved["successors"].max() >= self.vocab_size:
            raise ValueError(f"{path} is damaged: successors are outside the vocabulary")
        if saved["levels"].max() >= self._adjacency.level_count:
            raise ValueError(f"{path} is damaged: levels are out of range")
        for name, table in tables.items():
            table[:] = saved[name]
