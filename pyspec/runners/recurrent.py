"""RecurrentRunner: models with a recurrent state, such as Mamba and Mamba-2, and hybrids of it and attention.

Verifying reads the state without changing it; committing notes the path, which the next verify replays. A prompt is
read as chains that are accepted as a whole, through the same kernels in the same order, so it
may be read in any chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from pyspec.caches.dense import DenseCache, slots_for
from pyspec.caches.hybrid import HybridCache
from pyspec.caches.state import StateCache
from pyspec.runners._checks import check_prompts, check_taps
from pyspec.runners._inference import inference
from pyspec.runners.native import NativeRunner
from pyspec.runners.replay import Rows
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

CONTEXT_LENGTH = 2**31 - 1  # a recurrent state has no end


class RecurrentRunner(NativeRunner):
    """A model with its recurrent state, in fp32; see pyspec.runners.Runner for the calls, and NativeRunner.

    Args:
        config: the model's shape.
        weights: filled weights; what is not laid out yet is laid out here, in its place.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations, fp32, fp16 or bf16: that of the weights, or anything with int8 and int4.
    """

    def __init__(self, config, weights, tokenizer=None, eos_tokens: Sequence[int] = (), dtype=None):
        super().__init__(config, weights, self._context_length_of(config), tokenizer, eos_tokens, dtype)

    def _context_length_of(self, config) -> int:
        return CONTEXT_LENGTH

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
        taps: Sequence[int] = (),
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Prompts are read ragged, some hundred tokens a call.

        Args:
            tokens: B prompts, none empty.
            capacity: slots of a sequence for keys, where the model has attention layers: prompt, new tokens and one
                tree, the context length by default. States need none.
            observe: called with (slot, chain, what is verified of it) for each chunk of a prompt.
            taps: see pyspec.runners.Runner.

        Raises:
            ValueError: a prompt, the capacity or taps do not fit; the batch before it is then untouched.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        self._taps = check_taps(taps, self.config.layers)
        self._cache = self._verified = None  # the old batch makes room for the new one
        capacity = self.context_length if capacity is None else capacity
        return self._prefill(tokens, self._new_cache(len(tokens), capacity), observe)

    def _run_layers(self, trees: dict[int, DraftTree]) -> Rows:
        cache, self._cache = self._cache, None  # an interrupt between two layers would leave some a path ahead
        rows = super()._run_layers(trees)
        self._cache = cache
        return rows

    def _new_cache(self, sequences: int, capacity: int) -> StateCache:
        if self._replays is not None and len(self._replays.cache.lengths) == sequences:
            self._replays.cache.restart()
            return self._replays.cache
        self._replays = None  # makes room
        cache = StateCache.of(self.config, sequences, self.device)
        self._new_replays(cache)
        return cache


class HybridRunner(RecurrentRunner):
    """A model with recurrent states in some layers and keys and values in the others; see RecurrentRunner."""

    def _context_length_of(self, config) -> int:
        return config.context_length

    def _new_cache(self, sequences: int, capacity: int) -> HybridCache:
        replays = self._replays
        if replays is not None and len(replays.cache.lengths) == sequences and replays.cache.slots > capacity:
            replays.cache.restart(capacity)
            return replays.cache
        self._replays = replays = None  # makes room
        config, slots = self.config, slots_for(capacity)
        shape = (config.attention_layers, sequences, config.kv_heads, slots, config.head_dim)
        dense = DenseCache(*shape, self.dtype, self.device, self._ropes(slots))
        cache = HybridCache(StateCache.of(config.recurrence, sequences, self.device), dense)
        cache.dense.restart(capacity)
        self._new_replays(cache)
        return cache
