"""What of memory can still be taken."""

import torch

from pyspec.machine import memory
from pyspec.machine.memory import available_memory

CPU = torch.device("cpu")


def make_group(folder, limit, used, stat="active_file 10\ninactive_file 5\nshmem 3", names=("max", "current")):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (*zip(names, (limit, used), strict=True), ("stat", stat)):
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_a_machine_has_some():
    assert available_memory(CPU) > 2**20
    assert available_memory(torch.device("meta")) is None


def test_the_limit_of_a_group_counts(tmp_path, monkeypatch):
    text = "4:memory:/outer/inner\n0::/unified/inner\n"
    read = memory.Path.read_text
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_machine", lambda: 10**6)
    monkeypatch.setattr(memory.Path, "read_text", lambda path: text if str(path) == "/proc/self/cgroup" else read(path))
    assert available_memory(CPU) == 10**6
    make_group(tmp_path / "unified/inner", "max", 100)
    assert available_memory(CPU) == 10**6
    make_group(tmp_path / "unified", 5000, 100)  # around it
    assert available_memory(CPU) == 5000 - 100 + 15
    old = ("limit_in_bytes", "usage_in_bytes")
    make_group(tmp_path / "memory/outer/inner", 4000, 4020, names=old)
    assert available_memory(CPU) == 0
    make_group(tmp_path / "memory/outer/inner", 4000, 100, names=old)
    assert available_memory(CPU) == 3915


def test_a_system_that_does_not_tell(monkeypatch):
    monkeypatch.setattr(memory, "_machine", lambda: None)
    monkeypatch.setattr(memory, "_groups", list)
    assert available_memory(CPU) is None
