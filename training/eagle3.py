"""Trains an EAGLE-3 head for a model, on the model's own texts.

    python -m training.eagle3 --model MODEL --data FOLDER --output FOLDER     Ctrl-C, and the same command goes on
    pyspec generate --model MODEL --draft-head FOLDER "..."

The texts are made first, by training.data. The head is of EAGLE-3.1 (fc_norm and norm_output), in
the layout of the speculators library, with a card and the curve of its training. It begins as the model's last layer,
and learns with its own guesses' hidden rows in place of the model's, as it will draft (training-time test): Li et al.,
arXiv 2503.01840. Needs the extra `train`: pip install pyspec-kernels[train].
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
from training.data_vocabulary import head_vocabulary
from training.drafts import Recipe, Target, chains_of

__all__ = ["Eagle3", "main"]


QUIET = 0.25  # of the target's last norm: what begins as another layer must not be sure of what it guesses


class Eagle3(nn.Module):
    """An EAGLE-3.1 head of one Llama layer, whose tensors have the names of the speculators layout.

    Args:
        target: what it drafts for.
        taps: layers of the target's features.
        norm_before_residual: whether the residual stream begins with the normed hidden row.
    """

    title, layout, option = "An EAGLE-3.1 head", "the speculators library", "--draft-head"

    def __init__(self, target: Target, taps: Sequence[int], norm_before_residual: bool = True):
        super().__init__()
        shape = target.config
        width, epsilon = shape.hidden_size, shape.norm_epsilon
        self.target, self.taps, self.norm_before_residual = target, taps, norm_before_residual

        def linear(rows: int, columns: int) -> nn.Linear:
            matrix = nn.Linear(columns, rows, bias=False)
            nn.init.normal_(matrix.weight, std=0.02)
            return matrix

        def norm() -> nn.RMSNorm:
            return nn.RMSNorm(width, epsilon)

        self.fc, self.fc_norm = linear(width, len(taps) * width), nn.ModuleList(norm() for _ in taps)
        queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        attention = {"q_proj": linear(queries, 2 * width), "k_proj": linear(keys, 2 * width)}
        attention |= {"v_proj": linear(keys, 2 * width), "o_proj": linear(width, queries)}
        inner = shape.intermediate_size
        mlp = {"gate_proj": linear(inner, width), "up_proj": linear(inner, width), "down_proj": linear(width, inner)}
        layer = {"input_layernorm": norm(), "hidden_norm": norm(), "self_attn": nn.ModuleDict(attention)}
        layer |= {"post_attention_layernorm": norm(), "mlp": nn.ModuleDict(mlp)}
        self.layers = nn.ModuleList([nn.ModuleDict(layer)])
        self.norm, self.lm_head = norm(), linear(len(target.tokens), width)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """As the target's last layer above its last tap, as far as the two have the same shapes."""
        layer, width = self.layers[0], self.target.config.hidden_size
        last = self.target.layer(self.target.config.layers - 1)
        if "input_layernorm.weight" in last:
            last["hidden_norm.weight"] = last["input_layernorm.weight"]
        for name, values in layer.named_parameters():
            found = last.get(name)
            if found is None:
                continue
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                values = values[:, width:]  # of the hidden row; the embedding's begin small
            if found.shape == values.shape:
                values.copy_(found)
        self.fc.weight.zero_()
        self.fc.weight[:, -width:].fill_diagonal_(1)
        self.norm.weight.copy_(QUIET * self.target.norm)
        self.lm_head.weight.copy_(self.target.logit_rows)

    @property
    def logits(self) -> nn.Linear:
        return self.lm_head

    def guesses(
        self, batch: Batch, chains: Tensor, depth: int, share: float, noise: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See training.drafts.Head.

        The keys of a chain are those of the text up to its first token, made of the target's features, and those of its
        own guesses, each seen by its own chain alone: scores against the text are one product for all chains, and those
        of its guesses are a sum a row.
        """
        layer, attention = self.layers[0], ChainAttention(batch, self.target.config)
        projected, is_learned = layer["self_attn"], chains_of(batch)[0]
        hidden, embedded = self._joined(batch.features[:, :-1], noise), self.target.embed(batch.tokens)
        x = self._pairs(embedded.roll(-1, 0), hidden)
        attention.read(projected["k_proj"](x), projected["v_proj"](x))
        x, hidden = x[chains], hidden[chains]
        for index in range(depth):
            if index:
                ahead = (chains + index + 1).clamp(max=len(embedded) - 1)
                goes_on = is_learned[ahead] & (batch.texts[ahead] == batch.texts[chains])
                if index == 1 and share < 1:
                    goes_on &= torch.rand(len(chains)) < share
                chains, hidden = chains[goes_on], hidden[goes_on]
                x = self._pairs(embedded[chains + index + 1], hidden)
                attention.guess(goes_on, chains, projected["k_proj"](x), projected["v_proj"](x))
            stream = layer["hidden_norm"](hidden) if self.norm_before_residual else hidden
            stream = stream + projected["o_proj"](attention.mix(projected["q_proj"](x), chains))
            x, mlp = layer["post_attention_layernorm"](stream), layer["mlp"]
            stream = stream + mlp["down_proj"](F.silu(mlp["gate_proj"](x)) * mlp["up_proj"](x))
            hidden = self.norm(stream)
            yield chains, hidden

    def _joined(self, features: Tensor, noise: float) -> Tensor:
        """[n, H]: the hidden rows of the target's features [n, taps, H]."""
        features = features.float()
        if noise:
            size = features.square().mean(-1, keepdim=True).sqrt()
            features = features + noise * size * torch.randn_like(features)
        return self.fc(torch.cat([norm(features[:, tap]) for tap, norm in enumerate(self.fc_norm)], -1)).float()

    def _pairs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        layer = self.layers[0]
        return torch.cat([layer["input_layernorm"](embedded), layer["hidden_norm"](hidden)], -1)

    def write(self, folder: Path, model: str) -> None:
        """Writes config.json and model.safetensors, in bf16; model: what other engines load the target by."""
        shape, kept = self.target.config, self.target.tokens
        tensors = {name: values.detach().bfloat16() for name, values in self.state_dict().items()}
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
        config = {
            "architectures": ["Eagle3DraftModel"],
            "speculators_model_type": "eagle3",
            "speculators_version": "0.9.0",
            "draft_vocab_size": len(kept),
            "eagle_aux_hidden_state_layer_ids": list(self.taps),
            "norm_before_residual": self.norm_before_residual,
            "fc_norm": True,
            "norm_output": True,
            "tie_word_embeddings": False,
            "transformer_layer_config": of_layer,
            "speculators_config": {
                "algorithm": "eagle3",
                "default_proposal_method": "greedy",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 4}],
                "verifier": {"name_or_path": model, "architectures": [shape.architecture]},
            },
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    command(arguments, __doc__, Eagle3, head_vocabulary, Recipe())


if __name__ == "__main__":
    main()
