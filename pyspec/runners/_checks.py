"""The checks that all runners make before they change anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pyspec.arguments import described, read_integer, read_prompts
from pyspec.tree import DraftTree


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


def check_taps(taps: Sequence[int], layers: int) -> tuple[int, ...]:
    """Taps of a batch of a model with so many layers, see Runner.prefill; raises ValueError unless they fit it."""
    if not isinstance(taps, Sequence) or isinstance(taps, str):
        raise TypeError(f"taps must be a list of layers, got {described(taps)}")
    taps = tuple(read_integer("taps", tap, "layers") for tap in taps)
    if list(taps) != sorted(set(taps)) or not set(taps) <= set(range(layers + 2)):
        raise ValueError(f"taps must ascend and be in [0, {layers + 1}] for {layers} layers, got {list(taps)}")
    return taps


def check_trees(trees: Mapping[int, DraftTree], slots: int | None, vocab_size: int) -> None:
    """Raises unless a batch was started and trees are by its slots. slots: of the batch, None without one."""
    if slots is None:
        raise RuntimeError("verify needs a batch: call prefill first")
    if not isinstance(trees, Mapping) or not all(isinstance(tree, DraftTree) for tree in trees.values()):
        raise TypeError(f"trees must be a dict with a DraftTree for each slot that takes part, got {described(trees)}")
    for slot, tree in trees.items():
        if slot not in range(slots):
            raise ValueError(f"trees must be for slots of the batch, in [0, {slots}), got slot {slot!r}")
        lowest, highest = tree.token_range
        if lowest < 0 or highest >= vocab_size:
            _check_tokens(f"trees[{slot}].tokens", tree.tokens.tolist(), vocab_size)


def check_paths(paths: Mapping[int, Sequence[int]], trees: Mapping[int, DraftTree] | None) -> None:
    """Raises unless each path goes from the root of its slot's verified tree to one of its nodes."""
    if trees is None:
        raise RuntimeError("commit needs trees: call verify first, once for each commit")
    if not isinstance(paths, Mapping):
        raise TypeError(f"paths must be a dict with a list of nodes for each slot that moves, got {described(paths)}")
    for slot, path in paths.items():
        if not isinstance(path, Sequence) or isinstance(path, str):
            raise TypeError(f"paths[{slot!r}] must be a list of nodes, got {described(path)}")
        if slot not in trees:
            raise ValueError(f"paths must be for slots of the last verify, {list(trees)}, got slot {slot!r}")
        parents = trees[slot].parents.tolist()
        before = -1
        for node in path:
            if not 0 <= node < len(parents) or parents[node] != before:
                raise ValueError(
                    f"paths[{slot}] must go from the root to its children, got {list(path)} for parents {parents}"
                )
            before = node
        if not len(path):
            raise ValueError(f"paths[{slot}] must hold at least the root, got an empty path")


def _check_tokens(name: str, tokens: Sequence[int], vocab_size: int) -> None:
    if min(tokens) < 0 or max(tokens) >= vocab_size:
        wrong = next(token for token in tokens if not 0 <= token < vocab_size)
        raise ValueError(f"{name} must hold token ids in [0, {vocab_size}), got {wrong}")
