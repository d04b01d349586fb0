"""Reads Hugging Face folders: config.json and safetensors, whole or in shards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pyspec.models.llama import LlamaConfig, RopeScaling, Unsupported

__all__ = ["ARCHITECTURES", "SafetensorsCheckpoint", "llama_config", "read_json"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def read_json(path: Path) -> dict:
    """A JSON file; ValueError naming it if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def llama_config(folder: Path, config: dict) -> LlamaConfig:
    """The shape of the model that a folder's config.json describes.

    Raises:
        Unsupported: another architecture, or a feature that LlamaRunner does not have.
        ValueError: an entry is missing.
    """
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise Unsupported(f"{folder} has architecture {architecture}, LlamaRunner has {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise Unsupported(f"{folder} has hidden_act {config['hidden_act']!r}, LlamaRunner has silu")
    for name in ("mlp_bias", "quantization_config"):
        if config.get(name):
            raise Unsupported(f"{folder} has {name}, which LlamaRunner does not have")
    try:
        heads, hidden, layers = (config[key] for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        # transformers 5 keeps all of it in rope_parameters, earlier versions in rope_theta and rope_scaling
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        has_output_bias = architecture == "LlamaForCausalLM" and config.get("attention_bias", False)
        return LlamaConfig(
            architecture=config["model_type"],
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=layers,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            context_length=config["max_position_embeddings"],
            norm_epsilon=config["rms_norm_eps"],
            rope_base=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
            rope_scaling=_rope_scaling(folder, rope),
            windows=_windows(architecture, config, layers),
            qkv_bias=architecture == "Qwen2ForCausalLM" or has_output_bias,
            output_bias=has_output_bias,
            tied_embedding=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{folder / 'config.json'} is incomplete: it has no {error}") from None


def _rope_scaling(folder: Path, rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=rope["factor"])
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=rope["factor"],
            low_factor=rope["low_freq_factor"],
            high_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    raise Unsupported(f"{folder} has rope scaling {kind!r}, LlamaRunner has linear and llama3")


def _windows(architecture: str, config: dict, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if architecture == "LlamaForCausalLM" or not window:
        return (None,) * layers
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    if "layer_types" in config:
        return tuple(window if kind == "sliding_attention" else None for kind in config["layer_types"])
    first = config.get("max_window_layers", layers) if config.get("use_sliding_window") else layers
    return (None,) * first + (window,) * (layers - first)


class SafetensorsCheckpoint:
    """The tensors of a folder's safetensors, whole or in shards: `shapes` of all, and `blocks` of one.

    Raises:
        FileNotFoundError: there are no safetensors.
        ValueError: a file is truncated, corrupt or missing, or has a tensor that another has too.
    """

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
            for file in files:
                if not file.is_file():
                    raise ValueError(f"{index} names {file.name}, which is missing")
        else:
            files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no .safetensors files")
        self._shards = {}
        for file in files:
            shard = _open(file)
            for name in shard.keys():  # noqa: SIM118, a safetensors shard does not iterate
                if name in self._shards:
                    raise ValueError(f"{file} has tensor {name}, which another file has too")
                self._shards[name] = shard
        self.shapes = {name: tuple(shard.get_slice(name).get_shape()) for name, shard in self._shards.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values."""
        yield slice(None), self._shards[name].get_tensor(name)


def _open(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("Hugging Face folders need safetensors: pip install pyspec-kernels[hf]") from None
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from None
