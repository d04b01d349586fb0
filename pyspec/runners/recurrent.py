"""StateSpaceRunner: what MambaRunner and Mamba2Runner share, a recurrent state behind the three calls.

The nodes of all trees of a batch run packed through the layers, [sum of T_b, hidden]. Verifying reads the state
without changing it; committing notes the path, which the next verify replays. A prompt is read as chains that are
accepted as a whole, through the same kernels in the same order, so it may be read in any chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyspec.architectures.weights import Blank, NativeLayer, NativeWeights, dense
from pyspec.caches.state import StateCache
from pyspec.ops.linear import PackedWeight
from pyspec.ops.mamba_layers import WEIGHTS, mamba_layers
from pyspec.ops.selective_state import Round
from pyspec.runners._checks import check_prompts
from pyspec.runners._inference import inference
from pyspec.runners.native import NativeRunner
from pyspec.runners.prompts import PromptPlan
from pyspec.runners.static_rounds import StaticRounds
from pyspec.runners.static_steps import BUCKETS, STATIC_CHUNK, GraphedHead, GraphRecorder, Rows
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

__all__ = ["RecurrentRunner", "StateSpaceConfig", "StateSpaceLayer", "StateSpaceRunner", "StateSpaceWeights"]

PREFILL_CHUNK = 128  # tokens of prompts in a call; STATIC_CHUNK where shapes are static
CONTEXT_LENGTH = 2**31 - 1  # a recurrent state has no end


class StateSpaceConfig:
    """What MambaConfig and Mamba2Config share, and what the runner asks of them."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    channels: int  # of the recurrence
    state_size: int
    conv_taps: int
    conv_channels: int
    record_width: int  # of what is recorded of a node in a layer
    dt_rank: int  # 0 where dt comes straight from the input projection
    norm_epsilon: float
    tied_embedding: bool

    def check_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def empty_layer(self, blank: Blank) -> StateSpaceLayer:
        raise NotImplementedError

    def empty_layers(self, blank: Blank) -> list[StateSpaceLayer]:
        return [self.empty_layer(blank) for _ in range(self.layers)]


class StateSpaceLayer(NativeLayer):
    """Weights of one layer, as checkpoints have it but for the convolution, whose taps come first."""

    MIXER = "mixer."  # what the names of all but the norm begin with
    NORM = "norm.weight"
    NAMES: dict[str, str]  # of tensors whose names in a checkpoint are not ours

    def named(self, config: StateSpaceConfig, prefix: str) -> dict[str, Tensor]:
        tensors = {prefix + self.NORM: self.norm}
        for name in WEIGHTS[1:]:
            name = {"A": "A_log"}.get(name, name)
            if (tensor := getattr(self, name, None)) is None:
                continue
            tensor = tensor.T[:, None] if name == "conv_weight" else dense(tensor)
            tensors[prefix + self.MIXER + self.NAMES.get(name, name)] = tensor
        return tensors

    def kernel_tensors(self, config: StateSpaceConfig) -> list[Tensor]:
        """mamba_layers.WEIGHTS of this layer; what it lacks is empty."""
        none, own = self.norm.new_empty(0), self.computed(config)
        tensors = [own[name] if name in own else getattr(self, name, None) for name in WEIGHTS]
        return [none if t is None else t.data if isinstance(t, PackedWeight) else t for t in tensors]

    def computed(self, config: StateSpaceConfig) -> dict[str, Tensor]:
        """Those of them that are not as in a checkpoint."""
        raise NotImplementedError


class StateSpaceWeights(NativeWeights):
    """All weights, by the names of Hugging Face's Mamba."""

    LAYERS = "backbone.layers."
    EMBEDDING = "backbone.embeddings.weight"
    NORM = "backbone.norm_f.weight"


class RecurrentRunner(NativeRunner):
    """A runner with a recurrent state: a prompt is read as chains that are accepted as a whole. See NativeRunner."""

    @inference
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Prompts are read packed, some hundred tokens a call.

        Args:
            tokens: B prompts, none empty.
            capacity: slots of a sequence for keys, where the model has attention layers: prompt, new tokens and one
                tree, the context length by default. States need none.
            observe: called with (slot, chain, what is verified of it) for each chunk of a prompt.

        Raises:
            ValueError: a prompt or the capacity does not fit; the batch before it is then untouched.
        """
        tokens = check_prompts(tokens, self.vocab_size, self.context_length, capacity)
        self._cache = self._verified = None  # the old batch makes room for the new one
        cache = self._empty_cache(len(tokens), capacity)
        plan, chunk = PromptPlan(tokens, share=False), STATIC_CHUNK if self._is_static else PREFILL_CHUNK
        last_logits: dict[int, Tensor] = {}
        while pieces := plan.next_pieces(cache.lengths, chunk, len(tokens)):
            chains = list(pieces.values())
            rows = self._forward(chains, list(pieces), [True] * len(pieces), cache)
            parts = rows.of_trees(rows.hidden).split([len(chain) for chain in chains])
            for (sequence, chain), part in zip(pieces.items(), parts, strict=True):
                cache.advance(sequence, len(chain))
                if observe is not None:
                    observe(sequence, chain, Verified(self._logits(part)))
                if cache.lengths[sequence] == len(tokens[sequence]):
                    last_logits[sequence] = self._logits(part[-1:])[0]
        self._cache = cache
        return [last_logits[sequence] for sequence in range(len(tokens))]

    def _run_layers(self, trees: dict[int, DraftTree]) -> Rows:
        cache, self._cache = self._cache, None  # an interrupt between two layers would leave some a path ahead
        rows = self._forward(list(trees.values()), list(trees), [False] * len(trees), cache)
        self._cache = cache
        return rows

    def _empty_cache(self, sequences: int, capacity: int | None):
        """The cache of a new batch."""
        raise NotImplementedError

    def _forward(self, trees: list[DraftTree], sequences: list[int], advances: list[bool], cache) -> Rows:
        """What the layers give for the nodes of all trees; see StateCache.round."""
        raise NotImplementedError


class StateSpaceRunner(RecurrentRunner):
    """A state space model with its recurrent state; see pyspec.runners.Runner for the calls.

    Every row of logits has the same bits whatever is computed beside it: the tree, the batch, the chunks that a
    prompt was read in. The state is kept in fp32.

    Args:
        config: the model's shape.
        weights: filled weights; what is not packed yet is packed here, in its place.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations, fp32, fp16 or bf16: that of the weights, or anything with int8 weights.
    """

    def __init__(
        self,
        config: StateSpaceConfig,
        weights: StateSpaceWeights,
        tokenizer=None,
        eos_tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        super().__init__(config, weights, CONTEXT_LENGTH, tokenizer, eos_tokens, dtype)
        self._is_static = self.device.type == "cuda"
        self._rounds: StaticRounds | None = None  # where shapes are static; outlives the batch
        self._layers = [tensor for layer in weights.layers for tensor in layer.kernel_tensors(config)]

    def _drop_batch(self) -> None:
        super()._drop_batch()
        self._rounds = None

    def _empty_cache(self, sequences: int, capacity: int | None) -> StateCache:
        if self._rounds is not None and len(self._rounds.cache.lengths) == sequences:
            self._rounds.cache.restart()
            return self._rounds.cache
        self._rounds = None  # makes room
        cache = StateCache.of(self.config, sequences, self.device)
        if self._is_static:
            self._rounds = StaticRounds(cache, GraphRecorder(self.device), GraphedHead(self.weights.head))
        return cache

    def _record(self, sequences: int, capacity: int) -> None:
        cache = self._empty_cache(sequences, capacity)
        if self._rounds is not None:
            self._rounds.warm(partial(self._run_round, cache), BUCKETS[-1])

    def _forward(self, trees: list[DraftTree], sequences: list[int], advances: list[bool], cache: StateCache) -> Rows:
        """What the layers give for the nodes of all trees. See StateCache.round."""
        if self._rounds is not None:
            rows = self._rounds.run(partial(self._run_round, cache), trees, sequences, advances)
            if rows is not None:
                return rows
        tokens = [torch.from_numpy(tree.tokens) for tree in trees]
        round = cache.round(trees, sequences, advances)
        hidden = self._run_round(cache, tokens[0] if len(tokens) == 1 else torch.cat(tokens), round)
        cache.done(sequences, advances)
        return Rows(hidden)

    def _run_round(self, cache: StateCache, tokens: Tensor, round: Round) -> Tensor:
        return mamba_layers(
            self._embed(tokens),
            self._layers,
            self.weights.norm,
            cache.states,
            cache.windows,
            cache.records,
            cache.conv_records,
            round,
            dt_rank=self.config.dt_rank,
            epsilon=self.config.norm_epsilon,
            dtype=self.dtype,
        )
