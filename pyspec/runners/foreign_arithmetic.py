"""What a node's logits depend on beside the tokens before it, found by what a model does before any text is read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyspec.runners.foreign_masks import narrowed
from pyspec.runners.foreign_support import cache_argument, refuse
from pyspec.tree import DraftTree


class Arithmetic(NamedTuple):
    """How a model rotates its keys; see TransformersRunner.

    Attributes:
        switch: the position behind which all tokens of a call are rotated by other frequencies; None if there is none.
        reads_again: whether transformers reads the text again when it crosses the switch.
        counts_slots: whether a position is the length of the cache and a place in the call, to some layers.
    """

    switch: int | None
    reads_again: bool
    counts_slots: bool = False


def arithmetic_of(runner) -> Arithmetic:
    """The arithmetic of a new TransformersRunner's model; the runner's batch is lost.

    Raises:
        ValueError: a node's logits depend on more of its call than the tokens before it.
    """
    try:
        found = _find(runner)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        found = f"its forward fails with positions, a mask and a cache of ours ({type(error).__name__}: {error})"
    return found if isinstance(found, Arithmetic) else refuse(type(runner.model), found)


@torch.inference_mode()
def _find(runner) -> Arithmetic | str:
    """The arithmetic of a runner's model, or why the model cannot be read."""
    first, second, third, other = (token % runner.vocab_size for token in (11, 22, 33, 44))
    texts = torch.tensor([[first, token, second, third] for token in (second, other)], device=runner.device)
    places, plain = torch.arange(4, device=runner.device)[None], []

    def read(text: Tensor) -> None:
        logits = runner.model(input_ids=text[None], position_ids=places, use_cache=False).logits
        plain.append(logits[0].float())

    switches = _find_switches(runner.model, functools.partial(read, texts[0]), 4, runner.context_length)
    if len(switches) > 1 or None in switches:
        return "its rotary frequencies are others for each length of the longest text of a call"
    read(texts[1])
    # what another token in the text changes is the measure of what one that is not in it may change
    most = 0.05 if runner.dtype in (torch.float32, torch.float64) else 0.25
    allowed = most * (plain[1] - plain[0])[-1].abs().mean()
    hangs = "its logits depend on what else is in a call"
    if not _sees_so_far(runner, texts[0], allowed):
        return "its windows or chunks are not those that its configuration states"
    before = runner.prefill([[first], [other, first, other]], capacity=19)[:1]
    # the path root - 2 - 3 is the same text; node 1 is beside it, and a crowd in the other sequence
    tree, crowd = DraftTree([second, other, second, third], [-1, 0, 0, 2]), DraftTree([other] * 16, [-1] + [0] * 15)
    trees = {0: tree, 1: crowd}
    path = runner.verify(trees)[0].logits[[0, 2, 3]]
    if not (torch.cat([torch.stack(before), path]) - plain[0]).abs().mean(-1).max() <= allowed:
        return f"it does not attend as its attention mask and position_ids tell, or {hangs}"
    if not switches:
        far = runner._forward(range(2), [tree, crowd], beyond=max(0, runner.context_length - 8))[0]
        if not (far.logits[[0, 2, 3]] - path).abs().mean(-1).max() <= allowed:
            return f"{hangs}, or how far it goes"
    runner._slots.ahead = runner.context_length // 2
    again = runner.verify(trees)[0].logits[[0, 2, 3]]
    counts_slots = not (again - path).abs().max() <= 0.01 * path.abs().max()
    if counts_slots and not _reads_by_slots(runner, trees, plain[0][1:], allowed):
        return "its positions cannot be given, they follow from the length of its cache"
    runner._slots.ahead = 0
    switch = next(iter(switches), None)
    return Arithmetic(switch, switch is not None and _drops_its_cache(runner, switch), counts_slots)


def _reads_by_slots(runner, trees: dict[int, DraftTree], path: Tensor, allowed: Tensor) -> bool:
    """Whether the path root - 2 - 3 of the first tree is read where the cache has a length for each place of a call."""
    runner._counts_slots = True
    try:
        found = runner.verify(trees)[0].logits[[0, 2, 3]]
    except (ValueError, TypeError, RuntimeError, IndexError):  # whatever becomes of a length that is a tensor
        return False
    return bool((found - path).abs().mean(-1).max() <= allowed)


def _sees_so_far(runner, text: Tensor, allowed: Tensor) -> bool:
    """Whether layers with a window or chunks see what their sights say; both are short while a text is read for that.

    The runner's batch is lost.
    """
    if not any(sight.setting for sight in runner._sights.values()):
        return True
    sights = runner._sights
    try:
        with narrowed(runner.model.config, sights, 2) as runner._sights:
            expected = runner.model(input_ids=text[None], use_cache=False).logits[0, -1].float()
            found = runner.prefill([text.tolist()], capacity=len(text))[0]
    finally:
        runner._sights = sights
    return bool((found - expected).abs().mean() <= allowed)


def _drops_its_cache(runner, switch: int) -> bool:
    """Whether transformers' generate reads a text again when its length crosses the switch, as that of Phi-3."""
    text = torch.zeros(1, switch + 1, dtype=torch.int64, device=runner.device)
    name = cache_argument(type(runner.model))
    inputs = runner.model.prepare_inputs_for_generation(text, use_cache=True, **{name: runner._slots.cache})
    return inputs.get(name) is None


def _find_switches(model, read: Callable[[], object], tokens: int, context: int) -> set[int | None]:
    """Positions that change the angles of those before them when they are in the same call.

    Empty for most models, one for longrope; None stands for one that is followed by others (dynamic NTK).

    Args:
        read: runs the model on a text of `tokens` tokens, from position 0.
        context: positions to look at.
    """
    switches = set()
    for call in _position_calls(model, read, tokens):

        def angles(longest: int, call=call) -> Tensor:
            positions = torch.ones(tokens, dtype=torch.int64, device="cpu")
            positions[-1] = longest
            return call(positions)

        short, long = angles(1), angles(context - 1)
        if torch.equal(short, long):
            continue
        below, switch = 1, context - 1  # the angles with the former are short, with the latter they are not
        while switch - below > 1:
            middle = (below + switch) // 2
            below, switch = (middle, switch) if torch.equal(angles(middle), short) else (below, middle)
        switches.add(switch if torch.equal(angles(switch), long) else None)
    return switches


def _position_calls(model, read: Callable[[], object], tokens: int) -> list[Callable[[Tensor], Tensor]]:
    """The parts of a model that turn positions into angles, as functions of positions [tokens].

    They are those without weights that are given the positions of a text; each is called again as it was then.
    """
    calls = []

    def is_positions(value) -> bool:
        is_long = isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape[-1:] == (tokens,)
        return is_long and bool((value == torch.arange(tokens, device=value.device)).all())

    def record(module, args, kwargs):
        def call(positions: Tensor) -> Tensor:
            def replaced(value):
                return positions.to(value.device).expand_as(value) if is_positions(value) else value

            found = module.forward(*map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()})
            parts = found if isinstance(found, tuple | list) else (found,)
            return torch.cat([part[..., 0, :].flatten() for part in parts])  # of the first position

        if any(map(is_positions, (*args, *kwargs.values()))):
            calls.append(call)

    without_weights = [module for module in model.modules() if next(module.parameters(), None) is None]
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in without_weights]
    try:
        read()
    finally:
        for handle in handles:
            handle.remove()
    return calls
