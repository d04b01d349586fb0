"""What a drafter has learned, in a file: NumPy arrays beside the names of model and vocabulary."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

FORMAT_VERSION = 1

Arrays = Mapping[str, np.ndarray]


class Column(NamedTuple):
    """The form that a saved table must have: -1 in shape stands for any length, and values are in [least, bound)."""

    shape: tuple[int, ...]
    dtype: type
    least: float = -np.inf
    bound: float = np.inf


def save(path: str | os.PathLike, identity: Mapping[str, int | str], tables: Arrays) -> None:
    """Writes tables; an existing file is replaced whole."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            np.savez(file, format_version=FORMAT_VERSION, **identity, **tables)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: str | os.PathLike, identity: Mapping[str, int | str], columns: Mapping[str, Column]) -> Arrays:
    """The tables of a file.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if it is damaged, of another identity, or a table is not as its column says.
    """
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file), np.load(path, allow_pickle=False) as archive:
            saved = dict(archive)
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise ValueError(f"{path} is not a saved drafter, or damaged: {error}") from error
    for name, value in {"format_version": FORMAT_VERSION, **identity}.items():
        if name not in saved or saved[name].shape or saved[name].item() != value:
            raise ValueError(f"{path} has {name} {saved.get(name)}, but this drafter needs {value!r}")
    rows: dict[str, int] = {}  # of tables whose length is free, by the part that their names begin with
    for name, column in columns.items():
        table = saved.get(name)
        if table is None or table.dtype != column.dtype or not _fits(table.shape, column.shape):
            shape = str(list(column.shape)).replace("-1", "any")
            raise ValueError(f"{path} has no {name} of shape {shape} and type {np.dtype(column.dtype)}")
        if table.size and not (table.min() >= column.least and table.max() < column.bound):
            raise ValueError(f"{path} is damaged: {name} must be in [{column.least}, {column.bound})")
        if -1 in column.shape and rows.setdefault(name.split("_")[0], len(table)) != len(table):
            raise ValueError(f"{path} is damaged: {name} has {len(table)} rows, others have another number")
    return {name: saved[name] for name in columns}


def _fits(shape: tuple[int, ...], asked: tuple[int, ...]) -> bool:
    return len(shape) == len(asked) and all(size in (-1, given) for size, given in zip(asked, shape, strict=True))
