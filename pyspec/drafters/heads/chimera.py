"""A head in the style of Chimera: the last three tokens, and what the target said before. arXiv 2402.15758.

    e = embedding(x);  h = e + outer(silu(inner [norm(e before the one before), norm(e before), norm(e)]))
    h = h + attention(h);  h = h + feed_forward(norm(h));  head(norm(h))

A row sees the keys of the text, see pyspec.drafters.heads.context, and those of the guesses above it. It takes in
tokens alone: nothing that the head said before. training/chimera.py trains such heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pyspec.architectures.weights import Blank, Matrix, laid_out
from pyspec.drafters.heads.context import ContextConfig, ContextHead
from pyspec.ops.linear import linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.row_statistics import row_statistics
from pyspec.ops.swiglu import swiglu

__all__ = ["TOKENS", "ChimeraHead"]

TOKENS = 3  # that a row joins
EPSILON = torch.finfo(torch.float32).eps  # of the norm of embeddings: what torch's RMSNorm takes by itself


class ChimeraHead(ContextHead):
    """A head of rows of three tokens; arguments and errors as for ContextHead."""

    title = "a head in the style of Chimera"

    @property
    def given_width(self) -> int:
        return (TOKENS - 1) * self.config.layers.hidden_size

    def _own_places(self, blank: Blank) -> dict[str, Tensor]:
        width = self.config.layers.hidden_size
        self.token_norm = blank.vector(width)
        self.inner: Matrix = blank.matrix(width, TOKENS * width)
        self.outer: Matrix = blank.matrix(width, width)
        places = {"token_norm.weight": self.token_norm, "inner.weight": self.inner, "outer.weight": self.outer}
        return super()._own_places(blank) | places

    def _lay_out_own(self, weights: torch.dtype | str) -> Sequence[str]:
        # of the tokens before and of the row's own: rows of both are nowhere side by side
        before, own = self.inner.split([self.given_width, self.config.layers.hidden_size], 1)
        self.inner_before, self.inner = laid_out(before, weights), laid_out(own, weights)
        self.outer = laid_out(self.outer, weights)
        return ["inner_before", "inner", "outer"]

    def guess(self, embedded: Tensor, given: Tensor, cache, numbers) -> list[Tensor]:
        """[R, H] after the last norm, the same again, logits [R, draft vocabulary] fp32 and their top_tokens,
        top_logits and log_sum_exp, see row_statistics; given: embedded rows of the two tokens before, 0 for none."""
        width = embedded.shape[1]
        before = rms_norm(given.view(-1, width), self.token_norm, EPSILON, out_dtype=self.dtype)
        own = rms_norm(embedded, self.token_norm, EPSILON, out_dtype=self.dtype)
        inner = linear(before.view(len(embedded), -1), self.inner_before, out_dtype=torch.float32)
        inner = rms_norm(inner, None, 0.0, delta=linear(own, self.inner, out_dtype=torch.float32))  # their sum
        inner = swiglu(inner, up=inner, activation="sigmoid", out_dtype=self.dtype)  # which is silu
        delta = linear(inner, self.outer, out_dtype=torch.float32)
        normed = self._through_layers(embedded, delta, cache, numbers)
        logits = linear(normed, self.head, out_dtype=torch.float32)
        return [normed, normed, logits, *row_statistics(logits)[:3]]

    @classmethod
    def read_config(cls, folder: Path, tensors: Mapping[str, Tensor], target, taps: Sequence[int] | None):
        return ContextConfig(**ContextConfig.read_common(folder, tensors, target, taps, "chimera")[0])
