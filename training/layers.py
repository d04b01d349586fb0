"""What draft heads of a Llama's layers share: their parts, how they begin, and the files of the speculators library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.drafts import Target

__all__ = ["Joined", "begin", "feed_forward", "layer_of", "linear", "write_speculator"]


def linear(rows: int, columns: int) -> nn.Linear:
    """A matrix of small random numbers."""
    matrix = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(matrix.weight, std=0.02)
    return matrix


def layer_of(shape, inputs: int) -> nn.ModuleDict:
    """A layer by the names of Hugging Face, whose attention reads rows of so many inputs; shape: a LlamaConfig."""
    width, queries, keys = shape.hidden_size, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = {"q_proj": linear(queries, inputs), "k_proj": linear(keys, inputs)}
    attention |= {"v_proj": linear(keys, inputs), "o_proj": linear(width, queries)}
    inner = shape.intermediate_size
    mlp = {"gate_proj": linear(inner, width), "up_proj": linear(inner, width), "down_proj": linear(width, inner)}
    norms = {name: nn.RMSNorm(width, shape.norm_epsilon) for name in ("input_layernorm", "post_attention_layernorm")}
    return nn.ModuleDict({**norms, "self_attn": nn.ModuleDict(attention), "mlp": nn.ModuleDict(mlp)})


def feed_forward(layer: nn.ModuleDict, stream: Tensor) -> Tensor:
    """The residual stream behind a layer's second half."""
    x, mlp = layer["post_attention_layernorm"](stream), layer["mlp"]
    return stream + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))


@torch.no_grad()
def begin(layer: nn.ModuleDict, found: Mapping[str, Tensor]) -> None:
    """Begins as another layer, as far as the two have the same shapes.

    Where attention reads more columns than the other's, the other's become the last of them.
    """
    for name, values in layer.named_parameters():
        if (other := found.get(name)) is None:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            values = values[:, values.shape[1] - other.shape[1] :]
        if other.shape == values.shape:
            values.copy_(other)


class Joined(nn.Module):
    """One hidden row out of what several layers of the target said, which begins as that of the last of them.

    Args:
        shape: of the target, a LlamaConfig.
        taps: how many layers.
    """

    def __init__(self, shape, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.hidden_size, taps * shape.hidden_size))
        self.weight.data[:, -shape.hidden_size :].fill_diagonal_(1)

    def forward(self, features: Tensor) -> Tensor:
        """[n, H] of [n, taps, H]."""
        return F.linear(features.flatten(1), self.weight)


def write_speculator(
    folder: Path, target: Target, tensors: Mapping[str, Tensor], model: str, kind: str, tokens: int, config: Mapping
) -> None:
    """Writes config.json and model.safetensors, matrices in bf16.

    Args:
        tensors: of the head; what maps its tokens to the target's is added.
        model: what other engines load the target by.
        kind: speculators_model_type.
        tokens: that are guessed in a round.
        config: other entries; those of the layer are in its "transformer_layer_config".
    """
    shape, kept = target.config, target.tokens
    tensors = {name: values.detach().bfloat16().contiguous() for name, values in tensors.items()}
    tensors["d2t"] = kept - torch.arange(len(kept))
    tensors["t2d"] = torch.zeros(shape.vocab_size, dtype=torch.bool).index_fill(0, kept, True)
    save_file(tensors, folder / "model.safetensors")
    of_layer = {
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "max_position_embeddings": shape.context_length,
    }
    entries = {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "draft_vocab_size": len(kept),
        "tie_word_embeddings": False,
        **config,
        "transformer_layer_config": of_layer | config.get("transformer_layer_config", {}),
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": tokens}],
            "verifier": {"name_or_path": model, "architectures": [shape.architecture]},
        },
    }
    (folder / "config.json").write_text(json.dumps(entries, indent=2) + "\n")
