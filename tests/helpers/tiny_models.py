"""Tiny random models, as transformers makes and saves them."""

import gguf
import numpy as np
import torch

from tests.helpers.random_llama import VOCABULARY
from tests.helpers.weight_formats import gguf_blocks

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
KINDS = {
    "llama": ("Llama", {}),
    "llama_tied_with_biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama3_scaling": ("Llama", {"rope_parameters": LLAMA3_SCALING}),
    "linear_scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}),
    "qwen2": ("Qwen2", {}),
    "qwen2_some_windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "mistral": ("Mistral", {"sliding_window": 6}),
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA4_SCALING = _YARN | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5, "rope_theta": 100.0}
_LLAMA4_SCALING |= {"mscale": 1.0, "mscale_all_dim": 0.5}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
_GEMMA4_LAYERS = ["sliding_attention", "full_attention"] * 3
_GEMMA4 = {"sliding_window": 6, "tie_word_embeddings": True, "hidden_size_per_layer_input": 0, "eos_token_id": 3}
_GEMMA4 |= {"final_logit_softcapping": 30.0}
_GEMMA4 |= {
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 50.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
OTHER_KINDS = {
    "qwen3": ("Qwen3", {}),
    "qwen3_with_windows_and_biases": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "attention_bias": True},
    ),
    "gemma": ("Gemma", {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"sliding_window": 6, "query_pre_attn_scalar": 40, "attn_logit_softcapping": 5.0}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 6, "num_hidden_layers": 3, "query_pre_attn_scalar": 40, "rope_parameters": _GEMMA3_ROPES}
        | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma4": (
        "Gemma4",
        _GEMMA4
        | {"global_head_dim": 128, "num_kv_shared_layers": 3, "use_double_wide_mlp": True, "num_hidden_layers": 6}
        | {
            "layer_types": _GEMMA4_LAYERS[:6],
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "gemma4_with_experts": (
        "Gemma4",
        _GEMMA4
        | {"global_head_dim": 128, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "enable_moe_block": True}
        | {
            "num_hidden_layers": 3,
            "layer_types": _GEMMA4_LAYERS[:2] + _GEMMA4_LAYERS[1:2],
            "num_experts": 6,
            "top_k_experts": 3,
        }
        | {"moe_intermediate_size": 40},
    ),
    "gemma4_wide": ("Gemma4", _GEMMA4 | {"layer_types": _GEMMA4_LAYERS[:2]}),
    "llama4": (
        "Llama4",
        {"num_hidden_layers": 4, "attention_chunk_size": 8, "num_local_experts": 5, "floor_scale": 4, "attn_scale": 0.5}
        | {"no_rope_layer_interval": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 144}
        | {"rope_parameters": {"rope_theta": 100.0}},
    ),
    "phi3": ("Phi3", {"sliding_window": 6, "rope_parameters": {"rope_theta": 100.0, "partial_rotary_factor": 0.75}}),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4, "tie_word_embeddings": False, "attention_bias": True}),
    "smollm3_with_windows": ("SmolLM3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6}),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {"num_hidden_layers": 4, "sliding_window": 6, "rope_theta": 100.0} | {"rope_scaling": _YARN},
    ),
    "granite": (
        "Granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.22, "attention_multiplier": 0.05, "logits_scaling": 0.7}
        | {"rms_norm_eps": 0.01},
    ),
    "granite_moe": (
        "GraniteMoe",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "embedding_multiplier": 3.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.05, "logits_scaling": 0.7, "rms_norm_eps": 0.01}
        | {"hidden_size": 256, "attention_bias": True},
    ),
    "granite4_dense": (
        "GraniteMoeHybrid",
        {"layer_types": ["full_attention"] * 2, "num_local_experts": 0, "shared_intermediate_size": 144}
        | {"position_embedding_type": "rope", "embedding_multiplier": 3.0, "residual_multiplier": 0.22}
        | {"attention_multiplier": 0.05, "logits_scaling": 0.7, "rms_norm_eps": 0.01, "attention_bias": True}
        | {"mamba_n_heads": 8},
    ),
    "granite4_unturned": (
        "GraniteMoeHybrid",
        {"layer_types": ["full_attention"] * 2, "num_local_experts": 0, "mamba_n_heads": 8},
    ),
    "glm": ("Glm", {"rope_parameters": {"rope_theta": 100.0}}),
    "glm4": ("Glm4", {"rope_parameters": {"rope_theta": 100.0}}),
    "helium": ("Helium", {"attention_bias": True, "hidden_size": 256}),
    "ernie": ("Ernie4_5", {"rope_parameters": {"rope_theta": 100.0}}),
    "seed_oss": ("SeedOss", {}),
    "cohere": ("Cohere", {"logit_scale": 0.3, "attention_bias": True}),
    "cohere2": ("Cohere2", {"hidden_size": 256, "num_hidden_layers": 4, "sliding_window": 6, "logit_scale": 0.3}),
    "stablelm": ("StableLm", {"hidden_size": 256, "use_qkv_bias": True, "rope_parameters": {"rope_theta": 100.0}}),
    "ministral": (
        "Ministral",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral3": ("Ministral3", {"rope_parameters": _LLAMA4_SCALING}),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 6, "num_hidden_layers": 3}
        | {"rope_parameters": _YARN | {"rope_theta": 100.0, "truncate": False}},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "sliding_window": 6}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"norm_topk_prob": True}),
    "qwen3_moe_some_dense": (
        "Qwen3Moe",
        _EXPERTS
        | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True}
        | {"use_sliding_window": True, "sliding_window": 6},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        _EXPERTS | {"shared_expert_intermediate_size": 72, "use_sliding_window": True, "sliding_window": 6},
    ),
    "olmoe": ("Olmoe", {"hidden_size": 256, "num_experts": 6, "num_experts_per_tok": 3, "attention_bias": True}),
    "exaone4": ("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "exaone4_with_windows": ("Exaone4", {"num_hidden_layers": 4, "sliding_window": 6}),
}
LONGROPE = {"rope_type": "longrope", "rope_theta": 100.0, "partial_rotary_factor": 0.75}
LONGROPE |= {"short_factor": [1.0 + 0.01 * i for i in range(24)], "long_factor": [2.0 + 0.1 * i for i in range(24)]}
LONGROPE_KIND = ("Phi3", {"hidden_size": 256, "rope_parameters": LONGROPE, "original_max_position_embeddings": 24})
_GEMMA4_METADATA = {"attention.sliding_window": 6, "attention.key_length": 128, "attention.key_length_swa": 64}
_GEMMA4_METADATA |= {"rope.freq_base": 50.0, "rope.freq_base_swa": 100.0, "final_logit_softcapping": 30.0}
_GEMMA4_METADATA |= {"rope.dimension_count": 128}
# What files of llama.cpp state beside sizes, for models whose scores are scaled as it scales those of all such files.
IN_GGUF = {
    "qwen3": ({}, {}),
    "gemma": ({}, {}),
    "gemma2": (
        {"query_pre_attn_scalar": 64},
        {"attention.sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": (
        {"query_pre_attn_scalar": 64, "num_hidden_layers": 6, "layer_types": None},
        {"attention.sliding_window": 6, "rope.scaling.type": "linear", "rope.scaling.factor": 2.0}
        | {"rope.freq_base": 5000.0, "rope.freq_base_swa": 100.0},
    ),
    "gemma4": (
        {},
        _GEMMA4_METADATA
        | {"attention.shared_kv_layers": 3, "feed_forward_length": [160] * 3 + [320] * 3}
        | {"attention.sliding_window_pattern": [True, False] * 3, "embedding_length_per_layer_input": 32},
    ),
    "gemma4_with_experts": (
        {},
        _GEMMA4_METADATA
        | {"attention.head_count_kv": [2, 1, 1], "attention.sliding_window_pattern": [True, False, False]}
        | {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 40},
    ),
    "llama4": (
        {"no_rope_layer_interval": 4, "attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1},
        {"expert_count": 5, "expert_used_count": 1, "expert_feed_forward_length": 160, "feed_forward_length": 144}
        | {"interleave_moe_layer_step": 2},
    ),
    "phi3": ({"sliding_window": None}, {"rope.dimension_count": 48}),
    "smollm3": ({}, {}),
    "olmo2": ({}, {}),
    "olmo3": (
        {
            "rope_parameters": {
                "full_attention": _YARN | {"rope_theta": 100.0},
                "sliding_attention": {"rope_theta": 100.0},
            }
        }
        | {"rope_scaling": None},
        {"attention.sliding_window": 6, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
        | {"rope.scaling.original_context_length": 32, "rope.freq_base": 100.0},
    ),
    "granite": (
        {},
        {"embedding_scale": 3.0, "residual_scale": 0.22, "attention.scale": 0.05, "logit_scale": 0.7},
    ),
    "granite_moe": (
        {"attention_bias": False},
        {"embedding_scale": 3.0, "residual_scale": 0.22, "attention.scale": 0.05, "logit_scale": 0.7}
        | {"expert_count": 5, "expert_used_count": 2},
    ),
    "glm4": ({}, {"rope.dimension_count": 32}),
    "ernie": ({}, {}),
    "seed_oss": ({}, {}),
    "cohere": ({"attention_bias": False}, {"logit_scale": 0.3}),
    "cohere2": ({}, {"logit_scale": 0.3, "attention.sliding_window": 6}),
    "stablelm": ({}, {"rope.dimension_count": 16}),
    "ministral3": (
        {"rope_parameters": _LLAMA4_SCALING | {"original_max_position_embeddings": 8}},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 8}
        | {"rope.scaling.yarn_log_multiplier": 0.5, "attention.temperature_scale": 0.5},
    ),
    "exaone4": ({}, {}),
    "gpt_oss": (
        {"rope_parameters": _YARN | {"rope_theta": 100.0}},
        {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 160, "attention.sliding_window": 6}
        | {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
    ),
    "mixtral": ({"sliding_window": None}, {"expert_count": 5, "expert_used_count": 2}),
    "qwen3_moe": (
        {"moe_intermediate_size": 64},
        {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 64},
    ),
    "qwen2_moe": (
        {"use_sliding_window": False},
        {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 40}
        | {"expert_shared_feed_forward_length": 72},
    ),
    "olmoe": ({"attention_bias": False}, {"expert_count": 6, "expert_used_count": 3}),
    "exaone4_with_windows": ({}, {"attention.sliding_window": 6}),
}


def tiny_model(kind: str, **changed):
    """A transformers model of 2 layers, 4 query heads on 2 key heads, in fp32, with nothing left at 0 or 1."""
    import transformers

    family, options = (KINDS | OTHER_KINDS | {"longrope": LONGROPE_KIND})[kind]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 128,
        "eos_token_id": 3,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = f"{family}TextConfig" if family in ("Gemma3", "Gemma4", "Llama4") else f"{family}Config"
    config = getattr(transformers, config)(**(shape | options | changed))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    for layer in model.model.layers:
        if hasattr(layer, "layer_scalar"):
            torch.nn.init.normal_(layer.layer_scalar, 0.8, 0.2)
    return model


_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gemma4_text": "gemma4",
    "llama4_text": "llama4",
    "olmo3": "olmo2",
    "cohere": "command-r",
    "ministral3": "mistral3",
}
_ARCHITECTURES |= {"mixtral": "llama", "gpt_oss": "gpt-oss"}


def _of_gpt_oss(name, values):
    """Sinks and experts, whose gates and ups are neighbours, and whose matrices lie on their side."""
    stem, _, kind = name.partition("_proj")
    if not kind and name.endswith("sinks"):
        yield name + ".weight", values
        return
    values = values if kind == "_bias" else values.mT
    suffix = "_proj.bias" if kind == "_bias" else "_proj.weight"
    if stem.endswith("gate_up"):
        yield stem.removesuffix("gate_up") + "gate" + suffix, values[:, ::2].contiguous()
        yield stem.removesuffix("gate_up") + "up" + suffix, values[:, 1::2].contiguous()
    else:
        yield stem + suffix, values.contiguous()


def _of_gemma4(tensors):
    """Names and tensors, with "weight" behind names that lack it, and scales beside what they are for."""
    for name, values in tensors.items():
        if name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
            name += ".weight"
        name = name.replace("router.scale", "router.proj.scale")
        yield name.replace("router.per_expert_scale", "experts.down_proj.scale"), values


def split_experts(tensors):
    """Names and tensors, with the gates and ups of experts apart, as files of llama.cpp have them."""
    for name, values in tensors.items():
        name = name.replace("block_sparse_moe.router", "mlp.gate").replace("block_sparse_moe", "mlp")
        if any(name.endswith("sinks") for name in tensors) and (".experts." in name or name.endswith("sinks")):
            yield from _of_gpt_oss(name, values)
        elif ".feed_forward.experts." in name:  # of Llama 4, where they lie on their side
            stem, _, kind = name.removesuffix("_proj").rpartition(".")
            parts = (
                zip(("gate", "up"), values.mT.chunk(2, 1), strict=True) if kind == "gate_up" else [("down", values.mT)]
            )
            for part, rows in parts:
                yield f"{stem}.{part}_proj.weight", rows.contiguous()
        elif name.endswith("experts.gate_up_proj"):
            for part, rows in zip(("gate", "up"), values.chunk(2, 1), strict=True):
                yield f"{name.removesuffix('gate_up_proj')}{part}_proj.weight", rows
        else:
            yield name + ".weight" * name.endswith("experts.down_proj"), values


def add_tensor(writer, name: str, values: np.ndarray, kind: gguf.GGMLQuantizationType) -> None:
    if values.ndim < 2 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
        return
    try:
        blocks = gguf.quants.quantize(values, kind)
    except NotImplementedError:  # of which gguf can read only
        blocks = gguf_blocks(kind, values.shape, values.std(), seed=len(name))
    writer.add_tensor(name, blocks, raw_dtype=kind)


def write_gguf(path, model, quantization=gguf.GGMLQuantizationType.F32, leave_out=(), **metadata) -> None:
    """Writes a tiny model as llama.cpp's converter does: other names, and heads of llama interleaved.

    quantization is a type for all matrices, or a function of a tensor's name in the file that gives its type, or a list
    of types, one for each expert, which have a tensor each then. Of types that gguf cannot make (K, IQ) matrices are
    random blocks.
    """
    config = model.config
    architecture = _ARCHITECTURES.get(config.model_type, config.model_type.replace("_moe", "moe"))
    writer = gguf.GGUFWriter(path, architecture)
    config.allow_global_per_layer_attribute_access = True  # Gemma 4's, whose own are in metadata
    rope, is_rms = config.rope_parameters, hasattr(config, "rms_norm_eps")
    stated = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 64,
        f"attention.layer_norm_{'rms_' * is_rms}epsilon": config.rms_norm_eps if is_rms else config.layer_norm_eps,
        "rope.freq_base": rope.get("rope_theta"),
    }
    for key, value in (stated | metadata).items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    if rope.get("rope_type") == "llama3":
        plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, 64, 2) / 64)
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    if architecture == "gemma4":
        still = [1.0] * 16 + [1e30] * 48  # a quarter of 128 dimensions is turned
        writer.add_tensor("rope_freqs.weight", np.array(still, np.float32))
    if rope.get("rope_type") == "longrope":
        for name in ("long", "short"):
            writer.add_tensor(f"rope_factors_{name}.weight", np.array(rope[f"{name}_factor"], np.float32))
    (known,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    tensors = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    state = model.state_dict()
    for name, values in _of_gemma4(state) if architecture == "gemma4" else split_experts(state):
        stem, _, suffix = name.rpartition(".")
        name = f"{tensors.get_name(stem)}.{suffix}"
        if name in leave_out or (config.tie_word_embeddings and stem == "lm_head"):
            continue
        values = values.float().numpy()
        if architecture in ("gemma", "gemma2", "gemma3") and stem.endswith("norm"):
            values = values + 1  # which the models' own files leave out
        if architecture in ("llama", "smollm3", "granite", "granitemoe", "mistral3") and stem.endswith(
            ("q_proj", "k_proj")
        ):
            halves = values.reshape(-1, 2, 32, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        kind = quantization(name) if callable(quantization) else quantization
        if isinstance(kind, list):
            for number, own in enumerate(kind):
                add_tensor(writer, name.replace("_exps", f".{number}"), values[number], own)
        else:
            add_tensor(writer, name, values, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
