"""Which models of transformers TransformersRunner can read: what is asked of their code before any text is read."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable

from pyspec.architectures import Unsupported, supported_architectures
from pyspec.integrations import require
from pyspec.runners.foreign_masks import Sight, sights_of


def supported() -> str:
    """The models that pyspec takes, for the end of an error."""
    return (
        f"supported are {', '.join(supported_architectures())} (pyspec.load, pyspec.from_transformers), and through "
        "transformers the causal models with explicit positions whose layers are all attention (full, windows or "
        "chunks), such as GPT2LMHeadModel, GPTNeoXForCausalLM, OPTForCausalLM, PhiForCausalLM and MixtralForCausalLM; "
        "others run by transformers' own generate"
    )


def refuse(model_class: type, reason: str):
    """Raises the ValueError that names a model, the reason, and what is supported."""
    raise ValueError(f"{model_class.__name__} is not supported: {reason}; {supported()}")


def fall_back(make: Callable, reason: Unsupported):
    """What make gives, the TransformersRunner of a model that our kernels do not run for this reason.

    Warns once for each reason, and says what it costs.

    Raises:
        ValueError: it does not run through transformers either; the message has both reasons.
    """
    try:
        runner = make()
    except ValueError as error:
        raise ValueError(f"{reason}; {error}") from error
    bytes = sum(parameter.nbytes for parameter in runner.model.parameters())
    _say_foreign(str(reason), f"{bytes / 1e9:.2g} GB in {str(runner.dtype).removeprefix('torch.')}")
    return runner


@functools.cache
def _say_foreign(reason: str, weights: str) -> None:
    warnings.warn(
        f"{reason}: it runs through transformers instead, with weights of {weights}. On a CPU that takes several times "
        "as long, and texts follow the same law, but at near ties may differ from those of plain decoding.",
        RuntimeWarning,
        stacklevel=5,  # who called load or from_transformers, both of which as_stored wraps
    )


def context_of(config) -> int:
    """Positions that a model was made for."""
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) or 2048


def cache_argument(model_class: type) -> str | None:
    """The name of a model's cache argument, which depends on the version of transformers; None if it takes none."""
    parameters = inspect.signature(model_class.forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in parameters), None)


def check_supported(model_class: type, config) -> dict[str, Sight]:
    """What each kind of a model's layers sees of the text.

    Raises:
        ImportError: transformers is of a version that this is not made for.
        ValueError: its state cannot be cropped, or it does not take masks and positions.
    """
    require("transformers", "5.20", "6")
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
    sights = sights_of(config, context_of(config))
    return refuse(model_class, sights) if isinstance(sights, str) else sights
