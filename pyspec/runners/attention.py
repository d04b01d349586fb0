"""LlamaRunner: Llama-shaped models (Llama, SmolLM2, Mistral, Qwen2) over a dense or a packed KV cache.

The nodes of all trees of a batch run packed through the layers, [sum of T_b, hidden]; on a GPU they are padded to
fixed shapes and replayed as a graph (static_steps.py). A prompt is read as a chain of draft tokens that are all
accepted, so prefill is verify and commit, and gives the same bits in any chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyspec.architectures.rotary import rope_table
from pyspec.caches.blocks import QuantisedCache, QuantisedSettings
from pyspec.caches.dense import DenseCache
from pyspec.caches.saved import load_quantised, save_quantised
from pyspec.ops.llama_layers import WEIGHTS, layers_by_ops, llama_layers
from pyspec.ops.tree_attention import tree_attention
from pyspec.runners import flash_attn
from pyspec.runners._checks import check_prompts, check_trees
from pyspec.runners._inference import inference
from pyspec.runners.native import NativeRunner
from pyspec.runners.prompts import PromptPlan
from pyspec.runners.static_steps import (
    BUCKETS,
    STATIC_CHUNK,
    GraphedHead,
    GraphRecorder,
    Rows,
    StaticSteps,
    StepInputs,
    slots_for,
)
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.architectures.llama import LlamaConfig, LlamaWeights

__all__ = ["LlamaRunner"]

PREFILL_CHUNK = 128  # tokens of prompts in a call; STATIC_CHUNK where shapes are static
FLASH_CHUNK = 2048  # by flash-attn: always the same, because bits hang on it


class LlamaRunner(NativeRunner):
    """A Llama-shaped model with its KV cache; see pyspec.runners.Runner for the calls.

    Every row of logits has the same bits whatever is computed beside it: the tree, the batch, the chunks that a
    prompt was read in.

    Args:
        config: the model's shape.
        weights: filled weights; what is not packed yet is packed here, in its place.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations and cache, fp32, fp16 or bf16: that of the weights, or anything with int8 weights.
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
        self.prompt_attention = prompt_attention
        self._frequencies = config.rope_frequencies()
        self._cos_sin = rope_table(self._frequencies, 0, self.device)
        self._windows = [window or 0 for window in config.windows]
        self._matrices = [
            tensor
            for layer in weights.layers
            for tensor in (
                layer.attention_norm,
                layer.qkv.data,
                layer.output.data,
                layer.feed_forward_norm,
                layer.gate_up.data,
                layer.down.data,
            )
        ]
        self._biases = []
        if config.qkv_bias or config.output_bias:
            none = torch.empty(0, dtype=torch.float32, device=self.device)
            pairs = ((layer.qkv_bias, layer.output_bias) for layer in weights.layers)
            self._biases = [none if bias is None else bias for pair in pairs for bias in pair]
        self._is_static = self.device.type == "cuda"
        self._steps: StaticSteps | None = None  # where shapes are static; outlives the batch

    def _drop_batch(self) -> None:
        super()._drop_batch()
        self._steps = None

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
        cache: QuantisedSettings | None = None,
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Prompts are read packed, some hundred tokens a call, and what two of them begin with is read once: every
        prompt has the bits that it has alone. flash-attn reads each by itself and whole, to the same end.

        Args:
            tokens: B prompts, none empty nor longer than the context.
            capacity: cache slots of a sequence: prompt, new tokens and one tree; the context length by default.
            observe: called with (slot, chain, what is verified of it) for each chunk of a prompt.
            cache: how keys and values are packed; None keeps them as they are. Packed, the layers run op by op.

        Raises:
            ValueError: a prompt, the capacity or the cache does not fit; the batch before it is then untouched. Or
                keys or values cannot be packed: NaN, infinite or too large.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        capacity = self.context_length if capacity is None else capacity
        if cache is not None:
            self._check_packs(cache)
        self._cache = self._verified = None  # the old batch makes room for the new one
        rows = PREFILL_CHUNK if cache is None else min(PREFILL_CHUNK, cache.largest_tree)
        by_flash = self.prompt_attention == "flash-attn"
        # of a packed prefix the exact last tokens would be missing, and flash-attn has other bits in other chunks
        plan = PromptPlan(tokens, share=cache is None and not by_flash)
        cache = self._empty_cache(len(tokens), capacity, cache)
        if self._steps is not None:
            rows = STATIC_CHUNK
        if by_flash:
            rows = FLASH_CHUNK
        at_once = 1 if self._is_static or by_flash else len(tokens)
        last_logits: dict[int, Tensor] = {}
        while pieces := plan.next_pieces(cache.lengths, rows, at_once):
            for (sequence, chain), hidden in zip(pieces.items(), self._read(pieces, cache), strict=True):
                if observe is not None:
                    logits = self._logits(hidden)
                    for reader, count in plan.readers(sequence, cache.lengths[sequence], len(chain)):
                        observe(reader, chain.first(count), Verified(logits[:count]))
                cache.commit(sequence, range(len(chain)))
                if cache.lengths[sequence] == len(tokens[sequence]):
                    last_logits[sequence] = self._logits(hidden[-1:])[0]
                for taker, count in plan.takers(sequence):
                    if cache.lengths[taker] < count <= cache.lengths[sequence]:
                        cache.copy_prefix(sequence, taker, count)
        self._cache = cache
        return [last_logits[sequence] for sequence in range(len(tokens))]

    def _record(self, sequences: int, capacity: int) -> None:
        self._empty_cache(sequences, capacity)
        if self._steps is not None:
            self._steps.warm(self._step, capacity)

    def _run_layers(self, trees: dict[int, DraftTree]) -> Rows:
        if self._steps is not None:
            return self._steps.together(self._step, [trees.get(slot) for slot in range(self._steps.sequences)])
        return Rows(self._forward(list(trees.values()), list(trees), self._cache))

    def room(self, slot: int) -> int:
        """Nodes of the largest tree that fits behind a slot's sequence."""
        return self._cache.capacity - self._cache.lengths[slot]

    @inference
    def draft(self, slot: int, tree: DraftTree, layers: Sequence[int]) -> Tensor:
        """[T, V] fp32 logits of a tree's nodes by some of the layers, over the keys that all layers committed.

        A cheap guess at what verify says, with the same weights and keys. The committed state is read, not changed.

        Args:
            layers: of the model, ascending; at least one.

        Raises:
            RuntimeError: before any prefill.
            ValueError: the tree does not fit, as in verify, the layers are none of the model, or the cache is packed.
        """
        cache = self._cache
        check_trees({slot: tree}, None if cache is None else len(cache.lengths), self.vocab_size)
        if not isinstance(cache, DenseCache):
            raise ValueError("some layers alone can read a dense cache only, got a packed one")
        ascending = all(left < right for left, right in zip(layers, layers[1:], strict=False))
        if not (len(layers) and ascending and layers[0] >= 0 and layers[-1] < self.config.layers):
            raise ValueError(f"layers must ascend and be in [0, {self.config.layers}), got {list(layers)}")
        cache.check_room(slot, len(tree))
        return self._logits(self._forward([tree], [slot], cache, layers))

    @inference
    def save_cache(self, path: str | Path) -> None:
        """Writes what is committed over a packed cache to a file, for `load_cache`.

        Raises:
            RuntimeError: there is no packed cache.
        """
        if not isinstance(self._cache, QuantisedCache):
            raise RuntimeError("there is no packed cache to save: prefill with cache first")
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
        self._steps = self._verified = None
        self._extend_rope(capacity)
        self._cache = cache

    def _check_packs(self, cache: QuantisedSettings) -> None:
        """Raises ValueError unless this model's keys can be packed so."""
        if self.prompt_attention != "pyspec":
            raise ValueError(f"cache must be dense with prompt_attention {self.prompt_attention}, got a packed one")
        config = self.config
        cache.check_model(config.layers, config.kv_heads, config.head_dim, self.fingerprint, self._frequencies)
        for layer, window in enumerate(self.config.windows):
            if window is not None and window < self.context_length:
                raise ValueError(
                    f"cache must be dense for a model with sliding windows: layer {layer} sees {window} positions"
                )

    def _empty_cache(
        self, sequences: int, capacity: int, packed: QuantisedSettings | None = None
    ) -> DenseCache | QuantisedCache:
        """The cache of a new batch; where shapes are static, the last one's if it fits, with its graphs."""
        if packed is not None:
            self._steps = None  # its keys grow with the text, its launches' shapes too
            self._extend_rope(capacity)
            config = self.config
            return packed.start(
                config.layers, sequences, config.kv_heads, capacity, config.head_dim, self.dtype, self.device
            )
        if self._steps is not None and self._steps.fits(sequences, capacity):
            self._steps.cache.restart(capacity)
            return self._steps.cache
        config, slots = self.config, slots_for(capacity) if self._is_static else capacity
        if self._steps is not None and self._steps.sequences == sequences:
            # at least twice as many, so that prompts that grow and grow lose their graphs a few times only
            most = slots_for(self.context_length + BUCKETS[-1])
            slots = max(slots, min(2 * self._steps.slots, most))
        self._steps = None  # makes room
        self._extend_rope(slots)
        cache = DenseCache(config.layers, sequences, config.kv_heads, slots, config.head_dim, self.dtype, self.device)
        cache.restart(capacity)
        if self._is_static:
            self._steps = StaticSteps(cache, GraphRecorder(self.device), GraphedHead(self.weights.head))
        return cache

    def _read(self, pieces: dict[int, DraftTree], cache: DenseCache | QuantisedCache) -> Sequence[Tensor]:
        """[n, hidden] of each sequence's next piece of its prompt; shapes that are static, or flash-attn, allow one."""
        if self.prompt_attention == "flash-attn":
            ((sequence, chain),) = pieces.items()
            return [self._read_by_flash(chain, sequence, cache)]
        if self._steps is not None:
            ((sequence, chain),) = pieces.items()
            if len(cache.lengths) == 1:
                rows = self._steps.together(self._step, [chain], record=False)  # a prompt is read once
                return [rows.of_trees(rows.hidden)]
            return [self._steps.alone(self._step, chain, sequence)]
        hidden = self._forward(list(pieces.values()), list(pieces), cache)
        return hidden.split([len(chain) for chain in pieces.values()])

    def _read_by_flash(self, chain: DraftTree, sequence: int, cache: DenseCache) -> Tensor:
        """[n, hidden] of a piece of a prompt, launch by launch, with attention by flash-attn."""
        length = cache.lengths[sequence]
        places = torch.arange(length, length + len(chain), dtype=torch.int32, device=self.device)
        of_sequence = cache.keys_values[:, :, sequence : sequence + 1, :, : length + len(chain)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            window = self._windows[layer] or None
            return flash_attn.attention(q.transpose(0, 1)[None], k, v, window=window)[0].transpose(0, 1)

        return self._by_ops(
            torch.from_numpy(chain.tokens), places, torch.zeros_like(places), places, of_sequence, attend
        )

    def _forward(
        self,
        trees: list[DraftTree],
        sequences: list[int],
        cache: DenseCache | QuantisedCache,
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """[R, hidden] of all nodes, tree after tree, after the last norm; keys and values go behind the committed.

        layers: those to run, ascending; None runs all.
        """
        if isinstance(cache, QuantisedCache):
            return self._forward_packed(trees, sequences, cache)
        lengths = [cache.lengths[sequence] for sequence in sequences]
        positions = [torch.from_numpy(tree.depths) + length for tree, length in zip(trees, lengths, strict=True)]
        tokens = [torch.from_numpy(tree.tokens) for tree in trees]
        positions, tokens = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (positions, tokens))
        hidden = self._embed(tokens)
        for first, end in [(0, self.config.layers)] if layers is None else _runs(layers):
            # hidden is changed in place: after a run of layers it is what the next one begins with
            normed = llama_layers(
                hidden,
                self._matrices[first * WEIGHTS : end * WEIGHTS],
                self._biases[2 * first : 2 * end],
                self.weights.norm,
                cache.keys_values[first:end],
                self._cos_sin,
                positions,
                [torch.from_numpy(tree.ancestor_bits) for tree in trees],
                sequences,
                lengths,
                windows=self._windows[first:end],
                heads=self.config.heads,
                intermediate=self.config.intermediate_size,
                epsilon=self.config.norm_epsilon,
            )
        return normed

    def _forward_packed(self, trees: list[DraftTree], sequences: list[int], cache: QuantisedCache) -> Tensor:
        """`_forward` over a packed cache, op by op."""
        sizes = [len(tree) for tree in trees]
        places = []  # position, sequence and slot of every node
        for tree, sequence in zip(trees, sequences, strict=True):
            length = cache.lengths[sequence]
            slots = torch.arange(len(tree), dtype=torch.int32, device="cpu") + length - cache.starts[sequence]
            places.append(
                torch.stack((torch.from_numpy(tree.depths) + length, torch.full_like(slots, sequence), slots))
            )
        positions, row_sequences, slots = torch.cat(places, 1).to(self.device)
        seen = [cache.rows(sequence, tree) for tree, sequence in zip(trees, sequences, strict=True)]

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(sequences, q.split(sizes), seen, strict=True)
            return torch.cat([cache.attend(layer, sequence, part, rows) for sequence, part, rows in parts])

        tokens = torch.cat([torch.from_numpy(tree.tokens) for tree in trees])
        return self._by_ops(tokens, positions, row_sequences, slots, cache.keys_values, attend)

    def _step(self, inputs: StepInputs, keys_values: Tensor) -> Tensor:
        """`_forward` for StaticSteps: sizes come from shapes, and what changes from round to round from inputs."""
        sequences, nodes = inputs.tokens.shape

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q = q.unflatten(0, (sequences, nodes)).transpose(1, 2)
            window = self._windows[layer] or None
            mixed = tree_attention(q, k, v, inputs.ancestor_bits, inputs.prefix_lens, window=window)
            return mixed.transpose(1, 2).flatten(0, 1)

        rows = (places.flatten() for places in (inputs.tokens, inputs.positions, inputs.sequences, inputs.slots))
        return self._by_ops(*rows, keys_values, attend)

    def _by_ops(
        self, tokens: Tensor, positions: Tensor, sequences: Tensor, slots: Tensor, keys_values: Tensor, attend: Callable
    ) -> Tensor:
        """[R, hidden] of rows at these places, after the last norm; attend as layers_by_ops takes it."""
        weights = (self._matrices, self._biases, self.weights.norm)
        place = (keys_values, self._cos_sin, positions, sequences, slots)
        sizes = (self.config.heads, self.config.intermediate_size, self.config.norm_epsilon)
        return layers_by_ops(self._embed(tokens), *weights, *place, attend, *sizes)

    def _extend_rope(self, positions: int) -> None:
        """Makes the table of cosines and sines long enough."""
        if positions > len(self._cos_sin):
            self._cos_sin = rope_table(self._frequencies, positions, self.device)


def _runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """(first, end) of the runs of neighbours in ascending numbers."""
    runs: list[tuple[int, int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer:
            runs[-1] = (runs[-1][0], layer + 1)
        else:
            runs.append((layer, layer + 1))
    return runs
