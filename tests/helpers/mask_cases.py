"""Queries, keys and values under masks, and the arguments of the op."""

import numpy as np
import torch


def tensors(rows, keys, batch=1, heads=2, kv_heads=1, head_dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, rows, head_dim), *[(batch, kv_heads, keys, head_dim)] * 2)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def random_dense(rows, keys, seed=0):
    """Empty, full and partial tiles at random, aligned with nothing or with tiles."""
    random = np.random.default_rng(seed)
    coarse = random.choice([0.0, 0.0, 1.0, 1.0, 0.1, 0.6], size=(-(-rows // 64) + 2, -(-keys // 64) + 2))
    row, key = random.integers(0, 64, 2) * random.integers(0, 2)
    fine = np.kron(coarse, np.ones((64, 64)))[row : row + rows, key : key + keys]
    return torch.from_numpy(random.random((rows, keys)) < fine)


def arguments(qkv, mask, softcap=None):
    lists = (mask.full_ranges, mask.full_tiles, mask.partial_ranges, mask.partial_tiles, mask.bits)
    return (*qkv, *lists, mask.row_order, mask.key_order, 0.125, softcap)


def some_mask(rows, keys, seed=0):
    """Empty, full and partial tiles, aligned with nothing, and rows that see nothing."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.tensor([0.0, 1.0, 0.3])[torch.randint(0, 3, (rows // 64 + 2, keys // 64 + 2), generator=generator)]
    chance = coarse.repeat_interleave(64, 0).repeat_interleave(64, 1)[9 : 9 + rows, 5 : 5 + keys]
    visible = torch.rand(rows, keys, generator=generator) < chance
    visible[rows // 2] = False
    return visible
