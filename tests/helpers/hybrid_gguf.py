"""GGUF files of tiny hybrids with Mamba, Mamba-2 or short convolutions, as llama.cpp's converter writes them."""

import re
from collections.abc import Iterator

import gguf
import torch

from tests.helpers.tiny_models import add_tensor

ARCHITECTURES = {
    "granitemoehybrid": "granitehybrid",
    "falcon_h1": "falcon-h1",
    "lfm2": "lfm2",
    "lfm2_moe": "lfm2moe",
    "nemotron_h": "nemotron_h_moe",
    "jamba": "jamba",
}
# of transformers' classes, as the converter hands them to its table of names
_RENAMED = (
    (r"^model\.(embeddings|norm_f|layers\.\d+\.(mixer|norm)\b)", r"backbone.\1"),
    (r"(block_sparse_moe|feed_forward|mixer)\.(experts|router)", r"mlp.\2"),
    (r"mlp\.router\.weight", "mlp.gate.weight"),
    (r"^backbone\.(.*)\.mlp\.experts", r"model.\1.mlp.experts"),
    (r"experts\.(gate|up|down)_proj$", r"experts.\1_proj.weight"),
    (r"pre_ff_layernorm", "post_attention_layernorm"),
    (r"feed_forward\.expert_bias$", "feed_forward.expert_bias.bias"),
    (r"e_score_correction_bias$", "e_score_correction.bias"),
    (r"\.dt_bias$", ".dt_proj.bias"),
)


def write_hybrid_gguf(path, model, quantization=gguf.GGMLQuantizationType.F32, **changed) -> None:
    """Writes a tiny model; changed: metadata."""
    config = model.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (_metadata(config) | changed).items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    (known,) = (kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(known, config.num_hidden_layers)
    for name, values in _tensors(model):
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        if (own := names.get_name(name)) is None:  # A_log and D are there whole
            stem, _, suffix = name.rpartition(".")
            own = f"{stem if stem.startswith('blk.') else names.get_name(stem)}.{suffix}"
        is_small = (
            any(word in own for word in ("ssm_a", "ssm_d", "conv", "norm", "ssm_x", "probs")) and "proj" not in own
        )
        add_tensor(
            writer, own, values.contiguous().numpy(), gguf.GGMLQuantizationType.F32 if is_small else quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(config) -> dict:
    epsilon = next(
        getattr(config, key) for key in ("rms_norm_eps", "norm_eps", "layer_norm_epsilon") if hasattr(config, key)
    )
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": [
            config.num_key_value_heads * ("full" in kind or kind == "hybrid") for kind in config.layer_types
        ],
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.layer_norm_rms_epsilon": epsilon,
        "rope.freq_base": (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0),
    }
    if hasattr(config, "mamba_d_conv"):
        found |= {"ssm.conv_kernel": config.mamba_d_conv, "ssm.state_size": config.mamba_d_state}
    if hasattr(config, "mamba_n_heads"):
        found |= {
            "ssm.inner_size": config.mamba_n_heads * config.mamba_d_head,
            "ssm.group_count": config.mamba_n_groups,
        }
        found |= {"ssm.time_step_rank": config.mamba_n_heads}
    if config.model_type == "falcon_h1":
        found["attention.head_count_kv"] = config.num_key_value_heads
    if config.model_type == "granitemoehybrid":
        found |= {"attention.scale": config.attention_multiplier, "embedding_scale": config.embedding_multiplier}
        found |= {"residual_scale": config.residual_multiplier, "logit_scale": config.logits_scaling}
        found["rope.scaling.finetuned"] = config.position_embedding_type == "rope"
        found |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
        if config.num_local_experts:
            found["expert_shared_feed_forward_length"] = config.shared_intermediate_size
        else:
            found["feed_forward_length"] = config.shared_intermediate_size
    if config.model_type.startswith("lfm2"):
        found["shortconv.l_cache"] = config.conv_L_cache
    if config.model_type == "lfm2":
        size = int(2 * config.intermediate_size / 3) if config.block_auto_adjust_ff_dim else config.intermediate_size
        found["feed_forward_length"] = -(-size // 16) * 16
    return found | _of_experts(config)


def _of_experts(config) -> dict:
    """What is stated of experts, and of recurrent layers by other names."""
    kinds, found = config.layer_types, {}
    if config.model_type == "lfm2_moe":
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        found |= {"expert_feed_forward_length": config.moe_intermediate_size, "expert_gating_func": 2}
        found["leading_dense_block_count"] = config.num_dense_layers
    if config.model_type == "jamba":
        found |= {
            "ssm.inner_size": config.mamba_expand * config.hidden_size,
            "ssm.time_step_rank": config.mamba_dt_rank,
        }
        found |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
    if config.model_type == "nemotron_h":
        found |= {"ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size}
        found |= {"ssm.inner_size": config.mamba_num_heads * config.mamba_head_dim, "ssm.group_count": config.n_groups}
        found |= {"ssm.time_step_rank": config.mamba_num_heads, "expert_weights_norm": config.norm_topk_prob}
        found |= {"expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok}
        found |= {"expert_feed_forward_length": config.moe_intermediate_size}
        found |= {"expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size}
        found |= {"expert_weights_scale": config.routed_scaling_factor, "expert_group_count": config.n_group}
        inner = [config.intermediate_size * (kind == "mlp") for kind in kinds]
        found["feed_forward_length"] = [
            size or config.moe_intermediate_size * (kind == "moe") for size, kind in zip(inner, kinds, strict=True)
        ]
    return found


def _tensors(model) -> Iterator[tuple[str, torch.Tensor]]:
    config = model.config
    is_mamba2, has_experts = config.model_type != "jamba", getattr(config, "num_local_experts", 0) > 0
    for name, values in model.state_dict().items():
        layer, values = (re.search(r"layers\.(\d+)\.", name) or [None, None])[1], values.float()
        if config.model_type == "falcon_h1":
            values = _multiplied(name, values, config)
        if config.model_type == "granitemoehybrid" and re.search(r"\.[qk]_proj\.", name):
            halves = values.reshape(-1, 2, 32, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if "shared_mlp" in name:
            end = "_shexp" * has_experts
            if "output_linear" in name:
                yield f"blk.{layer}.ffn_down{end}.weight", values
            else:
                for part, rows in zip(("gate", "up"), values.chunk(2), strict=True):
                    yield f"blk.{layer}.ffn_{part}{end}.weight", rows
            continue
        for pattern, replacement in _RENAMED:
            if config.model_type == "falcon_h1" and "pre_ff" in pattern:  # which has no "weight" behind it there
                continue
            name = re.sub(pattern, replacement, name)
        if name.endswith(".experts.gate_up_proj"):
            for part, rows in zip(("gate", "up"), values.chunk(2, 1), strict=True):
                yield f"blk.{layer}.ffn_{part}_exps.weight", rows
            continue
        if name.endswith(".experts.down_proj.weight"):
            name = f"blk.{layer}.ffn_down_exps.weight"
        if "conv1d.weight" in name or "conv.conv.weight" in name:
            values = values[:, 0]
        if name.endswith("A_log"):
            values = -values.exp()
        if is_mamba2 and name.endswith(("A_log", ".D")):
            values = values[:, None]
        if re.search(r"(mamba|mixer)\.norm\.weight$", name):
            values = values.view(getattr(config, "mamba_n_groups", None) or config.n_groups, -1)
        yield name, values


def _multiplied(name: str, values: torch.Tensor, config) -> torch.Tensor:
    """What the converter makes of a matrix of Falcon-H1."""
    taken, (gates, down) = config.attention_in_multiplier, config.mlp_multipliers
    factors = {
        "down_proj": down,
        "gate_proj": gates,
        "k_proj": config.key_multiplier * taken,
        "q_proj": taken,
        "v_proj": taken,
        "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier,
        "lm_head": config.lm_head_multiplier,
        "embed_tokens": config.embedding_multiplier,
    }
    if "mamba.in_proj" in name:
        channels, states = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        rows = torch.tensor([channels, channels, states, states, config.mamba_n_heads])
        return values * config.ssm_in_multiplier * torch.tensor(config.ssm_multipliers).repeat_interleave(rows)[:, None]
    return values * next((factor for part, factor in factors.items() if f".{part}." in f".{name}"), 1.0)
