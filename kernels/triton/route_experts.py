"""route_experts and mix_experts on the GPU: a row's best experts, and the sum of what they gave.

One program per row finds its experts one after another, in registers; one per (row, 1024 columns) adds what they gave,
in the order of their ranking. Bound by their launches, and by reading the values.
"""

import torch

import triton
import triton.language as tl
from pyspec.kernels.early_launch import launch_options, wait_for_earlier

__all__ = ["OPTIONS", "mix_experts", "mix_kernel", "route_experts", "route_kernel"]

BLOCK = tl.constexpr(1024)
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def route_kernel(
    logits,  # [rows, experts]
    bias,  # [experts] or None
    scales,  # [experts] or None: of an expert's gate, after all else
    gates,  # [rows, choices], written
    ids,  # [rows, choices], written
    experts,
    choices,
    scale,
    MOST: tl.constexpr,  # experts, as a power of two
    MOST_CHOICES: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    RENORMALISES: tl.constexpr,
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row, expert, place = tl.program_id(0).to(tl.int64), tl.arange(0, MOST), tl.arange(0, MOST_CHOICES)
    is_free = expert < experts
    keys = tl.load(logits + row * experts + expert, mask=is_free, other=float("-inf"))
    if IS_SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-keys))
    else:
        scores = tl.exp(keys - tl.max(keys, 0))
        scores = scores / tl.sum(scores, 0)
    if bias is not None:
        keys = scores + tl.load(bias + expert, mask=is_free, other=0.0)
    keys = tl.where(keys == keys, keys, float("-inf"))  # so that NaN cannot leave a choice open
    found, chosen = tl.zeros([MOST_CHOICES], tl.int32), tl.zeros([MOST_CHOICES], tl.float32)
    total = tl.zeros([], tl.float32)
    for choice in range(choices):
        largest = tl.max(tl.where(is_free, keys, float("-inf")), 0)
        best = tl.min(tl.where(is_free & (keys == largest), expert, MOST), 0)
        score = tl.sum(tl.where(expert == best, scores, 0.0), 0)
        found, chosen = tl.where(place == choice, best, found), tl.where(place == choice, score, chosen)
        is_free = is_free & (expert != best)
        total += score
    if RENORMALISES:
        chosen = chosen / total
    if scales is not None:
        chosen *= tl.load(scales + found, mask=place < choices, other=1.0)
    tl.store(gates + row * choices + place, chosen * scale, mask=place < choices)
    tl.store(ids + row * choices + place, found, mask=place < choices)


@triton.jit
def mix_kernel(
    values,  # [rows * choices, size]
    gates,  # [rows, choices]
    shared,  # [rows, size] or None
    shared_gates,  # [rows] or None
    out,  # [rows, size], written
    choices,
    size,
    IS_EARLY: tl.constexpr,
):
    wait_for_earlier(IS_EARLY)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = column < size
    total = tl.zeros([BLOCK], tl.float32)
    for choice in range(choices):
        value = tl.load(values + (row * choices + choice) * size + column, mask=used, other=0.0)
        total += value * tl.load(gates + row * choices + choice)
    if shared is not None:
        value = tl.load(shared + row * size + column, mask=used, other=0.0)
        if shared_gates is not None:
            value *= tl.load(shared_gates + row)
        total += value
    tl.store(out + row * size + column, total, mask=used)


def route_experts(logits, bias, choices, sigmoid, renormalise, scale, scales=None):
    """Launches the kernel; arguments and results of torch.ops.pyspec.route_experts."""
    rows, experts = logits.shape
    gates = logits.new_empty((rows, choices))
    ids = logits.new_empty((rows, choices), dtype=torch.int32)
    if rows:
        most = {"MOST": max(2, triton.next_power_of_2(experts))}
        most["MOST_CHOICES"] = max(2, triton.next_power_of_2(choices))
        how = {"IS_SIGMOID": sigmoid, "RENORMALISES": renormalise, **OPTIONS, **launch_options(logits.device)}
        with torch.cuda.device_of(logits):
            route_kernel[(rows,)](logits, bias, scales, gates, ids, experts, choices, float(scale), **most, **how)
    return gates, ids


def mix_experts(values, gates, shared, shared_gates):
    """Launches the kernel; arguments and result of torch.ops.pyspec.mix_experts."""
    rows, choices = gates.shape
    size = values.shape[1]
    out = values.new_empty((rows, size))
    if out.numel():
        grid = (rows, triton.cdiv(size, BLOCK.value))
        with torch.cuda.device_of(values):
            how = {**OPTIONS, **launch_options(values.device)}
            mix_kernel[grid](values, gates, shared, shared_gates, out, choices, size, **how)
    return out
