"""Weights and rows of linear, and how int8 weights are rounded."""

import numpy as np
import torch

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PACKED = (*FLOATS, torch.int8)
SIZES = [(1, 1), (1, 2), (5, 1), (1, 65), (31, 33), (32, 32), (33, 31), (65, 97)]  # outputs, inputs


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded_groups(values: np.ndarray) -> np.ndarray:
    rows, inputs = values.shape
    return np.pad(values, ((0, 0), (0, -inputs % 32))).reshape(rows, -1, 32)


def rounded_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [N, G] fp16 and integers [N, G, 32] of fp32 weights."""
    groups = padded_groups(weight)
    scales, integers = np.zeros(groups.shape[:2], np.float16), np.zeros(groups.shape, np.int64)
    for n, row in enumerate(groups):
        for g, group in enumerate(row):
            scales[n, g] = np.abs(group).max() / np.float32(127)
            if scales[n, g] > 0:
                inverse = np.float32(1) / np.float32(scales[n, g])
                integers[n, g] = np.clip(np.rint(group * inverse), -127, 127)
    return scales, integers
