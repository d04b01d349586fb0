"""Which keys the layers of a transformers model may see, and the masks that say so for a call of trees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# the layers of transformers' caches that keep no keys of ours, by what configurations call them
_STATES = {
    "conv": "its layers of convolution keep a state, which cannot be cropped after a rejection",
    "indexed_attention": "its layers choose the keys that they see by an index of their own",
    "heavily_compressed_attention": "its layers keep keys that are compressed, which cannot be cropped",
    "compressed_sparse_attention": "its layers keep keys that are compressed, which cannot be cropped",
    "minimax_m3_sparse": "its layers choose the keys that they see by an index of their own",
}
_RECURRENT = "its layers keep a recurrent state, which cannot be cropped after a rejection"


class Sight(NamedTuple):
    """What a layer sees of the tokens before a token at position p: all, a window or a chunk.

    Attributes:
        setting: the name in the configuration of what limits it, sliding_window or attention_chunk_size; None for all.
        tokens: those at positions above p - tokens are seen, or those of the same p // tokens.
    """

    setting: str | None = None
    tokens: int = 0

    def limit(self, visible: Tensor, positions: Tensor, of_keys: Tensor) -> Tensor:
        """visible [B, 1, T, S] without the keys at positions of_keys [B, S] that those at positions [B, T] miss."""
        here, there = positions[:, None, :, None], of_keys[:, None, None]
        if self.setting == "sliding_window":
            return visible & (there > here - self.tokens)
        if self.setting == "attention_chunk_size":
            return visible & (there // self.tokens == here // self.tokens)
        return visible


def sights_of(config, context: int) -> dict[str, Sight] | str:
    """What each kind of a model's layers sees, by the configuration's name for the kind; or why that is not known.

    Args:
        config: the model's configuration; kinds are its `layer_types`, or one kind where it states none.
        context: positions of the model; a window that is as long never slides.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    text = config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except KeyError as error:
        return _STATES.get(error.args[0], f"its layers of {error.args[0]} keep a state that we do not know")
    kinds = getattr(text, "layer_types", None) or ["all"] * len(layers)
    sights: dict[str, Sight] = {}
    for kind, layer in zip(kinds, layers, strict=False):  # some versions leave layers out that share keys
        if type(layer) is DynamicSlidingWindowLayer:
            slides = kind == "sliding_attention" or kind == "all" and text.sliding_window is not None
            sight = Sight("sliding_window" if slides else "attention_chunk_size", layer.sliding_window)
            sight = Sight() if layer.sliding_window >= context else sight
        elif type(layer) is DynamicLayer:
            sight = Sight()
        elif type(layer).__name__ == "DummyLayer":  # without keys of its own
            continue
        else:
            return _STATES.get(kind, _RECURRENT)
        if sights.setdefault(kind, sight) != sight:
            return f"its layers of {kind} have windows of several lengths"
    if "local" in getattr(config, "attention_layers", ()):
        return "its local layers count slots of the cache where a mask counts positions"
    return sights


def masks_of(
    sights: Mapping[str, Sight],
    visible: Tensor,
    positions: Tensor,
    of_keys: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | dict[str, Tensor]:
    """The mask [B, 1, T, S] that a model takes: 0 where a token sees a key, the lowest number elsewhere.

    Models whose layers see different things take one for each kind of layer.

    Args:
        visible: [B, 1, T, S] bool, the tokens before each token.
        positions: [B, T] of the tokens.
        of_keys: [B, S] of the keys.
    """

    def mask_of(sight: Sight) -> Tensor:
        hidden = ~sight.limit(visible, positions, of_keys)
        mask = torch.zeros(visible.shape, dtype=dtype, device="cpu").masked_fill_(hidden, torch.finfo(dtype).min)
        return mask.to(device)

    masks = {sight: mask_of(sight) for sight in set(sights.values())}
    if len(masks) == 1:
        return next(iter(masks.values()))
    return {kind: masks[sight] for kind, sight in sights.items()}


@contextlib.contextmanager
def narrowed(config, sights: Mapping[str, Sight], tokens: int) -> Iterator[dict[str, Sight]]:
    """While it is entered, the windows and chunks of a model are of so many tokens; gives what its layers see then."""
    text = config.get_text_config(decoder=True)
    stated = {sight.setting: sight.tokens for sight in sights.values() if sight.setting is not None}
    try:
        for setting in stated:
            setattr(text, setting, tokens)
        yield {kind: sight._replace(tokens=tokens) if sight.setting else sight for kind, sight in sights.items()}
    finally:
        for setting, before in stated.items():
            setattr(text, setting, before)
