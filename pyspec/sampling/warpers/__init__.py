"""Warpers: what changes a law before a token is drawn from it. They may read the text so far, one file each.

They are applied in the order of their places, whatever order they are asked for in. It is that of transformers::

    logit_bias, repetition_penalty, frequency_penalty, presence_penalty, banned_tokens, forced_tokens, grammar,
    then the temperature, top_k, top_p, and min_p, typical_p, mirostat

The first line works on logits, greedily too; the second on what the temperature has made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from pyspec.registry import Registry

__all__ = ["WARPERS", "Warped", "Warper", "warpers_from"]

#: What makes a warper of its setting, by name; the names are keywords of generate.
WARPERS: Registry[Callable[[Any], Warper]] = Registry("pyspec.sampling.warpers")


class Warped(NamedTuple):
    """What a warper makes of a law.

    Attributes:
        tokens: [n] integers, ascending: the tokens that are left.
        scores: [n] float64, their logits but for a constant; -inf forbids one.
        after: the state after a token, a function of it; None where the state never changes.
    """

    tokens: np.ndarray
    scores: np.ndarray
    after: Callable[[int], Any] | None = None


class Warper(Protocol):
    """Changes the scores of tokens, by a state that is a function of the text alone.

    A state is never changed in place: the nodes of a draft tree have one each, and most are forgotten.

    Attributes:
        place: by which warpers are applied, ascending; temperature, top-k and top-p have place 0.
    """

    place: int

    def start(self, prompt: Sequence[int], model) -> Any:
        """The state after a prompt, for the tokens of a runner. Raises ValueError where they do not fit."""
        ...

    def warp(self, state: Any, tokens: np.ndarray, scores: np.ndarray) -> Warped:
        """The law after a text of this state; `tokens` and `scores`, see Warped, are not changed in place."""
        ...


def warpers_from(settings: Mapping[str, Any]) -> list[Warper]:
    """The warpers of some settings by name, in their order; None leaves one out.

    Raises:
        TypeError: for a name that no warper has, or a setting of another type.
        ValueError: for a setting out of range.
    """
    for name in settings:
        if name not in WARPERS:
            raise TypeError(f"got an unexpected keyword argument {name!r}; the warpers are {', '.join(WARPERS)}")
    made = [WARPERS[name](setting) for name, setting in settings.items() if setting is not None]
    return sorted(made, key=lambda warper: warper.place)


def kept(tokens: np.ndarray, scores: np.ndarray, places: np.ndarray | Iterable[bool]) -> Warped:
    """Those tokens alone; `places` are indices, ascending, or a mask."""
    return Warped(tokens[places], scores[places])
