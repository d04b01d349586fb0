"""Quantised caches in files: what comes back, and which files are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec.caches import GearSettings, load_quantised, save_quantised

LAYERS, HEADS, HEAD_DIM = 3, 2, 64
SETTINGS = {
    "gear": GearSettings(2, 64, rank=2, outliers=2, fitted=True),
    "evicting": GearSettings(4, 64, keep=0.5, whole_layers=1),
}


def cache_of(settings, lengths=(300, 20)):
    cache = settings.start(LAYERS, len(lengths), HEADS, 400, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    for sequence, length in enumerate(lengths):
        text = torch.randn(LAYERS, 2, HEADS, length, HEAD_DIM).bfloat16()
        for first in range(0, length, 50):
            chunk = text[..., first : first + 50, :]
            slot = first - cache.starts[sequence]
            cache.keys_values[:, :, sequence, :, slot : slot + chunk.shape[3]] = chunk
            cache.commit(sequence, range(chunk.shape[3]))
    return cache


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_saved_comes_back(name, tmp_path):
    cache, path = cache_of(SETTINGS[name]), tmp_path / "cache"
    save_quantised(cache, path, "model-1")
    found = load_quantised(path, "model-1", capacity=1000, device="cpu")
    assert found.settings == cache.settings and found.lengths == [300, 20] and found.capacity == 1000
    for sequence, length in enumerate(cache.lengths):
        blocks, start = length // cache.span, cache.starts[sequence]
        for attribute, count in (("quantised", blocks), ("whole", blocks * cache.settings.records)):
            ours, theirs = getattr(found, attribute), getattr(cache, attribute)
            assert torch.equal(ours[:, sequence, :, :count], theirs[:, sequence, :, :count])
        exact = (x.keys_values[:, :, sequence, :, : length - start] for x in (found, cache))
        assert torch.equal(*exact)
    held = cache.quantised[:, 0, :, : 300 // cache.span].nbytes + cache.keys_values[:, :, 0, :, :200].nbytes
    assert path.stat().st_size < 2 * held + 8192  # what is committed, not what is allocated


def test_other_caches_are_refused(tmp_path):
    cache = cache_of(SETTINGS["gear"])
    cache.settings = "rvq"
    with pytest.raises(TypeError, match="cache must be quantised by a GearSettings, got 'rvq'"):
        save_quantised(cache, tmp_path / "cache", "model-1")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "cache"
    save_quantised(cache_of(SETTINGS["gear"]), path, "model-1")
    tensors = load_file(path)
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]

    def load(**options):
        return load_quantised(path, **{"fingerprint": "model-1", "capacity": 400, "device": "cpu"} | options)

    load()
    with pytest.raises(ValueError, match="cache is a cache of model model-1, not of model-2"):
        load(fingerprint="model-2")
    with pytest.raises(ValueError, match="capacity must be at least the 300 tokens of .*cache, got 299"):
        load(capacity=299)
    settings = json.loads(header["settings"])
    save_file(tensors, path, header | {"settings": json.dumps(settings | {"rotate": False})})  # as older versions did
    load()
    whole = path.read_bytes()
    for size in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cache cannot be read, it may be truncated"):
            load()
    for change, message in (
        ({"version": "2"}, "cache has version 2 of the format, this is version 1"),
        ({"kind": "drafter"}, "cache is no quantised cache"),
        ({"settings": json.dumps({"bits": 5})}, "bits must be one of"),
        ({"settings": json.dumps({"bits": 4})}, "cache is damaged: 0.quantised must be torch.uint8"),
        ({"settings": json.dumps(settings | {"rotate": True})}, "cache has keys quantised with rotate"),
        ({"lengths": "[301, 20]"}, "cache is damaged: 0.exact must be torch.bfloat16 .* for 301 tokens"),
    ):
        save_file(tensors, path, header | change)
        with pytest.raises(ValueError, match=message):
            load()
    path.unlink()
    with pytest.raises(FileNotFoundError):
        load()
