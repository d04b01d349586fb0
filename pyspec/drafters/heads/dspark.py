"""A DSpark block drafter: one pass over a block says what may follow for all its tokens. DeepSeek, arXiv 2607.05147.

The block is the newest token and masks; its rows see each other, whatever their order, and the keys of the text, see
pyspec.drafters.heads.context. With o_k what row k gives after the last norm, the token behind a guess y in slot k has

    logits  head(o_k) + markov_w2 markov_w1[y];  in slot 0, y is the newest token
    a chance to be accepted, if it is drawn, of  sigmoid(proj [o_k, markov_w1[y]])

So a tree of any shape over the whole block takes one pass, and a product of low rank for each node. The files are
those of the speculators library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures.weights import Blank, Matrix, laid_out
from pyspec.drafters.heads.context import ContextConfig, ContextHead
from pyspec.ops.linear import linear

__all__ = ["DSparkConfig", "DSparkHead"]

LARGEST_BLOCK = 64
KIND = "dspark"


@dataclass(frozen=True)
class DSparkConfig(ContextConfig):
    """What a block drafter is.

    Attributes:
        block_size: tokens of a block, as many as are guessed.
        mask: the target's token that a block has behind its first.
        rank: of the product that says what follows from the guess before.
        has_confidence: whether it says how sure a guess is.
        confidence_sees_guess: whether that looks at the guess before too.
    """

    block_size: int
    mask: int
    rank: int
    has_confidence: bool
    confidence_sees_guess: bool


class DSparkHead(ContextHead):
    """A block drafter; config is a DSparkConfig, other arguments and errors are as for ContextHead."""

    title = "a DSpark block drafter"
    given_width = 0

    def _own_places(self, blank: Blank) -> dict[str, Tensor]:
        config, width = self.config, self.config.layers.hidden_size
        self.markov_rows: Matrix = blank.matrix(config.layers.vocab_size, config.rank)
        self.markov: Matrix = blank.matrix(config.draft_vocab_size, config.rank)
        places = {
            "markov_head.markov_w1.weight": self.markov_rows,
            "markov_head.markov_w2.weight": self.markov,
        }
        if config.has_confidence:
            self.sure: Matrix = blank.matrix(1, width + config.rank * config.confidence_sees_guess)
            self.sure_bias = blank.vector(1)
            places |= {"confidence_head.proj.weight": self.sure, "confidence_head.proj.bias": self.sure_bias}
        return super()._own_places(blank) | places

    def _lay_out_own(self, weights: torch.dtype | str) -> Sequence[str]:
        self.markov_rows, self.markov = laid_out(self.markov_rows, self.dtype), laid_out(self.markov, weights)
        if self.config.has_confidence:  # one row: too small to be worth fewer bits
            self.sure, self.sure_of_guess = self.sure.tensor_split([self.config.layers.hidden_size], 1)
            self.sure = laid_out(self.sure, self.dtype)
        return ["markov"]

    def _own_described(self) -> dict[str, str]:
        sure = "and how sure they are" if self.config.has_confidence else "and not how sure they are"
        return {"block": f"{self.config.block_size} guesses of one pass, rank {self.config.rank}, {sure}"}

    def guess(self, embedded: Tensor, given: Tensor, cache, numbers) -> list[Tensor]:
        """[R, H] after the last norm, logits [R, draft vocabulary] fp32 without what follows from the guess before, and
        where it says how sure it is, that, as the logit [R, 1] fp32 and without that too; nothing is `given`."""
        normed = self._through_layers(embedded, None, cache, numbers)
        said = [normed, linear(normed, self.head, out_dtype=torch.float32)]
        if self.config.has_confidence:
            said.append(linear(normed, self.sure, self.sure_bias, out_dtype=torch.float32))
        return said

    def behind(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What follows from guesses [R] int64 of the target's tokens: logits [R, draft vocabulary] fp32, and what is
        added to the logit [R] of how sure the next guess is, None where nothing is."""
        rows = self.markov_rows.rows(tokens.to(self.device))
        logits = linear(rows.to(self.dtype), self.markov, out_dtype=torch.float32)
        has_sure = self.config.has_confidence and self.config.confidence_sees_guess
        return logits, (rows * self.sure_of_guess).sum(-1) if has_sure else None

    @classmethod
    def read_config(cls, folder: Path, tensors: Mapping[str, Tensor], target, taps: Sequence[int] | None):
        fields, entries = DSparkConfig.read_common(folder, tensors, target, taps, KIND)
        for key, supported, default in (("sample_from_anchor", True, True), ("markov_head_type", "vanilla", "vanilla")):
            if (found := entries.get(key, default)) != supported:
                raise ValueError(f"{entries.name} has a {key} of {found!r}, supported is {supported!r}")
        return DSparkConfig(
            **fields,
            block_size=entries.whole("block_size", most=LARGEST_BLOCK),
            mask=entries.whole("mask_token_id", least=0, most=fields["layers"].vocab_size - 1),
            rank=entries.whole("markov_rank"),
            has_confidence=entries.flag("enable_confidence_head", False),
            confidence_sees_guess=entries.flag("confidence_head_with_markov", False),
        )
