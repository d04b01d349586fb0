"""row_statistics on the GPU: best tokens, log-sum-exp and entropy of a row of logits, in one pass over it.

One program per row, a block of 2048 logits at a time. The largest logit so far, m, is one number; the sums of
e^(x - m) and (x - m) e^(x - m) are kept in 2048 lanes and moved when m grows. The 8 best so far are a set in no
order: while the best logit of the block beats the worst of the set, it takes its place, so most blocks cost one
reduction. Bound by reading the logits.
Row rule: a row is one program, and nothing about a row's place in memory is specialised on, so every row is summed
by the same code in the same layout.
"""

import torch

import triton
import triton.language as tl

__all__ = ["OPTIONS", "row_statistics", "row_statistics_kernel"]

TOP = tl.constexpr(8)
BLOCK = tl.constexpr(2048)  # logits
TOKENS = tl.constexpr(16)  # of those whose probability is wanted, at a time
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-150.0)  # e^-150 is 0 in fp32, and so is -150 e^-150: -inf adds nothing
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def take(best, logits, places, top_logits, top_tokens):
    """Moves the best of a block, at its lowest place, into the set, for the worst there: of equals the last token."""
    place = tl.min(tl.where(logits == best, places, 2147483647), 0)
    worst = tl.min(top_logits, 0)
    leaving = tl.max(tl.where(top_logits == worst, top_tokens, -1), 0)
    top_logits = tl.where(top_tokens == leaving, best, top_logits)
    top_tokens = tl.where(top_tokens == leaving, place, top_tokens)
    return tl.where(places == place, float("-inf"), logits), top_logits, top_tokens


@triton.jit(do_not_specialize=["vocab", "count", "stride"], do_not_specialize_on_alignment=["logits", "tokens"])
def row_statistics_kernel(
    # Pointers
    logits,  # [rows, vocab]
    tokens,  # [rows, count] int64
    out_tokens,  # [rows, TOP] int64, written
    out_logits,  # [rows, TOP], written
    out_log_sum_exp,  # [rows], written
    out_entropy,  # [rows], written
    out_probabilities,  # [rows, count], written
    # Sizes
    vocab,
    count,
    stride,  # elements from row to row of logits
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ranks = tl.arange(0, TOP)
    top_logits = tl.full([TOP], float("-inf"), tl.float32)
    top_tokens = vocab + ranks  # places that stand for none: told apart, and behind every token
    shift = -LARGEST  # the largest logit so far, where that is finite
    weights = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocab, BLOCK):
        places = first + tl.arange(0, BLOCK)
        x = tl.load(logits + places, mask=places < vocab, other=float("-inf")).to(tl.float32)
        left = tl.where(x == x, x, float("-inf"))  # NaN is never among the best
        best = tl.max(left, 0)
        now = tl.minimum(tl.maximum(shift, best), LARGEST)  # +inf - LARGEST is +inf: only NaN makes NaN
        change = tl.maximum(shift - now, LOWEST)
        keep = tl.exp(change)
        below = x - now
        below = tl.where(below < LOWEST, LOWEST, below)
        weight = tl.exp(below)
        weighted = (weighted + change * weights) * keep + below * weight
        weights = weights * keep + weight
        shift = now
        while best > tl.min(top_logits, 0):
            left, top_logits, top_tokens = take(best, left, places, top_logits, top_tokens)
            best = tl.max(left, 0)

    total = tl.sum(weights, 0)
    log_total = tl.log(total)
    log_sum_exp = shift + log_total
    total = tl.where(tl.abs(log_sum_exp) < float("inf"), total, float("nan"))  # no law otherwise
    tl.store(out_log_sum_exp + row, log_sum_exp)
    tl.store(out_entropy + row, log_total - tl.sum(weighted, 0) / total)

    for rank in tl.static_range(TOP):
        best = tl.max(top_logits, 0)
        token = tl.min(tl.where(top_logits == best, top_tokens, 2147483647), 0)
        tl.store(out_tokens + row * TOP + rank, tl.where(token < vocab, token, -1).to(tl.int64))
        tl.store(out_logits + row * TOP + rank, best)
        top_logits = tl.where(top_tokens == token, float("-inf"), top_logits)
        top_tokens = tl.where(top_tokens == token, 2147483647, top_tokens)

    for first in range(0, count, TOKENS):
        index = first + tl.arange(0, TOKENS)
        wanted = tl.load(tokens + row * count + index, mask=index < count, other=-1)
        is_known = (wanted >= 0) & (wanted < vocab)
        x = tl.load(logits + wanted, mask=is_known, other=0.0).to(tl.float32)
        probability = tl.where(is_known, tl.exp(x - shift) / total, float("nan"))
        tl.store(out_probabilities + row * count + index, probability, mask=index < count)


def row_statistics(logits, tokens):
    """Launches the kernel; arguments and results of torch.ops.pyspec.row_statistics."""
    rows, vocab = logits.shape
    tokens = logits.new_empty((rows, 0), dtype=torch.int64) if tokens is None else tokens.contiguous()
    top_tokens = logits.new_empty((rows, TOP.value), dtype=torch.int64)
    top_logits = logits.new_empty((rows, TOP.value), dtype=torch.float32)
    log_sum_exp, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    probabilities = logits.new_empty(tokens.shape, dtype=torch.float32)
    outputs = (top_tokens, top_logits, log_sum_exp, entropy, probabilities)
    if rows:
        sizes = (vocab, tokens.shape[1], logits.stride(0))
        with torch.cuda.device_of(logits):
            row_statistics_kernel[(rows,)](logits, tokens, *outputs, *sizes, **OPTIONS)
    return outputs
