"""AttentionRunner: models whose layers are all attention, such as Llama, Qwen3 and Gemma 3, over a KV cache.

The nodes of all trees of a batch run ragged through the layers, [sum of T_b, hidden]. A prompt is read as a chain of
draft tokens that are all accepted, so prefill is verify and commit, and gives the same bits in any chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.caches.blocks import QuantisedCache, QuantisedSettings
from pyspec.caches.dense import DenseCache, MixedCache, slots_for
from pyspec.caches.mixed_quantised import WIDEST, MixedQuantisedCache
from pyspec.caches.saved import load_quantised, save_quantised
from pyspec.runners import flash_attn, native
from pyspec.runners._checks import check_prompts, check_taps, check_trees
from pyspec.runners._inference import inference
from pyspec.runners.native import NativeRunner
from pyspec.runners.numbers import Numbers
from pyspec.runners.replay import BUCKETS, GRAPH_CHUNK, Rows
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.architectures.llama import LlamaConfig, LlamaWeights

FLASH_CHUNK = 2048  # by flash-attn: always the same, because bits hang on it


class AttentionRunner(NativeRunner):
    """A Llama-shaped model with its KV cache; see pyspec.runners.Runner for the calls.

    Every row of logits has the same bits whatever is computed beside it: the tree, the batch, the chunks that a
    prompt was read in.

    Args:
        config: the model's shape.
        weights: filled weights; what is not laid out yet is laid out here, in its place.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations and cache, fp32, fp16 or bf16: that of the weights, or anything with int8 and int4.
        prompt_attention: see pyspec.load. With "flash-attn" prompts do not have the bits of decoding them, but still
            the same ones beside any others.

    Raises:
        ValueError: prompt_attention cannot run here.
    """

    takes_quantised_cache = True
    takes_flash_attn = True

    def __init__(
        self,
        config: LlamaConfig,
        weights: LlamaWeights,
        tokenizer=None,
        eos_tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        prompt_attention: str = "pyspec",
    ):
        super().__init__(config, weights, config.context_length, tokenizer, eos_tokens, dtype)
        flash_attn.check_prompt_attention(prompt_attention, self.dtype, self.device)
        self._in_chunks = config.is_chunked and any(config.windows)
        features = {
            "heads have sinks": config.has_sinks,
            "layers attend in chunks": self._in_chunks,
        }
        features |= {"layers' heads differ": config.layer_heads is not None}
        for feature, is_there in (features | {"heads are wider than 256": config.head_dim > 256}).items():
            if prompt_attention != "pyspec" and is_there:
                raise ValueError(f"prompt_attention must be pyspec where {feature}, got {prompt_attention}")
        self.prompt_attention = prompt_attention
        self._frequencies = config.rope_frequencies()
        self._switch = config.rope_switch if (config.rope_switch or 0) < config.context_length else None
        self._texts: list[list[int]] = []  # what is committed, where there is a switch

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
        taps: Sequence[int] = (),
        cache: QuantisedSettings | None = None,
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Prompts are read ragged, some hundred tokens a call, and what two of them begin with is read once: every
        prompt has the bits that it has alone. flash-attn reads each by itself and whole, to the same end.

        Args:
            tokens: B prompts, none empty nor longer than the context.
            capacity: cache slots of a sequence: prompt, new tokens and one tree; the context length by default.
            observe: called with (slot, chain, what is verified of it) for each chunk of a prompt.
            taps: see pyspec.runners.Runner.
            cache: how keys and values are quantised; None keeps them as they are.

        Raises:
            ValueError: a prompt, the capacity, taps or the cache do not fit; the batch before it is then untouched. Or
                keys or values cannot be quantised: NaN, infinite or too large.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        capacity = self.context_length if capacity is None else capacity
        taps = check_taps(taps, self.config.layers)
        self._check_cache(cache)
        self._cache = self._verified = None  # the old batch makes room for the new one
        self._taps, at_once = taps, 1 if self._records_graphs else None
        empty = self._empty_cache(len(tokens), capacity, cache)
        if cache is not None:
            chunk = min(native.CHUNK, cache.largest_tree)
            if self._records_graphs:
                chunk = 1 << (chunk.bit_length() - 1)  # nothing of a piece is padding
            return self._prefill(tokens, empty, observe, chunk=chunk, at_once=at_once)
        self._texts = tokens
        for slot, prompt in enumerate(tokens):
            self._turn(empty, slot, self._switch is not None and len(prompt) > self._switch)
        share = len(set(empty.angles)) == 1  # or keys of one prompt are none of the other
        if self.prompt_attention == "flash-attn":  # which has other bits in other chunks
            return self._prefill(tokens, empty, observe, chunk=FLASH_CHUNK, at_once=1)
        return self._prefill(tokens, empty, observe, at_once=at_once, share=share)

    def room(self, slot: int) -> int:
        """Nodes of the largest tree that fits behind a slot's sequence."""
        length = self._cache.lengths[slot]
        if self._switch is not None and length < self._switch:  # a tree does not reach behind the switch
            return min(self._cache.capacity, self._switch) - length
        return self._cache.capacity - length

    @property
    def keeps_tree_keys(self) -> bool:
        """Whether the nodes of a tree may be verified a few at a time: over a dense cache on a CPU."""
        return isinstance(self._cache, DenseCache) and self.device.type == "cpu"

    @inference
    def draft(self, slot: int, tree: DraftTree, layers: Sequence[int]) -> Tensor:
        """[T, V] fp32 logits of a tree's nodes by some of the layers, over the keys that all layers committed.

        A cheap guess at what verify says, with the same weights and keys. The committed state is read, not changed.

        Args:
            layers: of the model, ascending; at least one. Of them, those that read the keys of one that is not among
                them are left out too.

        Raises:
            RuntimeError: before any prefill.
            ValueError: the tree does not fit, as in verify, the model has no such layers, or the cache is not dense.
        """
        cache = self._cache
        check_trees({slot: tree}, None if cache is None else len(cache.lengths), self.vocab_size)
        if not isinstance(cache, DenseCache):
            raise ValueError("some layers alone can read a dense cache only, got a quantised one")
        ascending = all(left < right for left, right in zip(layers, layers[1:], strict=False))
        if not (len(layers) and ascending and layers[0] >= 0 and layers[-1] < self.config.layers):
            raise ValueError(f"layers must ascend and be in [0, {self.config.layers}), got {list(layers)}")
        cache.check_room(slot, len(tree))
        if self.config.key_layers is not None:
            layers = [layer for layer in layers if self.config.key_layers[layer] in layers]
        rows = self._replays.run(self._step(layers), {slot: tree})
        return self._logits(rows.of_trees(rows.hidden))

    @inference
    def save_cache(self, path: str | Path) -> None:
        """Writes what is committed over a quantised cache to a file, for `load_cache`.

        Raises:
            RuntimeError: there is no quantised cache.
            ValueError: the model's layers differ in their heads.
        """
        if not isinstance(self._cache, QuantisedCache):
            raise RuntimeError("there is no quantised cache to save: prefill with cache first")
        if isinstance(self._cache, MixedQuantisedCache):
            raise ValueError("the cache of a model whose layers differ in their heads cannot be saved")
        save_quantised(self._cache, path, self.fingerprint)

    @inference
    def load_cache(self, path: str | Path, *, capacity: int | None = None) -> None:
        """Starts a new batch from what `save_cache` wrote: `verify` goes on behind it, with the bits it had.

        Raises:
            FileNotFoundError, ValueError: the file does not fit, see load_quantised; the batch before is untouched.
        """
        capacity = self.context_length if capacity is None else capacity
        cache = load_quantised(path, self.fingerprint, capacity=capacity, device=self.device)
        if cache.keys_values.dtype != self.dtype:
            raise ValueError(f"{path} is a cache in {cache.keys_values.dtype}, the model runs in {self.dtype}")
        self._verified, self._taps = None, ()
        self._use_quantised(cache)
        self._cache = cache

    def open(self, slots: int, **settings) -> None:
        self._check_prompt_attention("slots")
        super().open(slots, **settings)
        self._texts = [[] for _ in range(slots)]

    @inference
    def begin(self, slot: int, tokens: Sequence[int]) -> int:
        self._cache.clear(slot)
        if self._switch is not None:
            self._turn(self._cache, slot, len(tokens) > self._switch)
        count = self._begin(self._cache, slot, tokens)
        self._texts[slot] = list(tokens[:count])
        return count

    def read(self, pieces, observe=None) -> None:
        super().read(pieces, observe)
        if self._switch is not None:
            for slot, tokens in pieces.items():
                self._texts[slot] = [*self._texts[slot], *tokens]

    def keep_prefixes(self, memory: int) -> None:
        if memory:
            self._check_prompt_attention("kept prefixes")
        super().keep_prefixes(memory)

    def _check_prompt_attention(self, what: str) -> None:
        if self.prompt_attention != "pyspec":  # whose bits hang on the chunks
            raise ValueError(f"{what} need a model loaded with prompt_attention pyspec, got {self.prompt_attention}")

    def _check_cache(self, cache: QuantisedSettings | None) -> None:
        """Raises ValueError unless this model's keys can be quantised so."""
        if cache is None:
            return
        if self.prompt_attention != "pyspec":
            raise ValueError(f"cache must be dense with prompt_attention {self.prompt_attention}, got a quantised one")
        config = self.config
        if self._switch is not None:
            raise ValueError(f"cache must be dense for a model that turns texts of {self._switch} tokens otherwise")
        if config.attention_softcap is not None:
            raise ValueError("cache must be dense for a model that caps its scores, got a quantised one")
        if config.has_sinks:
            raise ValueError("cache must be dense for a model with attention sinks, got a quantised one")
        if self._in_chunks and self._records_graphs:
            raise ValueError("cache must be dense on a GPU for a model that attends in chunks, got a quantised one")
        if config.layer_heads is not None and cache.is_of_model:
            raise ValueError(f"cache must not be codes for a model whose layers differ in their heads, got {cache}")
        shapes = set(config.layer_heads or [(config.kv_heads, config.head_dim)])
        narrow = {shape for shape in shapes if shape[1] <= WIDEST}
        for shape in narrow or shapes:
            cache.check_model(config.layers, *shape, self.fingerprint, self._frequencies)
        slides = any(window is not None and window < self.context_length for window in config.windows)
        if slides and cache.keep < 1:
            raise ValueError(f"cache must keep all tokens for a model with sliding windows, got keep = {cache.keep}")

    def _empty_cache(self, sequences: int, capacity: int, settings: QuantisedSettings | None):
        if settings is None:
            return self._new_cache(sequences, capacity)
        return self._quantised_cache(sequences, capacity, settings)

    def _quantised_cache(self, sequences: int, capacity: int, settings: QuantisedSettings) -> QuantisedCache:
        room, old = capacity, None if self._replays is None else self._replays.cache
        if isinstance(old, QuantisedCache) and old.settings == settings and len(old.lengths) == sequences:
            if old.room >= capacity:
                old.restart(capacity)
                return old
            room = max(capacity, min(2 * old.room, self.context_length + BUCKETS[-1]))  # as for a dense one
        self._replays = old = None  # makes room
        config, memory = self.config, (self.dtype, self.device)
        if config.layer_heads is None:
            cache = settings.start(config.layers, sequences, config.kv_heads, room, config.head_dim, *memory)
        else:
            settings = settings.ready(room, self.device)
            cache = MixedQuantisedCache(settings, config.layer_heads, config.key_layers, sequences, room, *memory)
        self._use_quantised(cache)
        cache.restart(capacity)
        return cache

    def _use_quantised(self, cache: QuantisedCache) -> None:
        cache.ropes, cache.is_chunked = self._ropes(cache.room), self._in_chunks
        self._new_replays(cache)

    def _new_cache(self, sequences: int, capacity: int) -> DenseCache:
        replays = self._replays
        if replays is not None and isinstance(replays.cache, QuantisedCache):
            replays = None
        if replays is not None and len(replays.cache.lengths) == sequences and replays.cache.slots > capacity:
            replays.cache.restart(capacity)
            return replays.cache
        slots = slots_for(capacity)
        if replays is not None and len(replays.cache.lengths) == sequences:
            # at least twice as many, so that prompts that grow and grow lose what is recorded a few times only
            slots = max(slots, min(2 * replays.cache.slots, slots_for(self.context_length + BUCKETS[-1])))
        self._replays = replays = None  # makes room
        config, memory = self.config, (self.dtype, self.device, self._ropes(slots))
        if config.layer_heads is None:
            cache = DenseCache(config.layers, sequences, config.kv_heads, slots, config.head_dim, *memory)
        else:
            cache = MixedCache(config.layer_heads, config.key_layers, sequences, slots, *memory)
        cache.restart(capacity)
        self._new_replays(cache)
        return cache

    # ==== the switch ====

    def _turn(self, cache: DenseCache, slot: int, is_long: bool) -> None:
        """Says which cosines and sines a sequence's positions have: those of long texts lie behind the others."""
        cache.angles[slot] = len(cache.ropes[0].cos_sin) // 2 if is_long else 0

    def _run_layers(self, trees: dict[int, DraftTree]) -> Rows:
        if self._switch is not None:
            for slot, tree in trees.items():
                self._cross(slot, tree)
        return super()._run_layers(trees)

    def _cross(self, slot: int, tree: DraftTree) -> None:
        """Reads a text again with the frequencies of long ones, once it has got to the switch."""
        cache = self._cache
        length = cache.lengths[slot]
        if length < self._switch:
            if (end := length + int(tree.depths.max())) >= self._switch:
                raise ValueError(
                    f"trees[{slot}] must not reach from one side of position {self._switch} to the other, where the "
                    f"model's frequencies change, got nodes at positions {length} to {end}: see `room`"
                )
        elif not cache.angles[slot]:
            self._turn(cache, slot, True)
            cache.lengths[slot], chunk = 0, GRAPH_CHUNK if self._records_graphs else native.CHUNK
            try:
                for start in range(0, length, chunk):
                    piece = DraftTree.chain(self._texts[slot][start : start + chunk])
                    self._read({slot: piece}, cache)
                    cache.advance(slot, len(piece))
            except BaseException:  # some keys are read: the next round begins again
                self._turn(cache, slot, False)
                cache.lengths[slot] = length
                raise

    def _extend(self, sequence: int, path: Sequence[int], tree: DraftTree) -> None:
        super()._extend(sequence, path, tree)
        if self._switch is not None:
            self._texts[sequence] = [*self._texts[sequence], *tree.tokens[list(path)].tolist()]

    def _read(self, pieces: dict[int, DraftTree], cache: DenseCache | QuantisedCache) -> Rows:
        """What the layers give for each sequence's next piece of its prompt; flash-attn takes one."""
        if self.prompt_attention == "flash-attn":
            ((sequence, chain),) = pieces.items()
            return self._read_by_flash(chain, sequence, cache)
        return super()._read(pieces, cache)

    def _read_by_flash(self, chain: DraftTree, sequence: int, cache: DenseCache) -> Rows:
        """What the layers give for a piece of a prompt, launch by launch, with attention by flash-attn."""
        numbers = Numbers([sequence], len(chain), (len(chain) + 31) // 32, 0, self.device)
        numbers.fill({sequence: chain}, cache.lengths, cache.starts, angles=cache.angles)
        view = cache.view([sequence], cache.lengths[sequence] + len(chain))

        def attend(layer: int, q: Tensor, numbers: Numbers, window: int | None, **scores) -> Tensor:
            q = q.transpose(0, 1)[None]
            return flash_attn.attention(q, *view.keys_values[layer], window=window, **scores)[0].transpose(0, 1)

        view.attend = attend
        hidden, *taps = self._step(taps=self._taps)(view, numbers)
        return Rows(hidden, taps=taps)
