"""Trains a small separate model to draft for a larger one: some of the larger one's layers, taught what it would say.

    python -m training.distill --model MODEL --data FOLDER --output FOLDER --divergence tvd
    pyspec generate --model MODEL --draft-model FOLDER "..."

DistillSpec, Zhou et al., arXiv 2310.08461: the student learns the model's laws by one of the divergences of
training.losses, on the model's own texts. It has the model's embedding and last norm, and begins with LAYERS of its
layers, evenly spread. The folder is a Llama of Hugging Face. Needs the extra `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from training.chains import ChainAttention
from training.command import command
from training.data_files import Batch
from training.drafts import Recipe, Target

__all__ = ["Student", "main"]

LAYERS = 3  # of the student
RECIPE = Recipe(depth=1, vocabulary=0, hybrid=1.0, learning_rate=5e-4)  # no chains: it reads tokens alone


class Student(nn.Module):
    """A Llama of few layers, by the names of Hugging Face, that guesses all tokens of its target.

    Args:
        target: what it drafts for, of Llama's layers.
        taps: of the target's features, of which a separate model reads none.
        layers: the target's layers that it begins with.

    Raises:
        ValueError: the target's layers have other tensors than Llama's.
    """

    title, layout, option = "A small model that drafts", "a Llama of Hugging Face", "--draft-model"
    confidence = None

    def __init__(self, target: Target, taps: Sequence[int] = (), layers: int = LAYERS):
        super().__init__()
        shape, self.target = target.config, target
        embedding = target.embed(torch.arange(shape.vocab_size))
        self.embed_tokens = nn.Embedding(*embedding.shape, _weight=embedding)
        self.logits = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        self.logits.weight.data.copy_(target.logit_rows)
        if shape.tied_embedding:
            self.logits.weight = self.embed_tokens.weight
        self.norm = nn.RMSNorm(shape.hidden_size, shape.norm_epsilon)
        self.norm.weight.data.copy_(target.norm)
        chosen = torch.linspace(0, shape.layers - 1, layers).round().long().tolist()
        self.layers = nn.ModuleList(self._layer(target.layer(index)) for index in chosen)

    def _layer(self, tensors: dict[str, Tensor]) -> nn.ModuleDict:
        epsilon, layer = self.target.config.norm_epsilon, nn.ModuleDict()
        expected = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        expected |= {f"self_attn.{name}_proj.weight" for name in "qkvo"}
        expected |= {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        if tensors.keys() != expected:
            odd = ", ".join(sorted(tensors.keys() ^ expected)[:3])
            raise ValueError(f"target must have the layers of a Llama without biases, but {odd} is there or missing")
        for name, values in tensors.items():
            *parts, last, _ = name.split(".")
            place = layer
            for part in parts:
                place[part] = place[part] if part in place else nn.ModuleDict()
                place = place[part]
            rows, columns = values.shape[0], values.shape[-1]
            place[last] = nn.RMSNorm(rows, epsilon) if values.dim() == 1 else nn.Linear(columns, rows, bias=False)
            place[last].weight.data.copy_(values)
        return layer

    def guesses(
        self, batch: Batch, chains: Tensor, depth: int, share: float, noise: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See training.drafts.Head: guess d of chain t is what it says after token t + 1 + d, whatever the depth."""
        stream, every = self.embed_tokens(batch.tokens), torch.arange(len(batch.tokens))
        for layer in self.layers:
            x, projected = layer["input_layernorm"](stream), layer["self_attn"]
            attention = ChainAttention(batch, self.target.config)
            attention.read(projected["k_proj"](x), projected["v_proj"](x))
            stream = stream + projected["o_proj"](attention.mix(projected["q_proj"](x), every))
            x, mlp = layer["post_attention_layernorm"](stream), layer["mlp"]
            stream = stream + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))
        said = self.norm(stream)
        for index in range(depth):
            chains = chains[batch.texts[(chains + index + 2).clamp(max=len(said) - 1)] == batch.texts[chains]]
            chains = chains[chains + index + 2 < len(said)]
            yield chains, said[chains + 1 + index]

    def write(self, folder: Path, model: str) -> None:
        """Writes config.json and model.safetensors, in bf16."""
        shape = self.target.config
        names = {name: "lm_head.weight" if name == "logits.weight" else f"model.{name}" for name in self.state_dict()}
        if shape.tied_embedding:
            del names["logits.weight"]
        tensors = {names[name]: values.bfloat16() for name, values in self.state_dict().items() if name in names}
        save_file(tensors, folder / "model.safetensors")
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": len(self.layers),
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": shape.norm_epsilon,
            "rope_theta": shape.rope_base,
            "max_position_embeddings": shape.context_length,
            "tie_word_embeddings": shape.tied_embedding,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    command(
        arguments,
        __doc__,
        Student,
        lambda texts, runner, size: range(runner.vocab_size),
        RECIPE,
    )


if __name__ == "__main__":
    main()
