"""Small random Llamas, trees and texts, without anything but torch."""

import random

import torch

from pyspec import DraftTree
from pyspec.architectures.llama import LlamaConfig, LlamaWeights
from pyspec.runners.attention import AttentionRunner

VOCABULARY = 97


def random_llama(
    device="cpu", dtype=torch.float32, *, windows=(None, None), biases=False, context=3000, **options
) -> AttentionRunner:
    """A runner of a layer for each window, 4 query heads on 2 key heads; the same weights on every device."""
    config = LlamaConfig(
        architecture="llama",
        vocab_size=VOCABULARY,
        hidden_size=96,
        intermediate_size=160,
        layers=len(windows),
        heads=4,
        kv_heads=2,
        head_dim=64,
        context_length=context,
        norm_epsilon=1e-5,
        rope_base=10000.0,
        windows=windows,
        qkv_bias=biases,
        output_bias=biases,
        tied_embedding=biases,
    )
    dense = torch.float32 if dtype in (torch.int8, "int4") else dtype
    weights = LlamaWeights.empty(config, dense, torch.device(device))
    generator = torch.Generator().manual_seed(0)
    for tensor in weights.named(config).values():
        mean = 1.0 if tensor.dim() == 1 else 0.0
        tensor.copy_(torch.normal(mean, 0.2, tensor.shape, generator=generator))
    weights.lay_out(dtype)
    return AttentionRunner(config, weights, **options)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(VOCABULARY) for _ in range(count)]


def random_tree(size: int, seed: int = 0) -> DraftTree:
    generator = random.Random(seed)
    parents = [-1] + [generator.randrange(max(0, node - 4), node) for node in range(1, size)]
    return DraftTree(random_tokens(size, seed + 1), parents)


def root_path(tree: DraftTree, node: int) -> list[int]:
    """Nodes from the root to a node, both included."""
    path, parents = [], tree.parents.tolist()
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


def by_slot(values):
    """A dict of the values that are not None, by their places in a list."""
    return {slot: value for slot, value in enumerate(values) if value is not None}


def verify_all(runner, trees):
    """[T, V] logits of each tree of a list; None for None."""
    verified = runner.verify(by_slot(trees))
    return [None if tree is None else verified[slot].logits for slot, tree in enumerate(trees)]
