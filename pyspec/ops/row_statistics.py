"""row_statistics: what acceptance rules and drafters read of a row of logits, in one pass, no softmax stored.

With m the largest logit x of a row so far, two sums are kept and moved whenever m grows:

    s = sum e^(x - m),    t = sum (x - m) e^(x - m)

    log_sum_exp = m + log s
    entropy = log s - t / s
    probability of a token = e^(x[token] - m) / s = e^(x[token] - log_sum_exp)

and beside them the 8 best tokens. A logit of -inf is a token that cannot come: it adds nothing to a sum and is never
among the best. A row that holds NaN, +inf or nothing but -inf is no law: its log_sum_exp is NaN, +inf or -inf (NaN
first), its entropy and probabilities are NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_floating
from pyspec.ops._library import Op

TOP = 8  # tokens that are told for each row: kTop in kernels/params/row_statistics.h


class RowStatistics(NamedTuple):
    """Statistics of logits [R, V]."""

    top_tokens: Tensor  #: [R, 8] int64, best first, the lower token first among equals; -1 where there is none
    top_logits: Tensor  #: [R, 8] fp32; -inf where there is none
    log_sum_exp: Tensor  #: [R] fp32, natural log
    entropy: Tensor  #: [R] fp32, nats
    token_probabilities: Tensor | None  #: [R, M] fp32, of the tokens asked for


def row_statistics_reference(logits: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Plain PyTorch, in fp32."""
    values = logits.float()
    candidates = torch.where(values.isnan(), -torch.inf, values)
    top_logits, top_tokens = candidates.sort(dim=1, descending=True, stable=True)
    missing = max(TOP - logits.shape[1], 0)
    top_logits = torch.nn.functional.pad(top_logits[:, :TOP], (0, missing), value=-torch.inf)
    top_tokens = torch.nn.functional.pad(top_tokens[:, :TOP], (0, missing))
    top_tokens = torch.where(top_logits == -torch.inf, -1, top_tokens)

    largest = top_logits[:, :1]
    shift = torch.where(largest.isfinite(), largest, 0.0)
    below = values - shift
    weights = below.exp()
    total = weights.sum(1)
    weighted = torch.where(weights == 0, 0.0, below * weights).sum(1)  # not -inf * 0
    log_sum_exp = shift[:, 0] + total.log()
    is_law = log_sum_exp.isfinite()
    entropy = torch.where(is_law, total.log() - weighted / total, torch.nan)

    if tokens is None:
        tokens = logits.new_empty((len(logits), 0), dtype=torch.int64)
    probabilities = weights.gather(1, tokens.clamp(0, logits.shape[1] - 1)) / total[:, None]
    is_known = is_law[:, None] & (tokens >= 0) & (tokens < logits.shape[1])
    return top_tokens, top_logits, log_sum_exp, entropy, torch.where(is_known, probabilities, torch.nan)


def _fake(logits: Tensor, tokens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, count = logits.shape[0], 0 if tokens is None else tokens.shape[1]
    shapes = ((rows, TOP), (rows,), (rows,), (rows, count))
    top_logits, log_sum_exp, entropy, probabilities = (logits.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return logits.new_empty((rows, TOP), dtype=torch.int64), top_logits, log_sum_exp, entropy, probabilities


def _triton():
    from pyspec.kernels.row_statistics import row_statistics as launch

    return launch


_OP = Op(
    "row_statistics",
    "(Tensor logits, Tensor? tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    row_statistics_reference,
    _fake,
    _triton,
)


def row_statistics(logits: Tensor, tokens: Tensor | None = None) -> RowStatistics:
    """The best tokens, log-sum-exp and entropy of each row of logits, and the probabilities of given tokens.

    Args:
        logits: [R, V] fp32, fp16 or bf16; any row stride, a contiguous last dimension.
        tokens: [R, M] int64, tokens of each row whose probability is wanted.

    Returns:
        RowStatistics; token_probabilities is None without tokens. A row has the same bits in every call.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride or device does not fit, or a token is outside [0, V). Tokens on a GPU, and under
            torch.compile, are not looked at: there such a token has probability NaN.
    """
    check_are_tensors(logits=logits, tokens=tokens, optional=("tokens",))
    check_floating("logits", logits.dtype)
    if logits.dim() != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must be [R, V] with V at least 1, got shape {tuple(logits.shape)}")
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise ValueError(f"logits must have a contiguous last dimension, got strides {logits.stride()}")
    if tokens is not None:
        _check_tokens(logits, tokens)
    *statistics, probabilities = _OP(logits, tokens)
    return RowStatistics(*statistics, None if tokens is None else probabilities)


def _check_tokens(logits: Tensor, tokens: Tensor) -> None:
    rows, vocab = logits.shape
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")
    if tokens.dim() != 2 or tokens.shape[0] != rows:
        raise ValueError(f"tokens must be [{rows}, M] like the rows of logits, got shape {tuple(tokens.shape)}")
    if tokens.device != logits.device:
        raise ValueError(f"tokens must be on {logits.device} like logits, got {tokens.device}")
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or not tokens.numel():
        return
    lowest, highest = (int(token) for token in tokens.aminmax())
    if lowest < 0 or highest >= vocab:
        raise ValueError(f"tokens must be in [0, {vocab}), got {lowest} to {highest}")
