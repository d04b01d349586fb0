"""Attention of transformers' models through block masks and tree attention: attn_implementation="pyspec"."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from pyspec.integrations.transformers.cache import QuantisedStates
from pyspec.masks import BlockMask
from pyspec.ops import block_masked_attention, tree_attention

NAME = "pyspec"
_MOST_TREE_ROWS = 16  # queries that are read as a chain of a tree: it shares the keys among them, but reads no mask
_NO_GRADIENT = (
    f'attention "{NAME}" has no gradient: call the model under torch.no_grad(), or train it with another, such as '
    'model.set_attn_implementation("sdpa")'
)
_latest: tuple[weakref.ref, int, BlockMask] | None = None


def register_attention() -> None:
    """Makes "pyspec" a name that model.set_attn_implementation takes; no other name of transformers is touched.

    Causal attention after a cache of few new tokens is tree_attention, or gear_attention after a GearCache, whose
    records it reads as they lie; everything else is block_masked_attention:
    documents one after another, sliding windows, padding, and 4D masks of the caller's.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs,
) -> BlockMask | Tensor | None:
    """The mask of a forward: None for plain causal attention, else a block mask, made once for all layers.

    transformers describes masks as functions of positions; they are asked about blocks of rows at a time.
    """
    from transformers.masking_utils import (
        add_offsets_to_mask_function,
        and_masks,
        causal_mask_function,
        padding_mask_function,
        prepare_padding_mask,
    )

    if attention_mask is not None and not attention_mask.all():
        padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    elif mask_function is causal_mask_function and int(q_offset) + q_length == kv_length + kv_offset:
        return None
    sees = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    # the batch index of a mask that is the same for all is broadcast
    return BlockMask.from_predicate(sees, q_length, kv_length, batch=batch_size, device=device)


def _attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention [B, T, H, D] of query [B, H, T, D] to key and value [B, Hkv, S, D].

    A model in eval mode may be called outside of torch.no_grad(): the backward pass then raises.

    Raises:
        ValueError: dropout, a mask with values between 0 and -inf (a bias), or attention sinks.
        RuntimeError: queries, keys or values of a model in train mode require a gradient.
    """
    if torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value)):
        if module.training:
            raise RuntimeError(_NO_GRADIENT)
        with torch.no_grad():
            out, _ = _attention(
                module, query, key, value, attention_mask, scaling, dropout, is_causal, softcap, **kwargs
            )
        return _Inference.apply(out, query, key, value), None
    if dropout:
        raise ValueError(f'dropout must be 0: attention "{NAME}" is for inference, got {dropout}')
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ValueError(f'attention "{NAME}" has no sinks and no position bias')
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options = {"scale": scaling, "softcap": softcap}
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None and (is_causal or rows == 1) and rows <= _MOST_TREE_ROWS:
        bits = torch.tensor([(2 << row) - 1 for row in range(rows)], dtype=torch.int32, device=query.device)
        bits = bits[None, :, None].expand(len(query), rows, 1)
        if isinstance(key, QuantisedStates) and softcap is None:
            out = key.attend(query, bits, query.shape[3] ** -0.5 if scaling is None else scaling)
            return out.transpose(1, 2).contiguous(), None
        before = torch.full((len(query),), keys - rows, dtype=torch.int32, device=query.device)
        out = tree_attention(query, key, value, bits, before, **options)
    else:
        if attention_mask is None:
            mask = _rectangle(rows, keys, is_causal, query.device)
        else:
            mask = attention_mask if isinstance(attention_mask, BlockMask) else _block_mask(attention_mask)
        out = block_masked_attention(query, key, value, mask, **options)
    return out.transpose(1, 2).contiguous(), None


class _Inference(torch.autograd.Function):
    """Marks what was computed without a gradient: asking for one is an error, not a silent zero."""

    @staticmethod
    def forward(ctx, out: Tensor, *sources: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        raise RuntimeError(_NO_GRADIENT)


def _rectangle(rows: int, keys: int, causal: bool, device) -> BlockMask:
    return BlockMask.from_window(rows, keys, causal=causal, device=device)


def _block_mask(mask: Tensor) -> BlockMask:
    """The block mask of a 4D mask that the caller made: bool, or 0 where a key is seen and very negative where not.

    All layers of a forward are given the same tensor, so the last one is kept.
    """
    global _latest
    if _latest is not None and _latest[0]() is mask and _latest[1] == mask._version:
        return _latest[2]
    visible = mask
    if mask.dtype != torch.bool:
        visible = mask == 0
        if not (visible | (mask <= torch.finfo(mask.dtype).min / 2)).all():
            raise ValueError(f'attention_mask must be 0 or minus infinity: attention "{NAME}" adds no bias')
    built = BlockMask.from_dense(visible)
    if not mask.is_inference():
        _latest = weakref.ref(mask), mask._version, built
    return built
