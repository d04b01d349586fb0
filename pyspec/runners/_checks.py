"""The checks that all runners make before they change anything."""

from __future__ import annotations

from collections.abc import Sequence

from pyspec.arguments import described, read_integer, read_prompts
from pyspec.tree import DraftTree

__all__ = ["check_paths", "check_prompts", "check_trees"]


def check_prompts(tokens, vocab_size: int, context_length: int, capacity: int | None) -> list[list[int]]:
    """The prompts of a batch, read as read_prompts does, none longer than the context.

    capacity: slots of a sequence, which must hold the longest; None is enough for any.

    Raises:
        TypeError, ValueError: tokens are no batch of prompts, or do not fit.
    """
    is_batch, prompts = read_prompts(tokens, context_length)
    if not is_batch and prompts != [[]]:
        raise TypeError(f"tokens must be a list of prompts, each a list of token ids, got {described(tokens)}")
    if not is_batch:
        raise ValueError("tokens must hold at least one prompt, got none")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"tokens[{index}] is empty: a prompt needs at least one token")
        if len(prompt) > context_length:
            raise ValueError(f"tokens[{index}] has {len(prompt)} tokens, the model's context is {context_length}")
        _check_tokens(f"tokens[{index}]", prompt, vocab_size)
    longest = max(map(len, prompts))
    if capacity is not None and read_integer("capacity", capacity, "an integer or None") < longest:
        raise ValueError(f"capacity must be at least the longest prompt, {longest} tokens, got {capacity}")
    return prompts


def check_trees(trees: Sequence[DraftTree | None], sequences: int | None, vocab_size: int) -> None:
    """Raises unless a batch was started and there is one tree, or None, for each of its sequences."""
    if sequences is None:
        raise RuntimeError("verify needs a batch: call prefill first")
    if not isinstance(trees, (list, tuple)) or not all(tree is None or isinstance(tree, DraftTree) for tree in trees):
        raise TypeError(f"trees must be a list with a DraftTree or None for each sequence, got {described(trees)}")
    if len(trees) != sequences:
        raise ValueError(f"trees must have one entry for each of the {sequences} sequences, got {len(trees)}")
    for index, tree in enumerate(trees):
        if tree is not None:
            _check_tokens(f"trees[{index}].tokens", tree.tokens.tolist(), vocab_size)


def check_paths(paths: Sequence[Sequence[int] | None], trees: Sequence[DraftTree | None] | None) -> None:
    """Raises unless each path goes from the root of its verified tree to one of its nodes."""
    if trees is None:
        raise RuntimeError("commit needs trees: call verify first, once for each commit")
    if len(paths) != len(trees):
        raise ValueError(f"paths must have one entry for each of the {len(trees)} sequences, got {len(paths)}")
    for index, (path, tree) in enumerate(zip(paths, trees, strict=True)):
        if path is None:
            continue
        if not isinstance(path, Sequence) or isinstance(path, str):
            raise TypeError(f"paths[{index}] must be a list of nodes or None, got {described(path)}")
        if tree is None:
            raise ValueError(f"paths[{index}] must be None, its sequence sat out the last verify, got {list(path)}")
        parents = tree.parents.tolist()
        before = -1
        for node in path:
            if not 0 <= node < len(parents) or parents[node] != before:
                raise ValueError(
                    f"paths[{index}] must go from the root to its children, got {list(path)} for parents {parents}"
                )
            before = node
        if not len(path):
            raise ValueError(f"paths[{index}] must hold at least the root, got an empty path")


def _check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise ValueError(f"{name} must hold token ids in [0, {vocab_size}), got {wrong}")
