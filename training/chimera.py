"""Trains a head in the style of Chimera for a model: the last three tokens, and what the model said before them.

    python -m training.chimera --model MODEL --data FOLDER --output FOLDER     Ctrl-C, and the same command goes on

Zeng et al., arXiv 2402.15758. A small network joins the embeddings of a token and the two before it; one layer lets
that row look at what the target's layers said of the text, and at the rows of the guesses before it. A guess takes in
tokens alone, never the head's own hidden rows, so the rows of a text are made once for all chains in it. The paper
guesses several tokens ahead by a head each; here, as in the other trainers, one head guesses the next token. Needs the
extra `train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.chains import ChainAttention
from training.command import command
from training.data_files import Batch
from training.data_vocabulary import head_vocabulary
from training.drafts import Recipe, Target, chains_of, noisy
from training.layers import Joined, begin, feed_forward, layer_of, linear, write_speculator

__all__ = ["Chimera", "main"]

TOKENS = 3  # that a row joins
QUIET = 0.25  # of the target's last norm, see training.eagle3


class Chimera(nn.Module):
    """A head of one layer over rows of three tokens.

    Args:
        target: what it drafts for.
        taps: layers of the target's features.
    """

    title, layout, option = (
        "A head in the style of Chimera",
        "the speculators library, which knows no such head",
        "--draft-head",
    )
    confidence = None

    def __init__(self, target: Target, taps: Sequence[int]):
        super().__init__()
        shape = target.config
        width = shape.hidden_size
        self.target, self.taps = target, taps
        self.token_norm, self.inner, self.outer = nn.RMSNorm(width), linear(width, TOKENS * width), linear(width, width)
        self.fc, self.hidden_norm = Joined(shape, len(taps)), nn.RMSNorm(width, shape.norm_epsilon)
        self.layers = nn.ModuleList([layer_of(shape, width)])
        self.norm, self.lm_head = nn.RMSNorm(width, shape.norm_epsilon), linear(len(target.tokens), width)
        last = target.layer(shape.layers - 1)
        begin(self.layers[0], last)
        with torch.no_grad():
            if "input_layernorm.weight" in last:
                self.hidden_norm.weight.copy_(last["input_layernorm.weight"])
            self.norm.weight.copy_(QUIET * target.norm)
            self.lm_head.weight.copy_(target.logit_rows)

    @property
    def logits(self) -> nn.Linear:
        return self.lm_head

    def guesses(
        self, batch: Batch, chains: Tensor, depth: int, share: float, noise: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See training.drafts.Head."""
        layer, attention = self.layers[0], ChainAttention(batch, self.target.config)
        projected, is_learned = layer["self_attn"], chains_of(batch)[0]
        context = self.hidden_norm(self.fc(noisy(batch.features[:, :-1], noise)))
        attention.read(projected["k_proj"](context), projected["v_proj"](context))
        rows = self._rows(batch)
        x = layer["input_layernorm"](rows)
        queries, keys, values = (projected[f"{name}_proj"](x) for name in "qkv")
        for index in range(depth):
            ahead = (chains + index + 1).clamp(max=len(rows) - 1)
            goes_on = is_learned[ahead] & (batch.texts[ahead] == batch.texts[chains])
            if index == 1 and share < 1:
                goes_on &= torch.rand(len(chains)) < share
            chains = chains[goes_on]
            last = chains + index + 1  # the token that is known or guessed last
            attention.guess(goes_on, chains, keys[last], values[last])
            stream = rows[last] + projected["o_proj"](attention.mix(queries[last], chains))
            yield chains, self.norm(feed_forward(layer, stream))

    def _rows(self, batch: Batch) -> Tensor:
        """[n, H]: each token and the two before it in its text, nothing where there are none."""
        embedded = self.target.embed(batch.tokens)
        normed = self.token_norm(embedded)
        before = [
            torch.where((batch.positions >= back)[:, None], normed.roll(back, 0), 0) for back in reversed(range(TOKENS))
        ]
        return embedded + self.outer(F.silu(self.inner(torch.cat(before, -1))))

    def write(self, folder: Path, model: str) -> None:
        """Writes config.json and model.safetensors, in bf16; model: what other engines load the target by."""
        config = {"architectures": ["ChimeraDraftModel"], "aux_hidden_state_layer_ids": list(self.taps)}
        write_speculator(folder, self.target, self.state_dict(), model, "chimera", 4, config)


def main(arguments: list[str] | None = None) -> None:
    command(arguments, __doc__, Chimera, head_vocabulary, Recipe())


if __name__ == "__main__":
    main()
