"""Quantised caches in files: what is committed, with the version of the format and the model that it belongs to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from pyspec.caches.blocks import RECENT, QuantisedCache
from pyspec.caches.gear import GearSettings
from pyspec.ops.gear_format import FORMAT_VERSION

KIND = "pyspec quantised cache"


def save_quantised(cache: QuantisedCache, path: str | Path, fingerprint: str) -> None:
    """Writes the committed tokens of all sequences to a safetensors file.

    Args:
        cache: it is not changed.
        path: a file, overwritten.
        fingerprint: of the model whose keys these are.

    Raises:
        TypeError: its settings are not a GearSettings.
    """
    from safetensors.torch import save_file

    if type(cache.settings) is not GearSettings:
        raise TypeError(f"cache must be quantised by a GearSettings, got {cache.settings!r}")
    tensors = {}
    for sequence, (length, start) in enumerate(zip(cache.lengths, cache.starts, strict=True)):
        blocks = length // cache.span
        records = blocks * cache.settings.records
        tensors[f"{sequence}.quantised"] = cache.quantised[:, sequence, :, :blocks].contiguous()
        tensors[f"{sequence}.whole"] = cache.whole[:, sequence, :, :records].contiguous()
        tensors[f"{sequence}.queries"] = cache.queries[:, sequence, :, :RECENT].contiguous()
        tensors[f"{sequence}.exact"] = cache.keys_values[:, :, sequence, :, : length - start].contiguous()
    about = {
        "kind": KIND,
        "version": str(FORMAT_VERSION),
        "model": fingerprint,
        "settings": json.dumps(asdict(cache.settings)),
        "lengths": json.dumps(cache.lengths),
    }
    save_file(tensors, path, about)


def load_quantised(path: str | Path, fingerprint: str, *, capacity: int, device: torch.device | str) -> QuantisedCache:
    """Reads a cache that `save_quantised` wrote.

    Args:
        path: the file.
        fingerprint: of the model that will read it.
        capacity: in tokens of a sequence.
        device: where the cache will lie.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, no quantised cache, of another version or model, quantised with `rotate`,
            which older versions had, or has more than capacity tokens.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            _check(path, about, fingerprint)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error
    stated, lengths = json.loads(about["settings"]), json.loads(about["lengths"])
    if stated.pop("rotate", False):
        raise ValueError(f"{path} has keys quantised with rotate, which is no longer there: make the cache again")
    settings = GearSettings(**stated)
    if capacity < max(lengths):
        raise ValueError(f"capacity must be at least the {max(lengths)} tokens of {path}, got {capacity}")
    layers, _, kv_heads, _, head_dim = tensors["0.exact"].shape
    dtype = tensors["0.exact"].dtype
    cache = settings.start(layers, len(lengths), kv_heads, capacity, head_dim, dtype, torch.device(device))
    cache.lengths = lengths
    for sequence, (length, start) in enumerate(zip(lengths, cache.starts, strict=True)):
        blocks = length // cache.span
        for name, to in (
            ("quantised", cache.quantised[:, sequence, :, :blocks]),
            ("whole", cache.whole[:, sequence, :, : blocks * settings.records]),
            ("queries", cache.queries[:, sequence, :, :RECENT]),
            ("exact", cache.keys_values[:, :, sequence, :, : length - start]),
        ):
            saved = tensors[f"{sequence}.{name}"]
            if saved.shape != to.shape or saved.dtype != to.dtype:
                raise ValueError(
                    f"{path} is damaged: {sequence}.{name} must be {to.dtype} {tuple(to.shape)} for {length} tokens "
                    f"and {settings}, got {saved.dtype} {tuple(saved.shape)}"
                )
            to.copy_(saved)
    return cache


def _check(path: str | Path, about: dict[str, str], fingerprint: str) -> None:
    if about.get("kind") != KIND:
        raise ValueError(f"{path} is no quantised cache")
    if about.get("version") != str(FORMAT_VERSION):
        raise ValueError(f"{path} has version {about.get('version')} of the format, this is version {FORMAT_VERSION}")
    if about.get("model") != fingerprint:
        raise ValueError(f"{path} is a cache of model {about.get('model')}, not of {fingerprint}")
