"""Tiny random hybrids of attention and a recurrence, as transformers has them."""

import torch

from tests.helpers.random_llama import VOCABULARY

_SHARED = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 700,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = _SHARED | {"hidden_size": 96, "head_dim": 64, "linear_key_head_dim": 16, "linear_value_head_dim": 32}
_QWEN |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
_EXPERTS |= {"shared_expert_intermediate_size": 48}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 8}
_LINEAR, _FULL = "linear_attention", "full_attention"
_BAMBA = _SHARED | _MAMBA2 | {"hidden_size": 128, "attn_layer_indices": [1, 3]}
_GRANITE = _SHARED | _MAMBA2 | {"hidden_size": 128, "layer_types": [_LINEAR, _FULL, _LINEAR, _FULL]}
_GRANITE |= {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.1}
_GRANITE |= {"logits_scaling": 2.0, "shared_intermediate_size": 80}

_LFM = _SHARED | {"hidden_size": 128, "layer_types": ["conv", _FULL, "conv", "conv"], "intermediate_size": 96}
_LFM_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "num_dense_layers": 1}
_FALCON = _SHARED | _MAMBA2 | {"hidden_size": 128, "mamba_d_ssm": 256, "num_hidden_layers": 3, "rope_theta": 1e6}
_FALCON |= {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "ssm_in_multiplier": 1.3}
_FALCON |= {"attention_in_multiplier": 0.8, "attention_out_multiplier": 1.2, "ssm_out_multiplier": 0.6}
_FALCON |= {"mlp_multipliers": [0.9, 1.4], "ssm_multipliers": [0.7, 1.1, 1.2, 0.8, 0.9]}
_NEMOTRON = _SHARED | {"hidden_size": 128, "head_dim": 64, "mamba_num_heads": 8, "mamba_head_dim": 32, "n_groups": 2}
_NEMOTRON |= {"ssm_state_size": 16, "chunk_size": 8}
_NEMOTRON |= {"time_step_min": 1e-9}  # by which transformers bounds the dt of prompts, though not of single tokens
_NEMOTRON_EXPERTS = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_NEMOTRON_EXPERTS |= {"moe_shared_expert_intermediate_size": 64, "routed_scaling_factor": 1.5}
_JAMBA = _SHARED | {"hidden_size": 128, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
_OLMO = _SHARED | {"hidden_size": 128, "layer_types": [_LINEAR, _FULL, _LINEAR, _FULL], "linear_key_head_dim": 16}
_OLMO |= {"linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
_ZAMBA = _SHARED | {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 5}
_ZAMBA |= {"n_mamba_heads": 8, "mamba_d_state": 16, "chunk_size": 8, "adapter_rank": 16, "time_step_min": 1e-9}
_ZAMBA |= {"num_mem_blocks": 2, "layers_block_type": ["hybrid", _LINEAR, "hybrid", "hybrid", _LINEAR]}

#: The names of a configuration and a model in transformers, and what the configuration says.
KINDS = {
    "bamba": ("BambaConfig", "BambaForCausalLM", _BAMBA),
    "bamba_tied_with_biases": (
        "BambaConfig",
        "BambaForCausalLM",
        _BAMBA
        | {"attn_layer_indices": [0], "num_hidden_layers": 3, "mamba_n_groups": 2, "num_key_value_heads": 2}
        | {"attention_bias": True, "mamba_proj_bias": True, "mamba_conv_bias": False, "tie_word_embeddings": True},
    ),
    "granite": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM", _GRANITE | {"num_local_experts": 0}),
    "granite_moe": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _GRANITE
        | {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48, "mamba_n_groups": 2}
        | {"position_embedding_type": "rope", "tie_word_embeddings": True, "attention_bias": True},
    ),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM", _LFM | {"block_multiple_of": 16}),
    "lfm2_with_biases": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        _LFM | {"conv_bias": True, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": False},
    ),
    "lfm2_moe": ("Lfm2MoeConfig", "Lfm2MoeForCausalLM", _LFM | _LFM_EXPERTS),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", _FALCON),
    "falcon_h1_normed": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        _FALCON
        | {"mamba_rms_norm": True, "mamba_n_groups": 2, "tie_word_embeddings": True, "attention_bias": True}
        | {"mamba_proj_bias": True, "projectors_bias": True, "mamba_conv_bias": False},
    ),
    "falcon_h1_gated_first": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        _FALCON | {"mamba_rms_norm": True, "mamba_norm_before_gate": False},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON | {"layers_block_type": [_LINEAR, "mlp", _FULL, "mlp", _LINEAR, "mlp"]},
    ),
    "nemotron_h_moe": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        _NEMOTRON
        | _NEMOTRON_EXPERTS
        | {"layers_block_type": [_LINEAR, "moe", _LINEAR, _FULL, "moe"], "use_bias": True},
    ),
    "jamba": ("JambaConfig", "JambaForCausalLM", _JAMBA),
    "jamba_moe": (
        "JambaConfig",
        "JambaForCausalLM",
        _JAMBA
        | {"num_experts": 6, "expert_layer_offset": 0, "attn_layer_period": 3, "mamba_proj_bias": True}
        | {"mamba_conv_bias": False, "mamba_dt_rank": 5, "tie_word_embeddings": True, "mamba_d_state": 32},
    ),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM", _ZAMBA),
    "zamba2_own_heads": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        _ZAMBA
        | {"use_shared_attention_adapter": True, "num_key_value_heads": 4, "num_mem_blocks": 1, "use_mem_rope": True}
        | {"mamba_ngroups": 2, "layers_block_type": [_LINEAR, *["hybrid", _LINEAR] * 2]},
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", _OLMO | {"rope_parameters": {"rope_theta": None}}),
    "olmo_hybrid_turned": (
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        _OLMO
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "linear_allow_neg_eigval": False}
        | {"linear_num_key_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _QWEN),
    "qwen3_5_tied_with_biases": (
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        _QWEN
        | {"layer_types": [_FULL, _LINEAR, _LINEAR], "num_hidden_layers": 3, "tie_word_embeddings": True}
        | {"linear_num_key_heads": 4, "attention_bias": True, "partial_rotary_factor": 0.5},
    ),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", _QWEN | _EXPERTS),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _QWEN | _EXPERTS | {"mlp_only_layers": [1]}),
}


#: A kind of each family.
FAMILIES = ("bamba", "granite_moe", "lfm2", "lfm2_moe", "falcon_h1", "nemotron_h_moe", "jamba_moe", "olmo_hybrid")
FAMILIES += ("qwen3_5", "qwen3_next", "zamba2_own_heads")


def tiny_hybrid(kind: str, **changed):
    """A transformers model in fp32 that forgets slowly."""
    import transformers

    config, model, shape = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**shape | changed)).float().eval()
    for name, parameter in model.named_parameters():
        mean, deviation = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.2)
        if "dt_bias" in name or "dt_proj.bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        torch.nn.init.normal_(parameter, mean, deviation)
    for name, buffer in model.named_buffers():  # what experts are chosen by, beside their gates
        if name.endswith(("expert_bias", "e_score_correction_bias")):
            torch.nn.init.normal_(buffer, 0.0, 0.2)
    return model
