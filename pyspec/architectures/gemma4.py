"""Gemma 4 (text): layers of two kinds, those with a window and those without, whose heads are wider and fewer.

Scores are not scaled, for queries, keys and values are normed. The small models read a second embedding in every layer,
and their last layers read the keys of earlier ones; the 26B has experts beside the feed-forward part. Keys of layers
without a window may be their values too, before either is normed: their rows are then there twice.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from pyspec.architectures import FAMILIES, GGUF, Family, Unsupported
from pyspec.architectures.gemma4_layers import Gemma4Config, Gemma4Weights
from pyspec.architectures.mixture import read_gguf_choices
from pyspec.architectures.rotary import RopeScaling
from pyspec.architectures.shapes import GGUF_TENSORS, read_activation, read_gguf_shape, read_kinds, read_shape
from pyspec.entries import Entries
from pyspec.runners.attention import AttentionRunner

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = []


# ==== config.json ====

_DEFAULTS = {"vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30}
_DEFAULTS |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512}
_DEFAULTS |= {"max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
_DEFAULTS |= {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "sliding_window": 512}
_DEFAULTS |= {"attention_k_eq_v": False, "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
_DEFAULTS |= {"hidden_size_per_layer_input": 256, "enable_moe_block": False}
_ROPES = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
_DEFAULTS |= {"rope_parameters": {"full_attention": _ROPES, "sliding_attention": {}}}
_PERIOD = 6  # of layers with a window, of which the last has none


def _read(source: Path | str, entries: Entries, architecture: str) -> Gemma4Config:
    shape = read_shape(source, entries, architecture)
    for name, ours in (("use_bidirectional_attention", (None, "vision")), ("attention_bias", (False,))):
        if entries.get(name) not in ours:
            raise Unsupported(f"{source} has {name} {entries.get(name)!r}, which AttentionRunner does not have")
    layers = shape["layers"]
    is_local = read_kinds(entries, layers, lambda layer: (layer + 1) % _PERIOD != 0, has_window=True)
    is_global = (*(not local for local in is_local[:-1]), True)
    kv_heads, head_dim = _global_heads(source, entries, is_global)
    shared = entries.whole("num_kv_shared_layers", least=0, most=layers - 1)
    if shared and (names := set(is_global) - set(is_global[: layers - shared])):
        raise entries.wrong(
            "num_kv_shared_layers", shared, f"few enough to leave a layer with keys of {len(names)} kind"
        )
    return Gemma4Config(
        **shape,
        **_ropes(source, entries, head_dim),
        **_experts(entries),
        is_global=is_global,
        global_kv_heads=kv_heads,
        global_head_dim=head_dim,
        shared_layers=shared,
        shared_intermediate_size=shape["intermediate_size"] * (1 + entries.flag("use_double_wide_mlp")),
        input_size=_input_size(source, entries, shape["vocab_size"]),
        windows=tuple(None if each else entries.whole("sliding_window") for each in is_global),
        activation=read_activation(source, entries, "hidden_activation"),
        embedding_scale=math.sqrt(shape["hidden_size"]),
        logits_softcap=entries.number("final_logit_softcapping") if "final_logit_softcapping" in entries else None,
        **_ALIKE,
    )


_ALIKE = {"head_norm": "head", "attention_scale": 1.0}


def _global_heads(source: Path | str, entries: Entries, is_global: tuple[bool, ...]) -> tuple[int, int]:
    """Key heads and their width in layers without a window: by entries of their own, or by per_layer_config."""
    local = entries.whole("num_key_value_heads")
    if "per_layer_config" not in entries:
        key = "num_global_key_value_heads"
        is_own = entries.flag("attention_k_eq_v") and key in entries
        return entries.whole(key) if is_own else local, entries.whole("global_head_dim")
    found, stated = [], entries.part("per_layer_config")
    for layer, each in enumerate(is_global):
        own = stated.part(str(layer))
        expected = {"head_dim", "num_key_value_heads"} if each else set()
        if unknown := {key.rpartition(".")[2] for key in own.keys()} - expected:
            raise Unsupported(f"{source} has per_layer_config of layer {layer} with {', '.join(sorted(unknown))}")
        if each:
            found.append((own.whole("num_key_value_heads", local), own.whole("head_dim", entries.whole("head_dim"))))
    if len(set(found)) > 1:
        raise Unsupported(f"{source} has per_layer_config with several kinds of layers without a window: {found}")
    return found[0]


def _ropes(source: Path | str, entries: Entries, head_dim: int) -> dict:
    full, local = (entries.part("rope_parameters").part(f"{kind}_attention") for kind in ("full", "sliding"))
    kind = full.text("rope_type", "default")
    if kind not in ("default", "proportional") or local.text("rope_type", "default") != "default":
        raise Unsupported(f"{source} has rope_type {kind!r} and {local.get('rope_type')!r} for its kinds of layers")
    part, factor = full.number("partial_rotary_factor", 1.0), full.number("factor", 1.0)
    if kind == "default":
        part = factor = 1.0
    return {
        "rope_base": full.number("rope_theta", 1e6),
        "rope_scaling": RopeScaling("linear", factor=factor) if factor != 1 else None,
        "local_rope_base": local.number("rope_theta", 1e4),
        "global_turned": int(part * head_dim // 2),
    }


def _input_size(source: Path | str, entries: Entries, vocab_size: int) -> int:
    if entries.is_null("hidden_size_per_layer_input"):
        return 0
    size = entries.whole("hidden_size_per_layer_input", least=0)
    if size and (rows := entries.whole("vocab_size_per_layer_input", vocab_size)) != vocab_size:
        raise Unsupported(f"{source} has vocab_size_per_layer_input {rows}, its vocabulary is {vocab_size}")
    return size


def _experts(entries: Entries) -> dict[str, int]:
    if not entries.flag("enable_moe_block"):
        return {}
    count = entries.whole("num_experts")
    chosen = entries.whole("top_k_experts", most=count)
    return {"experts": count, "experts_per_token": chosen, "expert_size": entries.whole("moe_intermediate_size")}


# ==== GGUF ====


def _read_gguf(file: GGUFFile, entries: Entries) -> Gemma4Config:
    """The shape of the model in a GGUF file, as llama.cpp reads it: key_length is of layers without a window."""
    layers = entries.whole("block_count")
    is_local = entries.array("attention.sliding_window_pattern", bool)
    if len(is_local) != layers:
        raise entries.wrong("attention.sliding_window_pattern", is_local, f"true or false for each of {layers} layers")
    is_global, shared = tuple(not local for local in is_local), entries.whole("attention.shared_kv_layers", 0, least=0)
    kv_heads, sizes = (_of_layers(entries, key, layers) for key in ("attention.head_count_kv", "feed_forward_length"))
    stated = {"attention.head_count_kv": kv_heads[0], "feed_forward_length": sizes[0]}
    shape = read_gguf_shape(file, entries.with_own(stated), is_mixture=True)
    global_head_dim = shape["head_dim"]
    shape["head_dim"] = entries.whole("attention.key_length_swa")
    of_kind = {kind: {kv_heads[layer] for layer in range(layers) if is_global[layer] == kind} for kind in is_global}
    if any(len(found) > 1 for found in of_kind.values()) or len(set(sizes[layers - shared :])) > 1:
        raise Unsupported(f"{file.path} has layers of one kind that differ in their heads or sizes")
    shape["kv_heads"] = min(of_kind.get(False, of_kind[True]))
    experts = {}
    if entries.whole("expert_count", 0, least=0):
        experts = read_gguf_choices(entries) | {"expert_size": entries.whole("expert_feed_forward_length")}
    cap = "final_logit_softcapping"
    return Gemma4Config(
        **shape,
        **experts,
        is_global=is_global,
        global_kv_heads=min(of_kind[True]),
        global_head_dim=global_head_dim,
        global_turned=global_head_dim // 2,  # rope_freqs leaves some at no angle
        shared_layers=shared,
        shared_intermediate_size=sizes[-1],
        input_size=entries.whole("embedding_length_per_layer_input", 0, least=0),
        windows=tuple(None if each else entries.whole("attention.sliding_window") for each in is_global),
        local_rope_base=entries.number("rope.freq_base_swa", 10000.0),
        activation="gelu_tanh",
        embedding_scale=math.sqrt(shape["hidden_size"]),
        logits_softcap=entries.number(cap) if cap in entries else None,
        **_ALIKE,
    )


def _of_layers(entries: Entries, key: str, layers: int) -> list[int]:
    """A number that may be stated once, or for each layer."""
    if not isinstance(entries.get(key), list):
        return [entries.whole(key)] * layers
    values = entries.array(key, int)
    if len(values) != layers or min(values) < 1:
        raise entries.wrong(key, values, f"a number for each of {layers} layers")
    return values


_TENSORS = GGUF_TENSORS | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_up_exps": "experts.*.gate_up_proj",
    "ffn_down_exps": "experts.*.down_proj",
    "layer_output_scale": "layer_scalar",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
}
_GGUF = GGUF(("gemma4",), _read_gguf, _TENSORS)
_ARCHITECTURES = dict.fromkeys(("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), _DEFAULTS)
_FAMILY = Family(_ARCHITECTURES, _read, Gemma4Weights, AttentionRunner, _GGUF)
FAMILIES.register("gemma4", _FAMILY, "Gemma 4 (text)")
