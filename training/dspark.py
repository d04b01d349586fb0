"""Trains a DSpark block drafter for a model: one pass of one layer guesses eight tokens. DeepSeek, arXiv 2607.05147.

    python -m training.dspark --model MODEL --data FOLDER --output FOLDER     Ctrl-C, and the same command goes on

A block is the newest token and seven masks. Its rows see each other and what the target's layers said of the text
before; what the row of a slot says becomes a guess by a matrix of logits, and a product of low rank adds what follows
from the guess before it. A line more says how sure a guess is. The folder is in the layout of the speculators library.
Needs the extra `train`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from training.chains import turned
from training.command import command
from training.data_files import Batch
from training.data_vocabulary import head_vocabulary
from training.drafts import Recipe, Target, chains_of, noisy
from training.layers import Joined, begin, feed_forward, layer_of, linear, write_speculator

__all__ = ["DSpark", "main"]

BLOCK = 8  # guesses of a round
RANK = 64  # of what follows from the guess before
RECIPE = Recipe(depth=BLOCK, share=0.25, frozen=0.0)  # blocks at a quarter of the rows: as many guesses as a head's
QUIET = 0.25  # of the target's last norm, see training.eagle3


class DSpark(nn.Module):
    """A block drafter of one Qwen3 layer, whose tensors have the names of the speculators layout.

    Args:
        target: what it drafts for.
        taps: layers of the target's features.
    """

    title, layout, option = "A DSpark block drafter", "the speculators library", "--draft-head"

    def __init__(self, target: Target, taps: Sequence[int]):
        super().__init__()
        shape = target.config
        width = shape.hidden_size
        self.target, self.taps = target, taps
        guessed = set(target.tokens.tolist())
        self.mask = max((token for token in range(shape.vocab_size) if token not in guessed), default=width - 1)
        self.fc, self.hidden_norm = Joined(shape, len(taps)), nn.RMSNorm(width, shape.norm_epsilon)
        layer = layer_of(shape, width)
        for name in ("q_norm", "k_norm"):
            layer["self_attn"][name] = nn.RMSNorm(shape.head_dim, shape.norm_epsilon)
        self.layers, self.norm = nn.ModuleList([layer]), nn.RMSNorm(width, shape.norm_epsilon)
        self.markov_w1 = nn.Embedding(shape.vocab_size, RANK)
        self.logits = linear(len(target.tokens), width + RANK)  # of a row, and of the token before the guess
        self.confidence = nn.Linear(width + RANK, 1)
        last = target.layer(shape.layers - 1)
        begin(layer, last)
        with torch.no_grad():
            if "input_layernorm.weight" in last:
                self.hidden_norm.weight.copy_(last["input_layernorm.weight"])
            self.norm.weight.copy_(QUIET * target.norm)
            self.logits.weight[:, :width] = target.logit_rows
            nn.init.normal_(self.markov_w1.weight, std=0.02)
            nn.init.zeros_(self.confidence.weight)

    def guesses(
        self, batch: Batch, chains: Tensor, depth: int, share: float, noise: float
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """See training.drafts.Head; `share` is that of the chains that are guessed at all, each a block."""
        if share < 1:
            chains = chains[torch.rand(len(chains)) < share]
        layer, is_learned = self.layers[0], chains_of(batch)[0]
        context = self.hidden_norm(self.fc(noisy(batch.features[:, :-1], noise)))
        anchors = self.target.embed(batch.tokens[chains + 1])
        masks = self.target.embed(torch.tensor([self.mask])).expand(len(chains), BLOCK - 1, -1)
        stream = torch.cat([anchors[:, None], masks], 1)  # [C, BLOCK, H]
        stream = stream + self._attended(batch, chains, layer["input_layernorm"](stream), context)
        said = self.norm(feed_forward(layer, stream))
        for index in range(min(depth, BLOCK)):
            ahead = (chains + index + 1).clamp(max=len(batch.tokens) - 1)
            goes_on = is_learned[ahead] & (batch.texts[ahead] == batch.texts[chains])
            chains, said = chains[goes_on], said[goes_on]
            yield chains, torch.cat([said[:, index], self.markov_w1(batch.tokens[chains + index + 1])], -1)

    def _attended(self, batch: Batch, chains: Tensor, block: Tensor, context: Tensor) -> Tensor:
        """[C, BLOCK, H]: what attention adds to blocks [C, BLOCK, H] behind the rows `chains` of the context [n, H]."""
        shape, projected = self.target.config, self.layers[0]["self_attn"]
        frequencies = shape.rope_frequencies()
        places = batch.positions[chains, None] + 1 + torch.arange(BLOCK)

        def in_heads(rows: Tensor, name: str, positions: Tensor | None) -> Tensor:
            rows = projected[f"{name}_proj"](rows).unflatten(-1, (-1, shape.head_dim)).float()
            return rows if positions is None else turned(projected[f"{name}_norm"](rows), positions, frequencies)

        queries = in_heads(block, "q", places) * shape.head_dim**-0.5  # [C, BLOCK, heads, head_dim]
        queries = queries.unflatten(2, (shape.kv_heads, -1)).permute(2, 0, 1, 3, 4).flatten(2, 3)
        own_keys, own_values = (
            in_heads(block, *each).permute(2, 0, 1, 3) for each in (("k", places), ("v", None))
        )  # [kv_heads, C, BLOCK, head_dim]
        keys, values = (
            in_heads(context, *each).transpose(0, 1) for each in (("k", batch.positions), ("v", None))
        )  # [kv_heads, n, head_dim]
        own_scores, mixed = queries @ own_keys.transpose(2, 3), []
        for text in batch.texts[chains].unique().tolist():
            rows, of = batch.texts == text, batch.texts[chains] == text
            hidden = batch.positions[rows] > batch.positions[chains[of], None]  # [c, length]
            scores = queries[:, of].flatten(1, 2) @ keys[:, rows].transpose(1, 2)
            scores = scores.unflatten(1, (-1, queries.shape[2])).masked_fill(hidden[:, None], float("-inf"))
            shares = torch.cat([scores, own_scores[:, of].to(scores.dtype)], -1).softmax(-1)
            of_text, of_block = shares.split([hidden.shape[1], BLOCK], -1)
            found = (of_text.flatten(1, 2) @ values[:, rows]).unflatten(1, (-1, queries.shape[2]))
            mixed.append(found + of_block @ own_values[:, of])
        found = torch.cat(mixed, 1).unflatten(2, (BLOCK, -1)).permute(1, 2, 0, 3, 4)
        return projected["o_proj"](found.flatten(2))

    def write(self, folder: Path, model: str) -> None:
        """Writes config.json and model.safetensors, in bf16; model: what other engines load the target by."""
        tensors, width = self.state_dict(), self.target.config.hidden_size
        logits = tensors.pop("logits.weight")
        tensors["lm_head.weight"], tensors["markov_head.markov_w2.weight"] = logits[:, :width], logits[:, width:]
        tensors["markov_head.markov_w1.weight"] = tensors.pop("markov_w1.weight")
        for name in ("weight", "bias"):
            tensors[f"confidence_head.proj.{name}"] = tensors.pop(f"confidence.{name}")
        config = {
            "architectures": ["DSparkSpeculator"],
            "block_size": BLOCK,
            "aux_hidden_state_layer_ids": list(self.taps),
            "mask_token_id": self.mask,
            "sample_from_anchor": True,
            "markov_rank": RANK,
            "markov_head_type": "vanilla",
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "transformer_layer_config": {"model_type": "qwen3"},
        }
        write_speculator(folder, self.target, tensors, model, "dspark", BLOCK, config)


def main(arguments: list[str] | None = None) -> None:
    command(arguments, __doc__, DSpark, head_vocabulary, RECIPE)


if __name__ == "__main__":
    main()
