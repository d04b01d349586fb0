"""row_statistics on the GPU: best tokens, log-sum-exp and entropy of a row of logits, in one pass over it.

Each group of 256 logits is one warp's, which keeps them in registers: its largest logit, m, and with it the sums of
e^(x - m) and (x - m) e^(x - m). A second kernel, one warp per row, adds the groups. The 8 best tokens lie in the 8
groups with the largest logits (of equals the first), and there in 8 of the parts that a lane reads: three times it
finds the 8 best of a few numbers a lane, and no warp waits for another. Bound by reading the logits, and with few rows
by the second kernel, some 3000 instructions of one warp.
Row rule: groups are cut at fixed places, and nothing about a row's place in memory is specialised on, so every row is
summed by the same code in the same layout.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["GROUP", "GROUP_OPTIONS", "OPTIONS", "group_kernel", "row_kernel", "row_statistics"]

TOP = tl.constexpr(8)
WARPS, LANES = tl.constexpr(4), tl.constexpr(32)  # of a program of group_kernel, which has a group for each warp
STEPS = tl.constexpr(8)  # logits of a group that a lane has
GROUP = tl.constexpr(LANES.value * STEPS.value)
TOKENS = tl.constexpr(16)  # of those whose probability is wanted, at a time
SUMS = ["group_best", "group_weight", "group_weighted"]  # parts of one tensor
NOTHING, LAST = tl.constexpr(-2139095041), tl.constexpr(2147483647)  # ordered(-inf), and behind every place
LARGEST = tl.constexpr(3.4028234663852886e38)
LOWEST = tl.constexpr(-150.0)  # e^-150 is 0 in fp32, and so is -150 e^-150: -inf adds nothing
GROUP_OPTIONS = {"num_warps": WARPS.value, "enable_fp_fusion": False}
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def load_logits(logits, places, vocab):
    return tl.load(logits + places, mask=places < vocab, other=float("-inf")).to(tl.float32)


@triton.jit
def not_nan(x):
    """NaN is never among the best."""
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def ordered(x):
    """Integers in the order of x, which is not NaN: one instruction finds a warp's largest. -0 and +0 are the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def take(keys, places):
    """The largest of ordered numbers, as a float, and the lowest place that it has, and what is left without it."""
    best = tl.max(keys, 0)
    place = tl.min(tl.where(keys == best, places, LAST), 0)
    bits = best ^ ((best >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), place, tl.where(places == place, NOTHING, keys)


@triton.jit
def by_warp(x):
    return tl.reshape(x, [WARPS, LANES])


@triton.jit
def best_of(keys, places, ranks):
    """Places of the largest of ordered numbers, of equals the lowest: that of each of ranks; of -inf any."""
    found = ranks
    for rank in tl.static_range(TOP):
        _, place, keys = take(keys, places)
        found = tl.where(ranks == rank, place, found)
    return found


@triton.jit(do_not_specialize=["vocab", "stride"], do_not_specialize_on_alignment=["logits", *SUMS])
def group_kernel(
    logits,  # [rows, vocab]
    group_best,  # [rows, groups], written
    group_weight,  # [rows, groups], written
    group_weighted,  # [rows, groups], written
    vocab,
    stride,  # elements from row to row of logits
    # Constants
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row, first_group = tl.program_id(0).to(tl.int64), tl.program_id(1) * WARPS
    step, thread = tl.arange(0, STEPS)[:, None], tl.arange(0, WARPS * LANES)
    first = (first_group + thread // LANES) * GROUP + thread % LANES
    x = load_logits(logits + row * stride, first[None, :] + step * LANES, vocab)
    best = tl.max(by_warp(tl.max(not_nan(x), 0)), 1)
    shift = tl.minimum(tl.maximum(best, -LARGEST), LARGEST)  # +inf - LARGEST is +inf: only NaN makes NaN
    below = x - tl.reshape(tl.broadcast_to(shift[:, None], [WARPS, LANES]), [WARPS * LANES])[None, :]
    below = tl.where(below < LOWEST, LOWEST, below)
    weight = tl.exp(below)
    group, groups = first_group + tl.arange(0, WARPS), tl.cdiv(vocab, GROUP)
    place, used = row * groups + group, group < groups
    tl.store(group_best + place, best, mask=used)
    tl.store(group_weight + place, tl.sum(by_warp(tl.sum(weight, 0)), 1), mask=used)
    tl.store(group_weighted + place, tl.sum(by_warp(tl.sum(below * weight, 0)), 1), mask=used)


@triton.jit(do_not_specialize=["vocab", "count", "stride"], do_not_specialize_on_alignment=["logits", "tokens", *SUMS])
def row_kernel(
    # Pointers
    logits,  # [rows, vocab]
    group_best,  # [rows, groups]
    group_weight,  # [rows, groups]
    group_weighted,  # [rows, groups]
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
    # Constants
    GROUPS: tl.constexpr,  # a power of two, at least the groups of a row
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    groups = tl.cdiv(vocab, GROUP)
    group = tl.arange(0, GROUPS)
    place, used = row * groups + group, group < groups
    best = tl.load(group_best + place, mask=used, other=float("-inf"))
    weight = tl.load(group_weight + place, mask=used, other=0.0)
    weighted = tl.load(group_weighted + place, mask=used, other=0.0)
    largest = tl.minimum(tl.maximum(best, -LARGEST), LARGEST)
    shift = tl.max(largest, 0)
    change = tl.maximum(largest - shift, LOWEST)
    keep = tl.exp(change)
    total = tl.sum(keep * weight, 0)
    weighted = tl.sum(keep * (weighted + change * weight), 0)

    log_total = tl.log(total)
    log_sum_exp = shift + log_total
    total = tl.where(tl.abs(log_sum_exp) < float("inf"), total, float("nan"))  # no law otherwise
    tl.store(out_log_sum_exp + row, log_sum_exp)
    tl.store(out_entropy + row, log_total - weighted / total)

    # Of the 8 best groups' parts the 8 with the best logits, of equals the first, and of those the 8 best logits. A
    # part is every 32nd logit of a group: it lies in one lane's registers. One that comes twice changes nothing.
    step, part = tl.arange(0, STEPS)[:, None] * LANES, tl.arange(0, TOP * LANES)
    first = best_of(ordered(best), group * GROUP, part // LANES)
    places = (first + part % LANES)[None, :] + step
    keys = ordered(not_nan(load_logits(logits, places, vocab)))
    best = tl.max(keys, 0)
    place = tl.min(tl.where(keys == best, places, LAST), 0)
    first = best_of(best, place, tl.arange(0, TOP))
    places = tl.reshape((first - first % GROUP // LANES * LANES)[None, :] + step, [STEPS * TOP])
    left = ordered(not_nan(load_logits(logits, places, vocab)))
    for rank in tl.static_range(TOP):
        logit, token, left = take(left, places)
        tl.store(out_tokens + row * TOP + rank, tl.where(logit > float("-inf"), token, -1).to(tl.int64))
        tl.store(out_logits + row * TOP + rank, logit)

    for first in range(0, count, TOKENS):
        index = first + tl.arange(0, TOKENS)
        wanted = tl.load(tokens + row * count + index, mask=index < count, other=-1)
        is_known = (wanted >= 0) & (wanted < vocab)
        x = tl.load(logits + wanted, mask=is_known, other=0.0).to(tl.float32)
        probability = tl.where(is_known, tl.exp(x - shift) / total, float("nan"))
        tl.store(out_probabilities + row * count + index, probability, mask=index < count)


def row_statistics(logits, tokens):
    """Launches the kernels; arguments and results of torch.ops.pyspec.row_statistics."""
    rows, vocab = logits.shape
    tokens = logits.new_empty((rows, 0), dtype=torch.int64) if tokens is None else tokens.contiguous()
    top_tokens = logits.new_empty((rows, TOP.value), dtype=torch.int64)
    top_logits = logits.new_empty((rows, TOP.value), dtype=torch.float32)
    log_sum_exp, entropy = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    probabilities = logits.new_empty(tokens.shape, dtype=torch.float32)
    outputs = (top_tokens, top_logits, log_sum_exp, entropy, probabilities)
    if rows:
        groups = triton.cdiv(vocab, GROUP.value)
        sums = logits.new_empty((3, rows, groups), dtype=torch.float32)
        sizes = (vocab, tokens.shape[1], logits.stride(0))
        early = launch_options(logits.device)
        constants = {"GROUPS": triton.next_power_of_2(groups), **early}
        with torch.cuda.device_of(logits):
            group_kernel[(rows, triton.cdiv(groups, WARPS.value))](
                logits, *sums, vocab, logits.stride(0), **GROUP_OPTIONS, **early
            )
            row_kernel[(rows,)](logits, *sums, tokens, *outputs, *sizes, **constants, **OPTIONS)
    return outputs
