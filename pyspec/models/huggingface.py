"""Reads model folders: config.json or params.json, safetensors, whole or in shards, and pytorch_model.bin."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from pyspec.models.bamba import BambaConfig
from pyspec.models.llama_weights import LlamaConfig, RopeScaling, Unsupported
from pyspec.models.mamba import MambaConfig
from pyspec.models.mamba2 import Mamba2Config

__all__ = [
    "ARCHITECTURES",
    "SafetensorsCheckpoint",
    "TensorCheckpoint",
    "native_config",
    "read_checkpoint",
    "read_description",
    "read_json",
]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


def read_json(path: Path) -> dict:
    """A JSON file; ValueError naming it if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def read_description(folder: Path) -> dict:
    """What a folder says of its model: config.json, or the params.json of Codestral-Mamba."""
    for name in ("config.json", "params.json"):
        if (folder / name).is_file():
            return read_json(folder / name)
    raise FileNotFoundError(f"{folder} is no model folder: it has no config.json")


def native_config(source: Path | str, description: dict) -> LlamaConfig | MambaConfig | Mamba2Config | BambaConfig:
    """The shape of the model that a config.json, or the like, describes; source is its name in errors.

    Raises:
        Unsupported: another architecture, or a feature that LlamaRunner does not have.
        ValueError: an entry is missing, or one of Mamba's or Bamba's is not supported.
    """
    try:
        architecture = (description.get("architectures") or [None])[0]
        if architecture is None and ("d_model" in description or "dim" in description):
            return _mamba_ssm_config(source, description)
        if architecture == "MambaForCausalLM":
            return _mamba_config(source, description)
        if architecture == "Mamba2ForCausalLM":
            return _mamba2_config(source, description)
        if architecture == "BambaForCausalLM":
            return _bamba_config(source, description)
        return _llama_config(source, description)
    except KeyError as error:
        raise ValueError(f"{source}: config.json is incomplete: it has no {error}") from None


def _mamba_config(source: Path | str, config: dict) -> MambaConfig:
    _check_silu(source, config, "MambaRunner")
    hidden = config["hidden_size"]
    return MambaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        layers=config["num_hidden_layers"],
        channels=config.get("intermediate_size") or int(config.get("expand", 2) * hidden),
        state_size=config["state_size"],
        dt_rank=_dt_rank(config.get("time_step_rank"), hidden),
        conv_taps=config["conv_kernel"],
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        projection_bias=config.get("use_bias", False),
        conv_bias=config.get("use_conv_bias", True),
        tied_embedding=config.get("tie_word_embeddings", True),
    )


def _mamba2_config(source: Path | str, config: dict) -> Mamba2Config:
    _check_silu(source, config, "Mamba2Runner")
    _check_no_limit(source, config, "Mamba2Runner")
    return Mamba2Config(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_heads"],
        head_dim=config["head_dim"],
        groups=config["n_groups"],
        state_size=config["state_size"],
        conv_taps=config["conv_kernel"],
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        projection_bias=config.get("use_bias", False),
        conv_bias=config.get("use_conv_bias", True),
        tied_embedding=config.get("tie_word_embeddings", False),
    )


def _bamba_config(source: Path | str, config: dict) -> BambaConfig:
    _check_silu(source, config, "BambaRunner")
    _check_no_limit(source, config, "BambaRunner")
    rope = config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or "default"
    for name, found in (("mlp_bias", config.get("mlp_bias", False)), ("rope scaling", kind != "default" and kind)):
        if found:
            raise ValueError(f"{source} has {name} {found!r}, BambaRunner has none")
    hidden, heads, layers = (config[name] for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    head_dim = config.get("head_dim") or hidden // heads
    places = set(config.get("attn_layer_indices") or ())
    is_attention = tuple(layer in places for layer in range(layers))
    shared = {
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "norm_epsilon": config["rms_norm_eps"],
        "tied_embedding": config.get("tie_word_embeddings", False),
    }
    attention = LlamaConfig(
        architecture=config["model_type"],
        intermediate_size=config["intermediate_size"],
        layers=sum(is_attention),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        context_length=config["max_position_embeddings"],
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
        qkv_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        **shared,
    )
    channels = config.get("mamba_expand", 2) * hidden
    state_head_dim = config.get("mamba_d_head", "auto")
    recurrence = Mamba2Config(
        layers=layers - sum(is_attention),
        heads=config["mamba_n_heads"],
        head_dim=channels // config["mamba_n_heads"] if state_head_dim == "auto" else state_head_dim,
        groups=config["mamba_n_groups"],
        state_size=config["mamba_d_state"],
        conv_taps=config["mamba_d_conv"],
        projection_bias=config.get("mamba_proj_bias", False),
        conv_bias=config.get("mamba_conv_bias", True),
        **shared,
    )
    return BambaConfig(attention, recurrence, is_attention, int(head_dim * rope.get("partial_rotary_factor", 0.5)))


def _check_no_limit(source: Path | str, config: dict, runner: str) -> None:
    lowest, highest = config.get("time_step_limit") or (0.0, float("inf"))
    highest = highest["__float__"] if isinstance(highest, dict) else highest  # how transformers writes infinity
    if lowest > 0 or float(highest) != float("inf"):
        raise ValueError(f"{source} has time_step_limit {lowest, highest}, {runner} has no limit")


def _mamba_ssm_config(source: Path | str, config: dict) -> MambaConfig | Mamba2Config:
    """Of the package mamba_ssm, and of Codestral-Mamba, which has other names for some of it."""
    is_codestral = "dim" in config
    hidden = config["dim" if is_codestral else "d_model"]
    layer = {"layer": "Mamba2", "ngroups": config.get("n_groups", 1)} if is_codestral else config.get("ssm_cfg") or {}
    kind = layer.get("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise ValueError(f"{source} has layers of {kind}, the families are Mamba1 and Mamba2")
    for name, wanted in (
        ("rms_norm", True),
        ("attn_layer_idx", []),
        ("d_intermediate", 0),
        ("norm_before_gate", False),
    ):
        if (found := layer.get(name, config.get(name, wanted))) != wanted:
            raise ValueError(f"{source} has {name} {found}, models of {kind} have {wanted}")
    multiple = config.get("pad_vocab_size_multiple", 1)
    channels = layer.get("expand", 2) * hidden
    shared = {
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "hidden_size": hidden,
        "layers": config["n_layers" if is_codestral else "n_layer"],
        "conv_taps": layer.get("d_conv", 4),
        "norm_epsilon": 1e-5,
        "projection_bias": layer.get("bias", False),
        "conv_bias": layer.get("conv_bias", True),
        "tied_embedding": config.get("tie_embeddings", True),
    }
    if kind == "Mamba1":
        rank = _dt_rank(layer.get("dt_rank"), hidden)
        return MambaConfig(channels=channels, state_size=layer.get("d_state", 16), dt_rank=rank, **shared)
    head_dim = layer.get("headdim", 64)
    return Mamba2Config(
        heads=channels // head_dim,
        head_dim=head_dim,
        groups=layer.get("ngroups", 1),
        state_size=layer.get("d_state", 128),
        **shared,
    )


def _dt_rank(stated: int | str | None, hidden: int) -> int:
    return -(-hidden // 16) if stated in (None, "auto") else stated


def _check_silu(source: Path | str, config: dict, runner: str) -> None:
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"{source} has hidden_act {config['hidden_act']!r}, {runner} has silu")


def _llama_config(folder: Path | str, config: dict) -> LlamaConfig:
    architecture = (config.get("architectures") or [None])[0]
    if architecture not in ARCHITECTURES:
        raise Unsupported(f"{folder} has architecture {architecture}, LlamaRunner has {', '.join(ARCHITECTURES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise Unsupported(f"{folder} has hidden_act {config['hidden_act']!r}, LlamaRunner has silu")
    for name in ("mlp_bias", "quantization_config"):
        if config.get(name):
            raise Unsupported(f"{folder} has {name}, which LlamaRunner does not have")
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


def _rope_scaling(folder: Path | str, rope: dict) -> RopeScaling | None:
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
        self._names = {_hugging_face_name(name): name for name in self._shards}
        self.shapes = {
            ours: tuple(self._shards[name].get_slice(name).get_shape()) for ours, name in self._names.items()
        }

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values."""
        name = self._names[name]
        yield slice(None), self._shards[name].get_tensor(name)


class TensorCheckpoint:
    """Tensors by name: `shapes` of all, and `blocks` of one."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = {_hugging_face_name(name): tensor for name, tensor in tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def blocks(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """All rows as a slice, and their values."""
        yield slice(None), self._tensors[name]


def _hugging_face_name(name: str) -> str:
    """The name that transformers gives a tensor of mamba_ssm's or Codestral's."""
    name = re.sub(r"^model\.(?=backbone\.|lm_head\.)", "", name)
    return re.sub(r"^backbone\.embedding\.", "backbone.embeddings.", name)


def read_checkpoint(folder: Path) -> SafetensorsCheckpoint | TensorCheckpoint:
    """A folder's tensors, from safetensors or, where there are none, from pytorch_model.bin.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a file is truncated, corrupt or missing, or has a tensor that another has too.
    """
    file = folder / "pytorch_model.bin"
    if any(folder.glob("*.safetensors")) or not file.is_file():
        return SafetensorsCheckpoint(folder)
    try:
        return TensorCheckpoint(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from None


def _open(file: Path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError("Hugging Face folders need safetensors: pip install pyspec-kernels[hf]") from None
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is truncated or corrupt: {error}") from None
