"""GearCache for transformers: quantised keys and values behind any model that takes a cache.

    from pyspec.integrations.transformers import GearCache

    model.generate(**inputs, cache=GearCache("gear-4bit"))  # past_key_values before transformers 5.24

Attention "pyspec" (register_attention) reads the records of a step as they lie. Stock attention reads tensors: for it
each layer decodes its blocks at every step, for the time of its attention, and memory is saved, not time. All rows of a
pass see a block in one form, quantised if it is so for the first of them. Drafts across the place where a block turns
(once in 128 tokens), or in the pass that reads the prompt, see it as it was, in full precision; there, and only there,
a text with drafts may differ from one without. Nothing of transformers is changed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import Cache, DynamicLayer

from pyspec import caches
from pyspec.ops.gear import TreeRows, attend_tree, blocks_seen
from pyspec.ops.gear_encode import LARGEST, encode_records, find_unquantisable
from pyspec.ops.gear_format import BLOCK, gear_decode


class GearCache(Cache):
    """Quantised keys and values of all layers, for `cache`, or `past_key_values` before transformers 5.24.

    What is in the cache when a forward pass begins counts as accepted: drafts that were rejected must have been
    cropped by then, as assisted generation does. A block of 128 tokens is quantised when a pass begins `window` or more
    positions behind its end; its record depends on its own keys and values alone.

    Args:
        cache: a pyspec.GearSettings, or the name of one in pyspec.caches.CACHES. It keeps all tokens and channels.

    Raises:
        TypeError, ValueError: it is none.
    """

    def __init__(self, cache: str | caches.GearSettings = "gear-4bit"):
        settings = caches.cache_from_name(cache)
        if not isinstance(settings, caches.GearSettings):
            raise ValueError(f"cache must name or be a pyspec.GearSettings, got {cache!r}")
        if settings.keep < 1:
            raise ValueError(f"keep must be 1 with transformers, whose masks count all tokens, got {settings.keep}")
        if settings.key_channels:
            raise ValueError(f"key_channels must be 0 with transformers: a cache sees no queries, got {settings}")
        super().__init__(layers=[])
        self.settings = settings

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(layer.nbytes for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Adds keys and values [B, Hkv, T, D] of a layer; returns all of them, [B, Hkv, S, D]."""
        while len(self.layers) <= layer_idx:
            self.layers.append(GearLayer(self.settings, len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class GearLayer(DynamicLayer):
    """One layer: `quantised` [B, Hkv, blocks, record] uint8, then `keys` and `values` [B, Hkv, S, D] as they came."""

    def __init__(self, settings: caches.GearSettings, index: int):
        super().__init__()
        self.settings = settings
        self.index = index
        self.quantised: Tensor | None = None

    @property
    def nbytes(self) -> int:
        tensors = (self.quantised, self.keys, self.values) if self.is_initialized else ()
        return sum(tensor.nbytes for tensor in tensors)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, heads, _, head_dim = key_states.shape
        if value_states.shape[-1] != head_dim:
            raise ValueError(
                f"keys and values of layer {self.index} must have one head_dim to be quantised, "
                f"got {head_dim} and {value_states.shape[-1]}"
            )
        self.settings.check_head_dim(head_dim)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        record = self.settings.record_bytes(head_dim)
        self.quantised = torch.empty(batch, heads, 0, record, dtype=torch.uint8, device=self.device)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._quantise()
        self.keys = torch.cat((self.keys, key_states), -2)
        self.values = torch.cat((self.values, value_states), -2)
        if not self.quantised.shape[2]:
            return self.keys, self.values
        held = _Held(self.settings, self.quantised, self.keys, self.values)
        return QuantisedStates(held, 0), QuantisedStates(held, 1)

    def _quantise(self) -> None:
        """Quantises the blocks that are far enough behind the tokens to come."""
        blocks = blocks_seen(self.get_seq_length(), self.settings.window) - self.quantised.shape[2]
        if blocks <= 0:
            return
        parts = [states[:, :, : blocks * BLOCK] for states in (self.keys, self.values)]
        bad = find_unquantisable(*parts)
        if bad is not None:
            name, (sequence, head, token, channel), value = bad
            raise ValueError(
                f"{'keys' if name == 'k' else 'values'} must be at most {LARGEST:.0f} in magnitude to be quantised, "
                f"got {value} in layer {self.index}, head {head}, position {self.quantised.shape[2] * BLOCK + token}, "
                f"channel {channel} of sequence {sequence}"
            )
        self.quantised = torch.cat((self.quantised, encode_records(*parts, self.settings)), 2)
        self.keys, self.values = (states[:, :, blocks * BLOCK :].clone() for states in (self.keys, self.values))

    def get_seq_length(self, *args) -> int:
        return self.quantised.shape[2] * BLOCK + self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def crop(self, length: int) -> None:
        """Removes the last -length tokens, or, with a positive length, all but the first `length`.

        Raises:
            ValueError: quantised tokens would be removed.
        """
        held = self.get_seq_length()
        kept = length if length > 0 else held + length
        if kept >= held or not self.is_initialized:
            return
        quantised = self.quantised.shape[2] * BLOCK
        if kept < quantised:
            raise ValueError(
                f"a cache cannot be cropped to {kept} tokens: {quantised} are quantised in layer {self.index}, "
                f"and none is decoded again; {self.settings.window} behind the last pass are always exact"
            )
        self.keys, self.values = (states[:, :, : kept - quantised] for states in (self.keys, self.values))

    def reset(self) -> None:
        self.keys = self.values = self.quantised = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda states: states.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(lambda states: states[indices.to(states.device)])

    def offload(self) -> None:
        self._select(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._select(lambda states: states.to(self.device, non_blocking=True))

    def _select(self, change) -> None:
        if self.is_initialized:
            self.keys, self.values, self.quantised = map(change, (self.keys, self.values, self.quantised))


@dataclass(frozen=True)
class _Held:
    """The content of a layer during a pass: records, then keys and values as they came."""

    settings: caches.GearSettings
    quantised: Tensor  # [B, Hkv, blocks, record] uint8
    keys: Tensor  # [B, Hkv, S, D]
    values: Tensor

    @functools.cached_property
    def decoded(self) -> tuple[Tensor, ...]:
        """All keys and all values."""
        decoded = gear_decode(self.quantised, self.settings, self.keys.shape[-1])
        return tuple(
            torch.cat((part.to(exact.dtype), exact), -2)
            for part, exact in zip(decoded, (self.keys, self.values), strict=True)
        )


class QuantisedStates(Tensor):
    """Keys or values of a layer, [B, Hkv, S, D], of which the first are quantised: any op decodes them first."""

    @staticmethod
    def __new__(cls, held: _Held, side: int):
        batch, heads, exact, head_dim = held.keys.shape
        shape = (batch, heads, held.quantised.shape[2] * BLOCK + exact, head_dim)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=held.keys.dtype, device=held.keys.device)

    def __init__(self, held: _Held, side: int):
        self.held, self.side = held, side

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def decode(x):
            return x.decode() if isinstance(x, cls) else x

        return func(*tree_map(decode, args), **tree_map(decode, kwargs or {}))

    def decode(self) -> Tensor:
        """An ordinary tensor of the same."""
        return self.held.decoded[self.side]

    def attend(self, q: Tensor, ancestor_bits: Tensor, scale: float) -> Tensor:
        """Causal attention, like q [B, Hq, T, D], of the last T tokens to all, reading records as they lie."""
        held, (batch, _, nodes, _) = self.held, q.shape
        seen = torch.full((batch, nodes), held.quantised.shape[2], dtype=torch.int32, device=q.device)
        exact = torch.full((batch,), held.keys.shape[2] - nodes, dtype=torch.int32, device=q.device)
        rows = TreeRows(ancestor_bits, seen, seen[:, :1], exact, 0)
        return attend_tree(q, held.quantised, held.keys, held.values, rows, held.settings, scale)[0]
