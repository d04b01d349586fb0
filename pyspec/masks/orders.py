"""Orders of rows and keys that leave fewer tiles of a mask with something in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyspec.masks import tiles
from pyspec.masks.trees import TreeAndPrefix


def depth_first(parents: np.ndarray) -> np.ndarray:
    """Nodes of a tree in depth-first order: every subtree is one run."""
    sizes = [1] * len(parents)
    for node in range(len(parents) - 1, 0, -1):
        sizes[parents[node]] += sizes[node]
    free = [0] * len(parents)  # the place that the next child's subtree begins at
    order = np.zeros(len(parents), np.int64)
    for node, parent in enumerate(parents.tolist()):
        place = free[parent] if node else 0
        order[place] = node
        free[node] = place + 1
        if node:
            free[parent] += sizes[node]
    return order


def depth_first_trees(trees: list[TreeAndPrefix], rows: int, keys: int):
    """Trees with their nodes in depth-first order, and the orders of rows [N] and of keys [M] that this is for each."""
    described, row_orders, key_orders = [], [], []
    for parents, n in trees:
        nodes = depth_first(parents)
        places = np.argsort(nodes).astype(np.int32)
        described.append((np.concatenate([[-1], places[parents[nodes[1:]]]]).astype(np.int32), n))
        row_orders.append(np.r_[nodes, len(nodes) : rows])
        key_orders.append(np.r_[0:n, n + nodes, n + len(nodes) : keys])
    return described, row_orders, key_orders


def reverse_cuthill_mckee(rows: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """The order of size places that brings the pairs (rows[i], keys[i]), taken as symmetric, near the diagonal."""
    try:
        from scipy.sparse import csgraph, csr_array
    except ImportError as error:
        raise ImportError('permuted("rcm") needs scipy: pip install scipy') from error
    graph = csr_array((np.ones(len(rows), np.int8), (rows, keys)), shape=(size, size))
    return csgraph.reverse_cuthill_mckee(graph, symmetric_mode=True)


def cuthill_mckee_tiles(
    tile_map: Tensor, table: Tensor, size: int, words: int
) -> tuple[tuple[Tensor, Tensor], list[np.ndarray]]:
    """The tile map and the bits, on the CPU, of a mask's entries in reverse_cuthill_mckee's order, and the order.

    Args:
        tile_map, table: as tiles.entries takes them, of size rows and as many keys, in blocks of words.
    """
    batch, row, key = (index.cpu() for index in tiles.entries(tile_map, table, size))
    found, places = [], []
    for b in range(len(tile_map)):
        mine = batch == b
        found.append(reverse_cuthill_mckee(row[mine].numpy(), key[mine].numpy(), size))
        places.append(np.argsort(found[-1]))
    place = torch.from_numpy(np.stack(places).astype(np.int64))
    moved = (batch, place[batch, row], place[batch, key])
    return tiles.of_entries(*moved, len(found), size, size, words), found
