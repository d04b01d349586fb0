"""A tiny random model of any architecture in transformers' list of causal models, by what its configuration has."""

import pytest
import torch

VOCABULARY = 96
CONTEXT = 128
# Whatever of these a configuration has is set; families call the same thing by many names.
_SIZES = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("n_layer", "num_hidden_layers", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), CONTEXT),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "state_size"), 16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "v_head_dim", "hidden_size_per_layer_input", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), 0),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), 9),
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "qk_rope_head_dim": 8,
    "eos_token_id": 1,
    "is_decoder": True,
}
_SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
_OTHERS = {
    "dots1": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL * 2},
    "gemma4_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": _SLIDING_AND_FULL * 2},
    "granitemoehybrid": {"layer_types": ["attention"] * 2, "mamba_n_heads": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "llama4_text": {"floor_scale": 4, "attn_scale": 0.5, "no_rope_layers": [1, 0]},  # attention scaled by position
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
_MOST_NUMBERS = 4_000_000


def tiny(model_type: str, switch: int | None = None):
    """A model in fp32; the test is skipped where it cannot be built small.

    switch: the position behind which longrope has other frequencies; None for the rotations that the family has.
    """
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    try:
        stated = config_class().to_dict()
        names = stated.keys() | config_class.attribute_map.keys()
        shape = {name: size for name, size in _SIZES.items() if name in names}
        if "qk_rope_head_dim" in names:  # keys are made for all heads from one latent vector
            shape |= {"num_key_value_heads": 4}
            shape.pop("head_dim", None)
        shape |= {
            name: (list(dict.fromkeys(kinds)) * 2)[:2]  # a layer of each of two kinds
            for name, kinds in stated.items()
            if name.endswith("_types") and isinstance(kinds, list)
        }
        shape |= _OTHERS.get(model_type, {})
        sizes = _on_meta(config_class(**shape))
        if switch is not None:
            frequencies = next(size for name, size in sizes.items() if name.endswith("inv_freq"))
            shape["rope_parameters"] = _longrope(model_type, stated["rope_parameters"] or {}, frequencies, switch)
            if "original_max_position_embeddings" in names:
                shape["original_max_position_embeddings"] = switch
        if sum(sizes.values()) > _MOST_NUMBERS:
            raise ValueError(f"{sum(sizes.values())} numbers")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config_class(**shape)).float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        with torch.inference_mode():
            model(torch.tensor([[5, 6, 7]]))
    except Exception as error:  # whatever families' own code raises
        pytest.skip(f"{model_type} cannot be built small so: {type(error).__name__}: {str(error)[:200]}")
    return model


def _on_meta(config) -> dict[str, int]:
    """The sizes of a model's tensors by name, without making them."""
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: tensor.numel() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _longrope(model_type: str, rope: dict, frequencies: int, switch: int) -> dict:
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("it has rotations by kind of layer")
    return {
        "rope_type": "longrope",
        "rope_theta": rope.get("rope_theta", 1e4),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
        "short_factor": [1.0] * frequencies,
        "long_factor": [6.0] * frequencies,
        "factor": 4.0,
        "original_max_position_embeddings": switch,
        **({"short_mscale": 1.0, "long_mscale": 1.3} if model_type == "phimoe" else {}),
        **({"llama_4_scaling_beta": 0.3} if model_type in ("ministral3", "mistral4") else {}),
    }
