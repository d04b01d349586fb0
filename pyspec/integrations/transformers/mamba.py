"""Mamba-1 of transformers that may read several tokens after a cache."""

from __future__ import annotations

import inspect
import types

import torch
from transformers.cache_utils import Cache


def fix_mamba_steps(model):
    """Makes one MambaForCausalLM or MambaModel read several tokens after a cache as it reads them one by one.

    As it comes, it forgets its recurrent state when it is given more than one token, and its logits are those of
    another text. Only this instance is changed; calling it twice does no harm. Returns the model.

    Raises:
        TypeError: the model has no Mamba-1 layers.
    """
    from transformers.models.mamba.modeling_mamba import MambaMixer

    mixers = [module for module in model.modules() if isinstance(module, MambaMixer)]
    if not mixers:
        raise TypeError(f"model must have Mamba-1 layers of transformers, got a {type(model).__name__}")
    for mixer in mixers:
        if "forward" not in vars(mixer):
            mixer.forward = types.MethodType(_forward, mixer)
    return model


def _forward(self, hidden_states: torch.Tensor, *args, **inputs) -> torch.Tensor:
    forward, tokens = type(self).forward, hidden_states.shape[1]
    inputs |= zip(list(inspect.signature(forward).parameters)[2:], args, strict=False)
    cache = next((value for value in inputs.values() if isinstance(value, Cache)), None)  # its name has changed once
    if cache is None or not cache.has_previous_state(self.layer_idx) or tokens == 1:
        return forward(self, hidden_states, **inputs)
    mask = inputs.pop("attention_mask", None)
    if mask is not None:  # as the mixer does with padding, but of one token it does not
        hidden_states = (hidden_states * mask[:, -tokens:, None]).to(hidden_states.dtype)
    steps = (forward(self, token, **inputs) for token in hidden_states.split(1, dim=1))
    return torch.cat(list(steps), dim=1)
