"""The store: an entry a file, for the key that it was kept for."""

import pytest
import torch

from pyspec.machine import store
from tests.helpers.fake_runner import FakeRunner

KERNEL = {"op": "linear", "device": "cpu", "backend": "compiled", "reason": "avx2"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyspec"


def test_entries_are_kept_by_kind_and_key():
    store.keep("kind", "a", [1, 2.5])
    store.keep("kind", "b", {"x": "y"})
    store.keep("other", "a", 3)
    store.keep("other", "a", 4)
    assert store.read("kind", "a") == [1, 2.5] and store.read("kind", "b") == {"x": "y"}
    assert store.read("other", "a") == 4 and store.read("other", "b") is None


@pytest.mark.parametrize("text", ["", "[1]", "{", "3", '{"key": "a"}', '{"key": "b", "entry": 1}', b"\xff"])
def test_a_broken_file_is_no_entry(folder, text):
    store.keep("kind", "a", 1)
    (file,) = folder.iterdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert store.read("kind", "a") is None
    store.keep("kind", "a", 2)
    assert store.read("kind", "a") == 2 and list(folder.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_to_keeps_nothing(folder):
    folder.write_text("a file in its place")
    store.keep("kind", "a", 1)
    assert store.read("kind", "a") is None


def test_a_key_names_model_machine_and_settings(monkeypatch):
    model = FakeRunner()
    keys = {store.key(), store.key(model), store.key(kernel=KERNEL), store.key(model, KERNEL), store.key(model, top=8)}
    keys |= {store.key(model, top=9), store.key(kernel=KERNEL | {"backend": "reference"})}
    monkeypatch.setattr(store, "cpu_name", lambda: "another processor")
    keys.add(store.key(kernel=KERNEL))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    keys.add(store.key(kernel=KERNEL))
    for name, value in (("fingerprint", "another"), ("dtype", torch.float16), ("weight_dtype", torch.int8)):
        monkeypatch.setattr(model, name, value, raising=False)
        keys.add(store.key(model))
    assert len(keys) == 12 and store.key(model) == store.key(model)
