"""Cases of attention to trees: random queries, keys and trees behind prefixes."""

from dataclasses import dataclass

import torch

import pyspec


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    bits: torch.Tensor
    lens: torch.Tensor
    parents: list[list[int]]


def random_parents(nodes: int, generator: torch.Generator) -> list[int]:
    return [-1, *(int(torch.randint(0, node, (1,), generator=generator)) for node in range(1, nodes))]


def make_case(lens, nodes, heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0) -> Case:
    """Random trees of the given sizes (padded to the largest) over prefixes of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    batch, widest = len(lens), max(nodes)
    slots = max(n + t for n, t in zip(lens, nodes, strict=True))
    parents = [random_parents(t, generator) for t in nodes]
    bits = torch.zeros(batch, widest, (widest + 31) // 32, dtype=torch.int32)
    for b in range(batch):
        tree = pyspec.DraftTree([0] * nodes[b], parents[b])
        own = torch.from_numpy(tree.ancestor_bits)
        bits[b, : nodes[b], : own.shape[1]] = own
    q = torch.randn(batch, heads, widest, head_dim, generator=generator).to(dtype)
    k = torch.randn(batch, kv_heads, slots, head_dim, generator=generator).to(dtype)
    v = torch.randn(batch, kv_heads, slots, head_dim, generator=generator).to(dtype)
    return Case(q, k, v, bits, torch.tensor(lens, dtype=torch.int32), parents)


def path_to(parents: list[int], node: int) -> list[int]:
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]
