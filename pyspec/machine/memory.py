"""How much memory there is for a model."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

__all__ = ["available_memory", "give_back_freed"]

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device, as far as the system tells; None where it does not.

    On the CPU what Linux calls available, which counts pages of files that it could give back, or what is left of the
    limit of a control group that this process is in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    known = [size for size in (_machine(), *_groups()) if size is not None]
    return max(0, min(known)) if known else None


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _groups() -> list[int]:
    """What is left of the limits of this process's groups and those around them, in either version of cgroups."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = _CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if (found := _left(folder, limit, used)) is not None:
                left.append(found)
            if folder == root:
                break
    return left


def _left(folder: Path, limit: str, used: str) -> int | None:
    """Bytes left in one group, of which pages of files count as free; None where it has no limit."""
    try:
        most, taken = int((folder / limit).read_text()), int((folder / used).read_text())
        fields = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
    except (OSError, ValueError):  # "max" is none
        return None
    return most - taken + int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))


def give_back_freed() -> None:
    """Gives memory that was freed back to the system, which glibc keeps: after loading, a tokenizer's in the making."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # no other C library has it
    if trim is not None:
        trim(0)
