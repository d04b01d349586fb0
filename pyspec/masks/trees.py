"""Draft trees as masks: a node sees a committed prefix, its ancestors and itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyspec.arguments import described
from pyspec.host import host
from pyspec.tree import DraftTree

TreeAndPrefix = tuple[np.ndarray, int]  # parents [T] int32, and how many keys are committed before the tree's


def parents_of(tree) -> np.ndarray:
    """Parents [T] int32 of a DraftTree or of integers that numpy makes an array of."""
    if isinstance(tree, DraftTree):
        return tree.parents
    parents = np.asarray(tree)
    if parents.ndim != 1 or not len(parents):
        raise ValueError(f"parents must be 1-D and not empty, got shape {parents.shape}")
    if parents.dtype.kind not in "iu":
        raise TypeError(f"parents must be a list, an array or a tensor of integers, got {described(tree)}")
    if not -1 <= int(parents.min()) <= int(parents.max()) < len(parents):
        raise ValueError(f"parents must be nodes or -1, got {int(parents.min())} to {int(parents.max())}")
    return np.ascontiguousarray(parents, np.int32)


def dense_of_trees(described: list[TreeAndPrefix], rows: int, keys: int) -> Tensor:
    """The mask [B, 1, N, M] bool that the lists of pyspec._host.tree_tiles stand for."""
    visible = torch.zeros((len(described), 1, rows, keys), dtype=torch.bool, device="cpu")
    for b, (parents, n) in enumerate(described):
        nodes = len(parents)
        bits = np.unpackbits(host().tree_layout(parents)[1].view(np.uint8), axis=1, bitorder="little")
        visible[b, 0, :nodes, :n] = True
        visible[b, 0, :nodes, n : n + nodes] = torch.from_numpy(bits[:, :nodes].astype(bool))
    return visible
