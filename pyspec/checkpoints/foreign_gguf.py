"""GGUF files of architectures that our kernels do not run: transformers' models, filled from the file.

What transformers reads of such files by itself leaves out metadata, such as the base of StarCoder 2's rotary
frequencies. Here a key that is not read for its architecture is refused, and so is a tensor that is nowhere put.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pyspec.checkpoints.memory import check_memory
from pyspec.entries import Entries

if TYPE_CHECKING:
    from pyspec.checkpoints.gguf import GGUFFile

_SIZES = {  # entries of configurations by keys of metadata
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
}
_OTHERS = {"attention.head_count_kv", "attention.key_length", "attention.value_length", "vocab_size"}
_OTHERS |= {"rope.dimension_count", "rope.freq_base", "rope.scaling.type"}
_EPSILONS = ("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon")


@dataclass(frozen=True)
class _Architecture:
    """How a file of llama.cpp's becomes a model of transformers'.

    Args:
        model: the class.
        epsilon: what its configuration calls the epsilon of norms, empty where it is not stated.
        settings: further entries of the configuration, by a function of the metadata and the shapes of tensors.
        keys: those of the metadata that settings reads, or that say nothing.
        place: a tensor as the model has it, by a function of the tensor, its name without the layer, and the
            configuration.
    """

    model: str
    epsilon: str
    settings: Callable[[Entries, dict[str, tuple[int, ...]]], dict[str, Any]] = lambda entries, shapes: {}
    keys: tuple[str, ...] = ()
    place: Callable[[Tensor, str, Any], Tensor] = lambda tensor, name, config: tensor


def _transposed(tensor: Tensor, name: str, config) -> Tensor:
    """GPT-2's matrices lie the other way round."""
    return tensor.t() if tensor.dim() == 2 and name.startswith(("attn_", "ffn_")) else tensor


def _by_head(tensor: Tensor, name: str, config) -> Tensor:
    """GPT-NeoX has query, key and value of a head side by side, the file all queries first."""
    if not name.startswith("attn_qkv"):
        return tensor
    heads = config.num_attention_heads
    return tensor.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def _by_group(tensor: Tensor, name: str, config) -> Tensor:
    """Falcon has a key head and its value behind the queries that share them, the file all queries first."""
    if not name.startswith("attn_qkv"):
        return tensor
    groups, width = config.num_kv_heads, config.hidden_size // config.num_attention_heads
    q, k, v = tensor.split([config.hidden_size, groups * width, groups * width])
    return torch.cat([part.unflatten(0, (groups, -1)) for part in (q, k, v)], 1).flatten(0, 1)


def _halved(tensor: Tensor, name: str, config) -> Tensor:
    """OLMo turns the two halves of a head, the file has them interleaved."""
    if not name.startswith(("attn_q", "attn_k")):
        return tensor
    width = config.hidden_size // config.num_attention_heads
    return tensor.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def _norms_about_1(tensor: Tensor, name: str, config) -> Tensor:
    """Nemotron has a norm's weights less 1."""
    return tensor - 1 if "norm.weight" in name else tensor


def _inner(entries: Entries, shapes: dict) -> dict[str, Any]:
    return {"n_inner": entries.whole("feed_forward_length")}


def _starcoder2(entries: Entries, shapes: dict) -> dict[str, Any]:
    return {"use_bias": "blk.0.ffn_up.bias" in shapes, "sliding_window": None}


def _falcon(entries: Entries, shapes: dict) -> dict[str, Any]:
    groups = entries.whole("attention.head_count_kv", 1)
    kind = {"multi_query": groups == 1, "new_decoder_architecture": "blk.0.attn_norm_2.weight" in shapes}
    kind["ffn_hidden_size"] = entries.whole("feed_forward_length")
    return kind | {"num_kv_heads": groups, "alibi": False, "bias": False, "parallel_attn": True}


_ARCHITECTURES = {
    "gpt2": _Architecture("GPT2LMHeadModel", "layer_norm_epsilon", _inner, place=_transposed),
    "starcoder": _Architecture(
        "GPTBigCodeForCausalLM", "layer_norm_epsilon", lambda *read: _inner(*read) | {"multi_query": True}
    ),
    "starcoder2": _Architecture("Starcoder2ForCausalLM", "norm_epsilon", _starcoder2),
    "gptneox": _Architecture(
        "GPTNeoXForCausalLM",
        "layer_norm_eps",
        lambda entries, _: {"use_parallel_residual": entries.flag("use_parallel_residual", True)},
        ("use_parallel_residual",),
        _by_head,
    ),
    "phi2": _Architecture("PhiForCausalLM", "layer_norm_eps"),
    "falcon": _Architecture("FalconForCausalLM", "layer_norm_epsilon", _falcon, ("tensor_data_layout",), _by_group),
    "nemotron": _Architecture("NemotronForCausalLM", "norm_eps", place=_norms_about_1),
    "hunyuan-dense": _Architecture(  # its scaling is in the base of its frequencies
        "HunYuanDenseV1ForCausalLM",
        "rms_norm_eps",
        lambda entries, _: {"head_dim": entries.whole("embedding_length") // entries.whole("attention.head_count")},
        ("rope.scaling.factor", "rope.scaling.original_context_length"),
    ),
    "olmo": _Architecture(
        "OlmoForCausalLM",
        "",
        lambda entries, _: {"clip_qkv": entries.get("attention.clamp_kqv")},
        ("attention.clamp_kqv",),
        _halved,
    ),
}


def load_foreign_gguf(file: GGUFFile, tokenizer, dtype: torch.dtype, device: torch.device, announce=None):
    """The TransformersRunner of the model in a GGUF file, its values in dtype; for announce see pyspec.load.

    Raises:
        MemoryError: it cannot fit.
        ValueError: the architecture is none of those here, or the file has metadata or tensors that this does not read.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        raise ValueError(f"through transformers run GGUF files of {', '.join(sorted(_ARCHITECTURES))}")
    try:
        import transformers
    except ImportError:
        raise ImportError(f"{file.path} of {name} needs transformers: pip install pyspec-kernels[hf]") from None
    from pyspec.runners.foreign import TransformersRunner
    from pyspec.runners.foreign_support import check_supported

    architecture = _ARCHITECTURES[name]
    model_class = getattr(transformers, architecture.model)
    rows = file.shapes.get("token_embd.weight", (0,))[0]
    if tokenizer is not None and tokenizer.vocab_size > rows:
        raise ValueError(f"{file.path} has {tokenizer.vocab_size} tokens, its embedding only {rows} rows")
    config = _config(file, architecture, model_class.config_class, tokenizer)
    check_supported(model_class, config)

    def need(dtype: torch.dtype):
        return sum(map(math.prod, file.shapes.values())) * dtype.itemsize, str(dtype).removeprefix("torch."), 0, 0

    check_memory(file.path, device, need, dtype, {"bfloat16": torch.bfloat16}, announce)
    tensors = _tensors(file, architecture, model_class, config, dtype)
    with torch.device("cpu"):  # the caller's default device may have no memory, or too little
        model, report = model_class.from_pretrained(
            None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"{file.path} has no tensor for {min(report['missing_keys'])}")
    return TransformersRunner(model.to(device), tokenizer, tokenizer.eos_tokens if tokenizer else ())


def _config(file: GGUFFile, architecture: _Architecture, config_class: type, tokenizer):
    name, shapes = file.metadata["general.architecture"], file.shapes
    entries = Entries(str(file.path), file.metadata, prefix=f"{name}.", noun="metadata ")
    read = {f"{name}.{key}" for key in (*_SIZES, *_OTHERS, *_EPSILONS, *architecture.keys)}
    for key in file.metadata:
        if key.startswith(f"{name}.") and key not in read:
            raise ValueError(f"{file.path} has metadata {key!r}, which is not read for this architecture")
    if (kind := entries.text("rope.scaling.type", "none")) != "none":
        raise ValueError(f"{file.path} has rope scaling {kind!r}, which is not read for this architecture")
    sizes = {ours: entries.whole(key) for key, ours in _SIZES.items()}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    width = hidden // heads
    for key in ("attention.key_length", "attention.value_length"):
        if hidden % heads or entries.whole(key, width) != width:
            raise ValueError(f"{file.path} has heads whose width is not {hidden} / {heads}")
    sizes["num_key_value_heads"] = entries.whole("attention.head_count_kv", heads)
    rope = {"rope_type": "default", "rope_theta": entries.number("rope.freq_base", 10000.0)}
    rope["partial_rotary_factor"] = entries.whole("rope.dimension_count", width) / width
    key = _EPSILONS[_EPSILONS[1] in entries]
    epsilon = {architecture.epsilon: entries.number(key)} if architecture.epsilon else {}
    ends = sorted(tokenizer.eos_tokens) if tokenizer else None
    return config_class(
        **sizes,
        **epsilon,
        **architecture.settings(entries, shapes),
        rope_parameters=rope,
        vocab_size=shapes.get("token_embd.weight", (0,))[0],
        tie_word_embeddings="output.weight" not in shapes,
        bos_token_id=None,
        eos_token_id=ends or None,
    )


def _tensors(file: GGUFFile, architecture: _Architecture, model_class: type, config, dtype) -> dict[str, Tensor]:
    """All tensors under the names that the model has for them."""
    import gguf

    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[file.metadata["general.architecture"]], config.num_hidden_layers)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in model_class(config).state_dict().items()}
    found = {}
    for name in expected:
        stem, _, suffix = name.rpartition(".")
        ours = names.get_name(stem)
        if not (config.tie_word_embeddings and ours in ("output", None)):  # then the embedding is the head
            found[f"{ours}.{suffix}"] = name
    for name in sorted(found.keys() ^ file.shapes.keys()):
        state = "no tensor" if name in found else "a tensor"
        raise ValueError(f"{file.path} has {state} {name}, which does not fit its architecture")
    tensors = {}
    for name, theirs in found.items():
        blocks = [block if block.dim() == 1 else block.to(dtype) for block in file.rows(name)]
        tensor = architecture.place(torch.cat(blocks), re.sub(r"^blk\.\d+\.", "", name), config).to(dtype).contiguous()
        if tuple(tensor.shape) != expected[theirs]:
            shape = file.shapes[name]
            raise ValueError(f"{file.path}: tensor {name} has shape {shape}, which does not fit its architecture")
        tensors[theirs] = tensor
    return tensors
