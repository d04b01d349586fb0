"""What this machine is; costs are measured on it, and the store keeps what was found out."""

from __future__ import annotations

import platform
from pathlib import Path

__all__ = ["cpu_fields", "cpu_name"]


def cpu_name() -> str:
    """The processor as its maker names it."""
    return cpu_fields().get("model name") or platform.processor() or platform.machine()


def cpu_fields() -> dict[str, str]:
    """Linux's description of the first processor, by name; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
