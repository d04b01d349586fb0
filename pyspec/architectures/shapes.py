"""What the descriptions of attention models have in common: their sizes, their windows, their names in GGUF files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.architectures import Unsupported
from pyspec.architectures.rotary import read_gguf_scaling
from pyspec.entries import Entries

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

__all__ = [
    "DEFAULTS",
    "GGUF_RECURRENT",
    "GGUF_TENSORS",
    "interleaved_rows",
    "read_activation",
    "read_gguf_shape",
    "read_heads",
    "read_kinds",
    "read_shape",
]

# ==== config.json ====

DEFAULTS = {"num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32, "hidden_act": "silu"}
DEFAULTS |= {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_shape(
    source: Path | str, entries: Entries, architecture: str, *, epsilon: str = "rms_norm_eps"
) -> dict[str, Any]:
    """The sizes of a model, fields of a LlamaConfig that all families state alike; epsilon: of norms, its key."""
    if entries.get("mlp_bias"):
        raise Unsupported(f"{source} has mlp_bias, which AttentionRunner does not have")
    heads, kv_heads, head_dim = read_heads(entries)
    return {
        "architecture": entries.text("model_type", architecture.removesuffix("ForCausalLM").lower()).removesuffix(
            "_text"
        ),
        "vocab_size": entries.whole("vocab_size"),
        "hidden_size": entries.whole("hidden_size"),
        "intermediate_size": entries.whole("intermediate_size"),
        "layers": entries.whole("num_hidden_layers"),
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "context_length": entries.whole("max_position_embeddings"),
        "norm_epsilon": entries.number(epsilon),
        "tied_embedding": entries.flag("tie_word_embeddings"),
    }


def read_heads(entries: Entries) -> tuple[int, int, int]:
    """Query heads, key heads and the width of a head. null key heads are the query heads, left out the class's."""
    heads, hidden = entries.whole("num_attention_heads"), entries.whole("hidden_size")
    if entries.is_null("num_key_value_heads"):
        return heads, heads, entries.whole("head_dim", max(1, hidden // heads))
    return heads, entries.whole("num_key_value_heads", heads), entries.whole("head_dim", max(1, hidden // heads))


def read_activation(source: Path | str, entries: Entries, key: str = "hidden_act") -> str:
    """The activation of swiglu that an entry names."""
    if (found := entries.text(key)) not in _ACTIVATIONS:
        raise Unsupported(f"{source} has {key} {found!r}, AttentionRunner has {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[found]


def read_kinds(entries: Entries, layers: int, is_local: Callable[[int], bool], *, has_window: bool) -> list[bool]:
    """Whether each layer has a window, by layer_types, or where it is left out, by a layer's number."""
    if "layer_types" not in entries:
        return [has_window and is_local(layer) for layer in range(layers)]
    kinds = entries.array("layer_types", str)
    expected = ["full_attention"] + ["sliding_attention"] * has_window
    if len(kinds) != layers or not set(kinds) <= set(expected):
        raise entries.wrong("layer_types", kinds, f"{layers} of {' or '.join(expected)}")
    return [kind == "sliding_attention" for kind in kinds]


# ==== GGUF ====

GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# of recurrent layers: A itself is there, not its logarithm, and taps without the dimension of one channel
GGUF_RECURRENT = {"ssm_a": lambda a: (-a).log(), "ssm_conv1d.weight": lambda taps: taps[:, None]}


def read_gguf_shape(file: GGUFFile, entries: Entries, *, is_mixture: bool = False) -> dict[str, Any]:
    """The sizes of the model in a GGUF file, fields of a LlamaConfig that all families state alike."""
    shapes = file.shapes
    hidden, layers = entries.whole("embedding_length"), entries.whole("block_count")
    expert_size = entries.whole("expert_feed_forward_length", 1) if is_mixture else None
    heads = _of_all_layers(entries, "attention.head_count", layers)
    head_dim = entries.whole("attention.key_length", max(1, hidden // heads))
    if entries.whole("attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{file.path} has values of another width than keys, which is not supported")
    layer_norm, rms = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
    if not is_mixture and entries.whole("expert_count", 0, least=0):
        raise Unsupported(f"{file.path} is a mixture of experts, which is not supported")
    return {
        "architecture": file.metadata["general.architecture"],
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        "hidden_size": hidden,
        "intermediate_size": _of_all_layers(entries, "feed_forward_length", layers, expert_size),
        "layers": layers,
        "heads": heads,
        "kv_heads": _of_all_layers(entries, "attention.head_count_kv", layers, heads),
        "head_dim": head_dim,
        "context_length": entries.whole("context_length"),
        "norm_epsilon": entries.number(layer_norm if layer_norm in entries else rms),
        "rope_base": entries.number("rope.freq_base", 10000.0),
        "rope_scaling": read_gguf_scaling(file, entries, entries.whole("rope.dimension_count", head_dim)),
        "qkv_bias": "blk.0.attn_q.bias" in shapes or "blk.0.attn_qkv.bias" in shapes,
        "output_bias": "blk.0.attn_output.bias" in shapes,
        "tied_embedding": "output.weight" not in shapes,
    }


def _of_all_layers(entries: Entries, key: str, layers: int, default: int | None = None) -> int:
    """A number that may be stated once, or for each layer."""
    if not isinstance(entries.get(key), list):
        return entries.whole(key, default)
    values = entries.array(key, int)
    if len(values) != layers:
        raise entries.wrong(key, values, f"one number, or one for each of {layers} layers")
    if len(set(values)) > 1:
        raise Unsupported(f"{entries.name} has layers that differ in {key}, which is not supported")
    return Entries(entries.name, {key: values[0]}).whole(key)


def interleaved_rows(config, name: str, rows: int) -> Tensor | None:
    """The order of rows where neighbours are turned: files have the two halves of each head interleaved.

    Of a GGUF file, where llama.cpp turns neighbours; or as a Family's row_order.
    """
    if not re.search(r"attn_[qk]$|self_attn\.[qk]_proj\.", name):
        return None
    heads, width = torch.arange(rows, device="cpu").view(-1, config.head_dim), config.rope_width or config.head_dim
    turned = heads[:, :width].unflatten(1, (2, width // 2)).transpose(1, 2).flatten(1)
    return torch.cat((turned, heads[:, width:]), 1).flatten()
