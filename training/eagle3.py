"""Trains an EAGLE-3 head for a model, on the model's own texts.

    python -m training.eagle3 --model MODEL --data FOLDER --output FOLDER     Ctrl-C, and the same command goes on
    pyspec generate --model MODEL --draft-head FOLDER "..."

The texts are made first, by training.data. The head is of EAGLE-3.1 (fc_norm and norm_output), in
the layout of the speculators library, with a card and the curve of its training. It begins as the model's last layer,
and learns with its own guesses' hidden rows in place of the model's, as it will draft (training-time test): Li et al.,
arXiv 2503.01840. Needs the extra `train`: pip install pyspec-kernels[train].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from training.chains import ChainAttention
from training.command import command
from training.data_files import Batch
from training.data_vocabulary import head_vocabulary
from training.drafts import Recipe, Target, chains_of, noisy
from training.layers import Joined, begin, feed_forward, layer_of, linear, write_speculator

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
    confidence = None

    def __init__(self, target: Target, taps: Sequence[int], norm_before_residual: bool = True):
        super().__init__()
        shape = target.config
        width, epsilon = shape.hidden_size, shape.norm_epsilon
        self.target, self.taps, self.norm_before_residual = target, taps, norm_before_residual
        self.fc = Joined(shape, len(taps))
        self.fc_norm = nn.ModuleList(nn.RMSNorm(width, epsilon) for _ in taps)
        layer = layer_of(shape, 2 * width)
        layer["hidden_norm"] = nn.RMSNorm(width, epsilon)
        self.layers, self.norm = nn.ModuleList([layer]), nn.RMSNorm(width, epsilon)
        self.lm_head = linear(len(target.tokens), width)
        self._begin()

    @torch.no_grad()
    def _begin(self) -> None:
        """As the target's last layer above its last tap, as far as the two have the same shapes."""
        last = self.target.layer(self.target.config.layers - 1)
        if "input_layernorm.weight" in last:
            last["hidden_norm.weight"] = last["input_layernorm.weight"]
        begin(self.layers[0], last)
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
            hidden = self.norm(feed_forward(layer, stream))
            yield chains, hidden

    def _joined(self, features: Tensor, noise: float) -> Tensor:
        """[n, H]: the hidden rows of the target's features [n, taps, H]."""
        features = noisy(features, noise)
        return self.fc(torch.stack([norm(features[:, tap]) for tap, norm in enumerate(self.fc_norm)], 1)).float()

    def _pairs(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        layer = self.layers[0]
        return torch.cat([layer["input_layernorm"](embedded), layer["hidden_norm"](hidden)], -1)

    def write(self, folder: Path, model: str) -> None:
        """Writes config.json and model.safetensors, in bf16; model: what other engines load the target by."""
        config = {
            "architectures": ["Eagle3DraftModel"],
            "eagle_aux_hidden_state_layer_ids": list(self.taps),
            "norm_before_residual": self.norm_before_residual,
            "fc_norm": True,
            "norm_output": True,
        }
        write_speculator(folder, self.target, self.state_dict(), model, "eagle3", 4, config)


def main(arguments: list[str] | None = None) -> None:
    command(arguments, __doc__, Eagle3, head_vocabulary, Recipe())


if __name__ == "__main__":
    main()
