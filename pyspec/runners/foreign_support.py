"""Which models of transformers TransformersRunner can read: what is asked of their code before any text is read."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from pyspec.integrations import require

__all__ = ["SUPPORTED", "cache_argument", "check_supported", "context_of", "find_switches", "refuse"]

SUPPORTED = (
    "supported are LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, MambaForCausalLM, Mamba2ForCausalLM and "
    "BambaForCausalLM (pyspec.load, pyspec.from_transformers), and through transformers the causal models with "
    "explicit positions that keep the keys and values of all tokens, such as GPT2LMHeadModel, GPTNeoXForCausalLM, "
    "OPTForCausalLM, PhiForCausalLM and Qwen3ForCausalLM"
)


def refuse(model_class: type, reason: str):
    """Raises the ValueError that names a model, the reason, and what is supported."""
    raise ValueError(f"{model_class.__name__} is not supported: {reason}; {SUPPORTED}")


def context_of(config) -> int:
    """Positions that a model was made for."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048


def cache_argument(model_class: type) -> str | None:
    """What a model's forward calls its cache, which depends on the version of transformers; None if it takes none."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)


def check_supported(model_class: type, config) -> None:
    """Raises ValueError for models whose state cannot be cropped, or that do not take masks and positions.

    Raises:
        ImportError: transformers is of a version that this is not made for.
    """
    require("transformers", "5.20", "6")
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if getattr(config, "is_encoder_decoder", False):
        refuse(model_class, "it has an encoder")
    stated = set(getattr(config.get_text_config(decoder=True), "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) and stated != {"full_attention"}:
        refuse(model_class, "it keeps a recurrent state, which cannot be cropped after a rejection")
    taken = inspect.signature(model_class.forward).parameters
    if "position_ids" not in taken or getattr(config, "alibi", False):
        refuse(model_class, "its positions cannot be given, they follow from the order of the tokens")
    if cache_argument(model_class) is None or "attention_mask" not in taken:
        refuse(model_class, "its forward takes no cache of keys and values, or no mask")
    context = context_of(config)
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            if layer.sliding_window < context:  # a window as long as the context never slides
                window = f"a window of {layer.sliding_window} in a context of {context}"
                refuse(model_class, f"it has layers that do not keep the keys of all tokens ({window})")
        elif type(layer) is not DynamicLayer:
            refuse(model_class, "it has layers that do not keep the keys of all tokens (linear attention or an index)")
    if "local" in getattr(config, "attention_layers", ()):
        refuse(model_class, "it has layers that do not keep the keys of all tokens (local attention)")


# ==== arithmetic that depends on the longest position of a call ====


def find_switches(model, read: Callable[[], object], tokens: int, context: int) -> set[int | None]:
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
