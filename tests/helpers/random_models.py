"""Small random models of every family, without anything but torch; the same weights on every device."""

import torch

from pyspec.architectures.bamba import BambaConfig, BambaWeights
from pyspec.architectures.decoder import DecoderConfig
from pyspec.architectures.gemma import GemmaConfig
from pyspec.architectures.lfm2 import ConvolutionShape, Lfm2Config, Lfm2Weights
from pyspec.architectures.llama import LlamaWeights
from pyspec.architectures.mamba import MambaConfig
from pyspec.architectures.mamba2 import Mamba2Config
from pyspec.architectures.mixture import MixtureConfig, MixtureWeights
from pyspec.architectures.state_space import StateSpaceWeights
from pyspec.runners.attention import AttentionRunner
from pyspec.runners.recurrent import HybridRunner, RecurrentRunner
from tests.helpers.random_llama import VOCABULARY, random_llama

_SHARED = {"vocab_size": VOCABULARY, "hidden_size": 48, "norm_epsilon": 1e-5}
_STATES = {"layers": 2, "conv_taps": 4}
_MAMBA2 = Mamba2Config(**_SHARED, **_STATES, heads=3, head_dim=32, groups=1, state_size=32)
_SHAPE = _SHARED | {"intermediate_size": 80, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}
_SHAPE |= {"context_length": 3000, "rope_base": 10000.0}
_GEMMA = _SHAPE | {"windows": (40, None), "activation": "gelu_tanh", "norm_offset": 1.0, "embedding_scale": 7.0}
_GEMMA |= {"attention_scale": 0.1, "tied_embedding": True}
_GEMMA2 = GemmaConfig("gemma2", **_GEMMA, logits_softcap=30.0, attention_softcap=20.0)
_GEMMA3 = GemmaConfig("gemma3", **_GEMMA, head_norm="head", turns=("local", "global"))
_EXPERTS = {"experts": 6, "experts_per_token": 3, "expert_size": 40, "renormalise": True}
_HYBRID = _SHAPE | {"layers": 4, "is_attention": (False, True, False, True), "rope_width": 32}
_MODELS = {
    "qwen3": (AttentionRunner, LlamaWeights, DecoderConfig("qwen3", **_SHAPE, head_norm="head")),
    "gemma2": (AttentionRunner, LlamaWeights, _GEMMA2),
    "gemma3": (AttentionRunner, LlamaWeights, _GEMMA3),
    "mixture": (
        AttentionRunner,
        MixtureWeights,
        MixtureConfig("qwen3_moe", **_SHAPE, head_norm="head", **_EXPERTS, expert_layers=(True, False)),
    ),
    "shared_mixture": (
        AttentionRunner,
        MixtureWeights,
        MixtureConfig("qwen2_moe", **_SHAPE, **_EXPERTS, shared_size=72),
    ),
    "mamba": (
        RecurrentRunner,
        StateSpaceWeights,
        MambaConfig(**_SHARED, **_STATES, channels=96, state_size=16, dt_rank=16),
    ),
    "mamba2": (RecurrentRunner, StateSpaceWeights, _MAMBA2),
    "bamba": (HybridRunner, BambaWeights, BambaConfig("bamba", **_HYBRID, recurrence=_MAMBA2)),
    "lfm2": (
        HybridRunner,
        Lfm2Weights,
        Lfm2Config(
            "lfm2_moe",
            **_HYBRID,
            **_EXPERTS,
            head_norm="head",
            sigmoid_gates=True,
            choice_bias=True,
            expert_layers=(False, True, True, True),
            recurrence=ConvolutionShape(hidden_size=48, layers=2, conv_taps=3),
        ),
    ),
}
FAMILIES = ("llama", *_MODELS)


def random_model(family: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """A runner of a few layers."""
    if family == "llama":
        return random_llama(device, dtype)
    runner, weights, config = _MODELS[family]
    weights = weights.empty(config, dtype if dtype.is_floating_point else torch.float32, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.named(config).items():
        mean, deviation = (1.0, 0.2) if tensor.dim() == 1 else (0.0, 0.3)
        if "dt" in name and "bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        tensor.copy_(torch.normal(mean, deviation, tensor.shape, generator=generator))
    weights.lay_out(dtype)
    return runner(config, weights)
