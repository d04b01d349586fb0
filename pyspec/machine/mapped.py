"""Mapped files: read as if they were memory, and given back when they have been read."""

from __future__ import annotations

import mmap

__all__ = ["map_file", "release_pages"]


def map_file(path) -> mmap.mmap:
    """A file in memory, whose pages come when they are read.

    It is private and writable, because torch wants writable arrays; pages are shared as long as nobody writes.
    """
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def release_pages(data: mmap.mmap, start: int, size: int) -> None:
    """Gives back the pages that lie within some bytes of a mapped file; nothing has been written to them."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and end > first:
        data.madvise(mmap.MADV_DONTNEED, first, end - first)
