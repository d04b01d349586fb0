"""Shapes of models out of config.json or params.json, read as transformers reads them: what wins, and what is left out.

Where transformers has a default for what a file leaves out, so has this page: by the model's class, since they differ.
"""

from __future__ import annotations

import math
from pathlib import Path

from pyspec.architectures.bamba import BambaConfig
from pyspec.architectures.llama import LlamaConfig, RopeScaling, Unsupported
from pyspec.architectures.mamba import MambaConfig
from pyspec.architectures.mamba2 import Mamba2Config
from pyspec.entries import Entries

__all__ = ["ARCHITECTURES", "native_config"]

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")

_SHARED = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu"}
_SHARED |= {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}
_LLAMA = _SHARED | {"rms_norm_eps": 1e-6}
_MAMBA = {"hidden_act": "silu", "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "expand": 2}
_MAMBA |= {"use_bias": False, "use_conv_bias": True}
_DEFAULTS = {
    "LlamaForCausalLM": _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "MistralForCausalLM": _LLAMA
    | {"vocab_size": 32000, "intermediate_size": 14336, "max_position_embeddings": 131072}
    | {"num_key_value_heads": 8, "sliding_window": 4096},
    "Qwen2ForCausalLM": _LLAMA
    | {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
    | {"num_key_value_heads": 32, "sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "MambaForCausalLM": _MAMBA
    | {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "state_size": 16}
    | {"tie_word_embeddings": True},
    "Mamba2ForCausalLM": _MAMBA
    | {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64}
    | {"state_size": 128, "n_groups": 8, "tie_word_embeddings": False},
    "BambaForCausalLM": _SHARED
    | {"vocab_size": 128000, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    | {"max_position_embeddings": 262144, "mamba_n_heads": 128, "mamba_n_groups": 1, "mamba_d_state": 256}
    | {"mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True, "mamba_proj_bias": False},
}
_OF_MODEL_TYPE = {architecture.removesuffix("ForCausalLM").lower(): architecture for architecture in _DEFAULTS}


def native_config(source: Path | str, description: dict) -> LlamaConfig | MambaConfig | Mamba2Config | BambaConfig:
    """The shape of the model that a config.json, or the like, describes; source is its name in errors.

    Raises:
        Unsupported: another architecture, or a feature that LlamaRunner does not have.
        ValueError: an entry is missing, is no such entry, or is one of Mamba's or Bamba's that is not supported.
    """
    name = f"{source}: {'params.json' if 'dim' in description else 'config.json'}"
    stated = Entries(name, description)
    names = stated.array("architectures", str, [])
    model_type = stated.text("model_type", "")
    if not names and not model_type and ("d_model" in stated or "dim" in stated):
        return _mamba_ssm_config(source, stated)
    # the classes of a live model are what it is; a file may name none, and then its type tells
    architecture = names[0] if names else _OF_MODEL_TYPE.get(model_type, model_type or None)
    if architecture not in _DEFAULTS:
        raise Unsupported(f"{source} has architecture {architecture}, LlamaRunner has {', '.join(ARCHITECTURES)}")
    sizes = ("num_attention_heads", "hidden_size", "num_hidden_layers")
    if not any(size in stated for size in sizes):  # a file that says nothing is no model of 7 billion parameters
        raise ValueError(f"{name} is incomplete: it has no {sizes[0]!r}")
    entries = Entries(name, description, _DEFAULTS[architecture])
    if architecture == "MambaForCausalLM":
        return _mamba_config(source, entries)
    if architecture == "Mamba2ForCausalLM":
        return _mamba2_config(source, entries)
    if architecture == "BambaForCausalLM":
        return _bamba_config(source, entries)
    return _llama_config(source, entries, architecture)


# ==== Llama, Mistral, Qwen2 ====


def _llama_config(source: Path | str, entries: Entries, architecture: str) -> LlamaConfig:
    if entries.text("hidden_act") not in ("silu", "swish"):
        raise Unsupported(f"{source} has hidden_act {entries.get('hidden_act')!r}, LlamaRunner has silu")
    if architecture == "LlamaForCausalLM" and entries.flag("mlp_bias"):
        raise Unsupported(f"{source} has mlp_bias, which LlamaRunner does not have")
    if entries.get("quantization_config"):
        raise Unsupported(f"{source} has quantization_config, which LlamaRunner does not have")
    heads, kv_heads, head_dim = _heads(entries)
    layers = entries.whole("num_hidden_layers")
    theta, scaling = _rope(source, entries)
    has_output_bias = architecture == "LlamaForCausalLM" and entries.flag("attention_bias")
    return LlamaConfig(
        architecture=entries.text("model_type", architecture.removesuffix("ForCausalLM").lower()),
        vocab_size=entries.whole("vocab_size"),
        hidden_size=entries.whole("hidden_size"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        norm_epsilon=entries.number("rms_norm_eps"),
        rope_base=theta,
        rope_scaling=scaling,
        windows=_windows(architecture, entries, layers),
        qkv_bias=architecture == "Qwen2ForCausalLM" or has_output_bias,
        output_bias=has_output_bias,
        tied_embedding=entries.flag("tie_word_embeddings"),
    )


def _heads(entries: Entries) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head. null key heads are the query heads, left out the class's."""
    heads, hidden = entries.whole("num_attention_heads"), entries.whole("hidden_size")
    if entries.is_null("num_key_value_heads"):
        return heads, heads, entries.whole("head_dim", max(1, hidden // heads))
    return heads, entries.whole("num_key_value_heads", heads), entries.whole("head_dim", max(1, hidden // heads))


def _rope(source: Path | str, entries: Entries) -> tuple[float, RopeScaling | None]:
    """The base of rotary frequencies and their scaling.

    Of what a file may say twice, transformers obeys rope_scaling and then forgets rope_parameters, its base too; an
    entry inside of the two before one outside; rope_type before type. The length of the first training is the other
    way round: outside before inside.
    """
    rope = _rope_entries(entries)
    theta = rope.number("rope_theta", entries.number("rope_theta", 10000.0))
    kind = rope.text("rope_type", rope.text("type", "default"))
    if any(isinstance(value, dict) for value in rope.values()):
        raise Unsupported(f"{source} has rope parameters of its own for kinds of layers, LlamaRunner has one for all")
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise Unsupported(f"{source} has rope scaling {kind!r}, LlamaRunner has linear and llama3")
    if (part := rope.number("partial_rotary_factor", entries.number("partial_rotary_factor", 1.0))) != 1:
        raise Unsupported(f"{source} has partial_rotary_factor {part}, LlamaRunner turns all of a head")
    factor = rope.number("factor")
    if kind == "linear":
        return theta, RopeScaling("linear", factor=factor)
    original = entries if "original_max_position_embeddings" in entries else rope
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if low >= high:
        raise Unsupported(
            f"{source} has low_freq_factor {low} and high_freq_factor {high}, LlamaRunner needs less and more"
        )
    return theta, RopeScaling(
        "llama3",
        factor=factor,
        low_factor=low,
        high_factor=high,
        original_context=original.whole("original_max_position_embeddings", entries.whole("max_position_embeddings")),
    )


def _rope_entries(entries: Entries) -> Entries:
    """rope_scaling where it says something, else rope_parameters."""
    scaling = entries.part("rope_scaling")
    return scaling if scaling.values() else entries.part("rope_parameters")


def _windows(architecture: str, entries: Entries, layers: int) -> tuple[int | None, ...]:
    """Each layer's window: null is none, left out the class's."""
    if architecture == "LlamaForCausalLM" or entries.is_null("sliding_window"):
        return (None,) * layers
    window = entries.whole("sliding_window", least=0) or None
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    window = window if entries.flag("use_sliding_window") else None
    if "layer_types" not in entries:
        first = min(layers, entries.whole("max_window_layers", least=0))
        return (None,) * first + (window,) * (layers - first)
    kinds = entries.array("layer_types", str)
    expected = ["full_attention"] + ["sliding_attention"] * (window is not None)
    if len(kinds) != layers or not set(kinds) <= set(expected):
        raise entries.wrong("layer_types", kinds, f"{layers} of {' or '.join(expected)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


# ==== Mamba, Mamba-2, Bamba ====


def _mamba_config(source: Path | str, entries: Entries) -> MambaConfig:
    _check_silu(source, entries, "MambaRunner")
    hidden = entries.whole("hidden_size")
    return MambaConfig(
        vocab_size=entries.whole("vocab_size"),
        hidden_size=hidden,
        layers=entries.whole("num_hidden_layers"),
        channels=entries.whole("intermediate_size", entries.whole("expand") * hidden),
        state_size=entries.whole("state_size"),
        dt_rank=_dt_rank(entries, "time_step_rank", hidden),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=entries.number("layer_norm_epsilon"),
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
        tied_embedding=entries.flag("tie_word_embeddings"),
    )


def _mamba2_config(source: Path | str, entries: Entries) -> Mamba2Config:
    _check_silu(source, entries, "Mamba2Runner")
    _check_no_limit(source, entries, "Mamba2Runner")
    config = Mamba2Config(
        vocab_size=entries.whole("vocab_size"),
        hidden_size=entries.whole("hidden_size"),
        layers=entries.whole("num_hidden_layers"),
        heads=entries.whole("num_heads"),
        head_dim=entries.whole("head_dim"),
        groups=entries.whole("n_groups"),
        state_size=entries.whole("state_size"),
        conv_taps=entries.whole("conv_kernel"),
        norm_epsilon=entries.number("layer_norm_epsilon"),
        projection_bias=entries.flag("use_bias"),
        conv_bias=entries.flag("use_conv_bias"),
        tied_embedding=entries.flag("tie_word_embeddings"),
    )
    if config.channels != (channels := entries.whole("expand") * config.hidden_size):
        raise entries.wrong("num_heads", config.heads, f"heads of {config.head_dim} that share {channels} channels")
    return config


def _bamba_config(source: Path | str, entries: Entries) -> BambaConfig:
    _check_silu(source, entries, "BambaRunner")
    _check_no_limit(source, entries, "BambaRunner")
    if entries.flag("mlp_bias"):
        raise ValueError(f"{source} has mlp_bias True, BambaRunner has none")
    rope = _rope_entries(entries)
    if (kind := rope.text("rope_type", rope.text("type", "default"))) != "default":
        raise ValueError(f"{source} has rope scaling {kind!r}, BambaRunner has none")
    hidden, layers = entries.whole("hidden_size"), entries.whole("num_hidden_layers")
    heads, kv_heads, head_dim = _heads(entries)
    places = set(entries.array("attn_layer_indices", int, []))
    is_attention = tuple(layer in places for layer in range(layers))
    if not any(is_attention) or all(is_attention):
        raise entries.wrong("attn_layer_indices", sorted(places), f"some of the {layers} layers, and not all")
    shared = {
        "vocab_size": entries.whole("vocab_size"),
        "hidden_size": hidden,
        "norm_epsilon": entries.number("rms_norm_eps"),
        "tied_embedding": entries.flag("tie_word_embeddings"),
    }
    attention = LlamaConfig(
        architecture=entries.text("model_type", "bamba"),
        intermediate_size=entries.whole("intermediate_size"),
        layers=sum(is_attention),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=entries.whole("max_position_embeddings"),
        rope_base=rope.number("rope_theta", entries.number("rope_theta", 10000.0)),
        qkv_bias=entries.flag("attention_bias"),
        output_bias=entries.flag("attention_bias"),
        **shared,
    )
    state_heads = entries.whole("mamba_n_heads")
    channels = entries.whole("mamba_expand") * hidden
    is_stated = entries.get("mamba_d_head", "auto") != "auto"
    state_head_dim = entries.whole("mamba_d_head") if is_stated else channels // state_heads
    if state_heads * state_head_dim != channels:
        raise entries.wrong("mamba_n_heads", state_heads, f"heads that share {channels} channels")
    recurrence = Mamba2Config(
        layers=layers - sum(is_attention),
        heads=state_heads,
        head_dim=state_head_dim,
        groups=entries.whole("mamba_n_groups"),
        state_size=entries.whole("mamba_d_state"),
        conv_taps=entries.whole("mamba_d_conv"),
        projection_bias=entries.flag("mamba_proj_bias"),
        conv_bias=entries.flag("mamba_conv_bias"),
        **shared,
    )
    return BambaConfig(attention, recurrence, is_attention, int(head_dim * rope.number("partial_rotary_factor", 0.5)))


def _check_no_limit(source: Path | str, entries: Entries, runner: str) -> None:
    limit = entries.get("time_step_limit", [0.0, math.inf])
    if not isinstance(limit, (list, tuple)) or len(limit) != 2:
        raise entries.wrong("time_step_limit", limit, "two numbers")
    lowest, highest = limit
    highest = highest.get("__float__") if isinstance(highest, dict) else highest  # how transformers writes infinity
    if type(lowest) not in (int, float) or lowest > 0 or highest not in (math.inf, "Infinity"):
        raise ValueError(f"{source} has time_step_limit {lowest, highest}, {runner} has no limit")


def _check_silu(source: Path | str, entries: Entries, runner: str) -> None:
    if entries.text("hidden_act") not in ("silu", "swish"):
        raise ValueError(f"{source} has hidden_act {entries.get('hidden_act')!r}, {runner} has silu")


def _dt_rank(entries: Entries, key: str, hidden: int) -> int:
    return -(-hidden // 16) if entries.get(key, "auto") == "auto" else entries.whole(key)


def _mamba_ssm_config(source: Path | str, entries: Entries) -> MambaConfig | Mamba2Config:
    """Of the package mamba_ssm, and of Codestral-Mamba, which has other names for some of it."""
    is_codestral = "dim" in entries
    hidden = entries.whole("dim" if is_codestral else "d_model")
    layer = entries.part("ssm_cfg")
    kind = "Mamba2" if is_codestral else layer.text("layer", "Mamba1")
    if kind not in ("Mamba1", "Mamba2"):
        raise ValueError(f"{source} has layers of {kind}, the families are Mamba1 and Mamba2")
    for name, wanted in (
        ("rms_norm", True),
        ("attn_layer_idx", []),
        ("d_intermediate", 0),
        ("norm_before_gate", False),
    ):
        if (found := layer.get(name, entries.get(name, wanted))) != wanted:
            raise ValueError(f"{source} has {name} {found}, models of {kind} have {wanted}")
    multiple = entries.whole("pad_vocab_size_multiple", 1 if is_codestral else 8)
    channels = layer.whole("expand", 2) * hidden
    shared = {
        "vocab_size": -(-entries.whole("vocab_size") // multiple) * multiple,
        "hidden_size": hidden,
        "layers": entries.whole("n_layers" if is_codestral else "n_layer"),
        "conv_taps": layer.whole("d_conv", 4),
        "norm_epsilon": 1e-5,
        "projection_bias": layer.flag("bias", False),
        "conv_bias": layer.flag("conv_bias", True),
        "tied_embedding": entries.flag("tie_embeddings", True),
    }
    if kind == "Mamba1":
        rank = _dt_rank(layer, "dt_rank", hidden)
        return MambaConfig(channels=channels, state_size=layer.whole("d_state", 16), dt_rank=rank, **shared)
    head_dim = layer.whole("headdim", 64)
    return Mamba2Config(
        heads=channels // head_dim,
        head_dim=head_dim,
        groups=entries.whole("n_groups", 1) if is_codestral else layer.whole("ngroups", 1),
        state_size=layer.whole("d_state", 128),
        **shared,
    )
