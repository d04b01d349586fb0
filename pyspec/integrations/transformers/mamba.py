"""Mamba-1 of transformers that may read several tokens after a cache."""

from __future__ import annotations

import types

import torch

__all__ = ["fix_mamba_steps"]


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


def _forward(self, hidden_states: torch.Tensor, cache_params=None, attention_mask=None, **kwargs) -> torch.Tensor:
    forward, tokens = type(self).forward, hidden_states.shape[1]
    after_text = cache_params is not None and cache_params.get_recurrent_state(self.layer_idx, state_idx=0) is not None
    if not after_text or tokens == 1:
        return forward(self, hidden_states, cache_params, attention_mask, **kwargs)
    if attention_mask is not None:  # as the mixer does with padding, but of one token it does not
        hidden_states = (hidden_states * attention_mask[:, -tokens:, None]).to(hidden_states.dtype)
    steps = (forward(self, token, cache_params, None, **kwargs) for token in hidden_states.split(1, dim=1))
    return torch.cat(list(steps), dim=1)
