"""Llama-shaped models in GGUF files: their shape as llama.cpp reads it, and their tensors under other names."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyspec.architectures.llama import LlamaConfig, RopeScaling, Unsupported
from pyspec.checkpoints.gguf import GGUFFile
from pyspec.entries import Entries

__all__ = ["ARCHITECTURES", "GGUFCheckpoint", "llama_config"]

ARCHITECTURES = ("llama", "mistral", "qwen2")

_NAMES = {  # of a layer's tensors, in GGUF and in Hugging Face checkpoints
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
_GLOBAL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def llama_config(file: GGUFFile) -> LlamaConfig:
    """The shape of the model in a GGUF file.

    Raises:
        Unsupported: another architecture, or a feature that LlamaRunner does not have.
        ValueError: metadata is missing, or is not what it should be.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise Unsupported(
            f"{file.path} has architecture {architecture!r}, supported in GGUF files are {', '.join(ARCHITECTURES)}"
        )
    entries = Entries(str(file.path), file.metadata, prefix=f"{architecture}.", noun="metadata ")
    shapes = file.shapes
    hidden, layers = entries.whole("embedding_length"), entries.whole("block_count")
    heads = _of_all_layers(entries, "attention.head_count", layers)
    head_dim = entries.whole("attention.key_length", max(1, hidden // heads))
    if entries.whole("attention.value_length", head_dim) != head_dim:
        raise Unsupported(f"{file.path} has values of another width than keys, which is not supported")
    if entries.whole("rope.dimension_count", head_dim) != head_dim:
        raise Unsupported(f"{file.path} rotates only part of each head, which is not supported")
    if entries.whole("expert_count", 0, least=0):
        raise Unsupported(f"{file.path} is a mixture of experts, which is not supported")
    return LlamaConfig(
        architecture=architecture,
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        hidden_size=hidden,
        intermediate_size=_of_all_layers(entries, "feed_forward_length", layers),
        layers=layers,
        heads=heads,
        kv_heads=_of_all_layers(entries, "attention.head_count_kv", layers, heads),
        head_dim=head_dim,
        context_length=entries.whole("context_length"),
        norm_epsilon=entries.number("attention.layer_norm_rms_epsilon"),
        rope_base=entries.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, entries, head_dim),
        windows=(entries.whole("attention.sliding_window", 0, least=0) or None,) * layers,
        qkv_bias="blk.0.attn_q.bias" in shapes,
        output_bias="blk.0.attn_output.bias" in shapes,
        tied_embedding="output.weight" not in shapes,
    )


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


def _rope_scaling(file: GGUFFile, entries: Entries, head_dim: int) -> RopeScaling | None:
    """As llama.cpp has it: a factor without a type is linear, an old key may state it, 0 is none, the type none wins.

    The factor of each frequency that rope_freqs.weight holds comes on top.
    """
    kind = entries.text("rope.scaling.type", "linear")
    key = "rope.scaling.factor" if "rope.scaling.factor" in entries else "rope.scale_linear"
    factor = 1.0 if entries.get(key, 0) == 0 else entries.number(key)
    if kind not in ("none", "linear"):
        raise Unsupported(f"{file.path} has rope scaling {kind!r}, supported are linear and llama3")
    if entries.number("rope.scaling.attn_factor", 1.0) != 1:
        raise Unsupported(
            f"{file.path} scales rotated queries and keys (rope.scaling.attn_factor), which is not supported"
        )
    factor = 1.0 if kind == "none" else factor
    if (shape := file.shapes.get("rope_freqs.weight")) is None:
        return None if factor == 1 else RopeScaling("linear", factor=factor)
    if shape != (head_dim // 2,):
        raise ValueError(f"{file.path}: tensor rope_freqs.weight must have shape {(head_dim // 2,)}, got {shape}")
    table = torch.cat(list(file.rows("rope_freqs.weight")))
    if not (table.isfinite() & (table > 0)).all():
        raise ValueError(f"{file.path}: tensor rope_freqs.weight must hold numbers above 0")
    return RopeScaling("table", factor=factor, table=tuple(table.tolist()))


class GGUFCheckpoint:
    """The tensors of a GGUF file under their Hugging Face names: `shapes` of all, and `blocks` of one."""

    def __init__(self, file: GGUFFile, config: LlamaConfig):
        self._file = file
        self._config = config
        self._names = {_hugging_face_name(name): name for name in file.shapes if name != "rope_freqs.weight"}
        self.shapes = {name: file.shapes[original] for name, original in self._names.items()}

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers and the fp32 values of these rows."""
        original = self._names[name]
        order = torch.arange(self.shapes[name][0], device="cpu")
        if self._config.architecture == "llama" and original.split(".")[2:3] in (["attn_q"], ["attn_k"]):
            # llama.cpp rotates neighbours, so its files have the two halves of each head interleaved
            order = order.view(-1, 2, self._config.head_dim // 2).transpose(1, 2).flatten()
        start = 0
        for rows in self._file.rows(original):
            yield order[start : start + len(rows)], rows
            start += len(rows)


def _hugging_face_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{_GLOBAL_NAMES.get(stem, stem)}.{kind}"
    _, layer, part = (stem + ".").split(".", 2)
    part = part.rstrip(".")
    return f"model.layers.{layer}.{_NAMES.get(part, part)}.{kind}"
