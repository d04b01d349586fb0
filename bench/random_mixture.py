"""A random mixture of experts that speaks the demo model's tokens, for checks that need experts and no sense."""

from __future__ import annotations

import torch

from pyspec.architectures.mixture import MixtureConfig, MixtureWeights
from pyspec.runners.attention import AttentionRunner

LAYERS, HIDDEN, EXPERTS, CHOSEN, EXPERT_SIZE = 4, 256, 16, 4, 96


def random_mixture(demo: AttentionRunner, dtype: torch.dtype | str, seed: int = 0) -> AttentionRunner:
    """A model of Qwen3 MoE's kind, whose weights are kept in float32, bfloat16, int8 or "int4"."""
    config = MixtureConfig(
        architecture="qwen3_moe",
        vocab_size=demo.vocab_size,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        layers=LAYERS,
        heads=4,
        kv_heads=2,
        head_dim=64,
        context_length=demo.context_length,
        norm_epsilon=1e-6,
        rope_base=10000.0,
        head_norm="head",
        experts=EXPERTS,
        experts_per_token=CHOSEN,
        expert_size=EXPERT_SIZE,
        renormalise=True,
    )
    dense = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.float32
    weights = MixtureWeights.empty(config, dense, torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    for tensor in weights.named(config).values():
        mean, deviation = (1.0, 0.2) if tensor.dim() == 1 else (0.0, 0.1)
        tensor.copy_(torch.normal(mean, deviation, tensor.shape, generator=generator))
    weights.lay_out(dtype)
    return AttentionRunner(config, weights, demo.tokenizer, demo.eos_tokens)
