"""StateSpaceRunner: what MambaRunner and Mamba2Runner share, a recurrent state behind the three calls.

The nodes of all trees of a batch run packed through the layers, [sum of T_b, hidden]. Verifying reads the state
without changing it; committing notes the path, which the next verify replays. A prompt is read as chains that are
accepted as a whole, through the same kernels in the same order, so it may be read in any chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.caches.state import StateCache
from pyspec.models._checks import check_paths, check_prompts, check_trees
from pyspec.models._weights import Matrix, dense, move_together, packed
from pyspec.ops.linear import PackedWeight, linear
from pyspec.ops.mamba_layers import WEIGHTS, mamba_layers
from pyspec.trees import DraftTree

__all__ = ["StateSpaceConfig", "StateSpaceLayer", "StateSpaceRunner", "StateSpaceWeights"]

PREFILL_CHUNK = 128
CONTEXT_LENGTH = 2**31 - 1  # a recurrent state has no end
ROLLBACKS = ("replay", "joint")


class StateSpaceConfig(Protocol):
    """What the runner asks of MambaConfig and Mamba2Config."""

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

    def empty_layer(self, dtype: torch.dtype, device: torch.device) -> StateSpaceLayer: ...


class StateSpaceLayer:
    """Weights of one layer: MambaLayer or Mamba2Layer."""

    MATRICES: tuple[str, ...]  # in the order of their use

    def named(self, config: StateSpaceConfig, prefix: str) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes: views, or copies of what is packed."""
        raise NotImplementedError

    def kernel_tensors(self, config: StateSpaceConfig) -> dict[str, Tensor]:
        """What the layer has of mamba_layers.WEIGHTS."""
        raise NotImplementedError

    def pack(self, dtype: torch.dtype) -> None:
        """Packs the matrices that are not packed yet; each takes the place of its dense form."""
        for name in self.MATRICES:
            setattr(self, name, packed(getattr(self, name), dtype))


@dataclass
class StateSpaceWeights:
    """All weights. Where embedding and head are tied, they are one matrix here too."""

    LAYERS = "backbone.layers."  # and a number: what the names of a layer's tensors begin with

    embedding: Matrix  # [vocab, hidden]
    layers: list[StateSpaceLayer] = field(repr=False)
    norm: Tensor  # [hidden]
    head: Matrix  # [vocab, hidden]

    @classmethod
    def empty(cls, config: StateSpaceConfig, dtype: torch.dtype, device: torch.device) -> StateSpaceWeights:
        """Dense weights to be filled through `named`."""

        def new(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        embedding = new(config.vocab_size, config.hidden_size)
        layers = [config.empty_layer(dtype, device) for _ in range(config.layers)]
        head = embedding if config.tied_embedding else new(config.vocab_size, config.hidden_size)
        return cls(embedding, layers, new(config.hidden_size, dtype=torch.float32), head)

    def named(self, config: StateSpaceConfig) -> dict[str, Tensor]:
        """Where each tensor of a checkpoint goes, by its Hugging Face name: views, or copies of what is packed."""
        tensors = self.named_outside(config)
        for index, layer in enumerate(self.layers):
            tensors |= layer.named(config, f"{self.LAYERS}{index}.")
        return tensors

    def named_outside(self, config: StateSpaceConfig) -> dict[str, Tensor]:
        """`named` without the layers."""
        tensors = {"backbone.embeddings.weight": dense(self.embedding), "backbone.norm_f.weight": self.norm}
        if not config.tied_embedding:
            tensors["lm_head.weight"] = dense(self.head)
        return tensors

    def pack_outside(self, dtype: torch.dtype) -> None:
        """Packs the head, and the embedding where it is the head; an embedding of its own is only read by rows."""
        tied = self.embedding is self.head
        self.head = packed(self.head, dtype)
        if tied:
            self.embedding = self.head

    def pack(self, dtype: torch.dtype) -> None:
        """Packs every matrix that `linear` reads, to float32, float16, bfloat16 or int8."""
        self.pack_outside(dtype)
        for layer in self.layers:
            layer.pack(dtype)

    def move_together(self) -> None:
        """Moves the packed matrices into one buffer, in the order in which a step reads them."""
        tied = self.embedding is self.head
        move_together([(layer, name) for layer in self.layers for name in layer.MATRICES] + [(self, "head")])
        if tied:
            self.embedding = self.head


class StateSpaceRunner:
    """A state space model with its recurrent state; see pyspec.models.Runner for the calls.

    Every row of logits has the same bits whatever is computed beside it: the tree, the batch, the chunks that a
    prompt was read in. The state is kept in fp32.

    Args:
        config: the model's shape.
        weights: filled weights; what is not packed yet is packed here, in its place.
        tokenizer: a pyspec.models.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations, fp32, fp16 or bf16: that of the weights, or anything with int8 weights.
        rollback: how a state comes to be behind what was accepted. "replay" takes the steps again from their recorded
            inputs. "joint" (Joint Attainment and Advancement) runs the accepted tokens through the whole model again
            beside the next tree, once below it and once to move the state; it is there to be compared with.

    Raises:
        ValueError: rollback is neither.
    """

    def __init__(
        self,
        config: StateSpaceConfig,
        weights: StateSpaceWeights,
        tokenizer=None,
        eos_tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
        rollback: str = "replay",
    ):
        if rollback not in ROLLBACKS:
            raise ValueError(f"rollback must be one of {', '.join(ROLLBACKS)}, got {rollback!r}")
        self.rollback = rollback
        weights.pack(weights.head.dtype)
        if weights.norm.device.type == "cpu":
            weights.move_together()
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.eos_tokens = frozenset(eos_tokens)
        self.vocab_size = config.vocab_size
        self.context_length = CONTEXT_LENGTH
        self.weight_dtype = weights.head.dtype
        self.dtype = dtype or (torch.bfloat16 if self.weight_dtype == torch.int8 else self.weight_dtype)
        self.device = weights.norm.device
        vocabulary = "" if tokenizer is None else tokenizer.fingerprint
        description = repr(sorted(asdict(config).items())) + vocabulary
        self.fingerprint = f"{config.architecture}-{hashlib.sha256(description.encode()).hexdigest()[:16]}"
        none = torch.empty(0, device=self.device)
        self._layers = []
        for layer in weights.layers:
            has = layer.kernel_tensors(config)
            self._layers += [has.get(name, none) for name in WEIGHTS]
        self._cache: StateCache | None = None
        self._verified: list[DraftTree | None] | None = None
        self._behind: list[list[int]] = []  # of each sequence, tokens that a joint state is behind its length

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return [] if self._cache is None else list(self._cache.lengths)

    @torch.inference_mode()
    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Tensor], None] | None = None,
    ) -> list[Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        Args:
            tokens: B prompts, none empty.
            capacity: a state needs none, whatever the length of a text; at least the longest prompt.
            observe: called with (sequence, chain, [n, V] logits) for each chunk of a prompt.

        Raises:
            ValueError: a prompt or the capacity does not fit; the batch before it is then untouched.
        """
        check_prompts(tokens, self.vocab_size, self.context_length)
        longest = max(map(len, tokens))
        if capacity is not None and capacity < longest:
            raise ValueError(f"capacity must be at least the longest prompt, {longest} tokens, got {capacity}")
        self._cache = self._verified = None  # the old batch makes room for the new one
        config = self.config
        cache = StateCache(
            config.layers,
            len(tokens),
            channels=config.channels,
            state_size=config.state_size,
            taps=config.conv_taps,
            conv_channels=config.conv_channels,
            record_width=config.record_width,
            device=self.device,
            copies=1 if self.rollback == "replay" else 2,
        )
        last_logits = []
        for sequence, prompt in enumerate(tokens):
            for start in range(0, len(prompt), PREFILL_CHUNK):
                chain = DraftTree.chain(prompt[start : start + PREFILL_CHUNK])
                hidden = self._forward([chain], [sequence], [True], cache)
                cache.lengths[sequence] += len(chain)
                if observe is not None:
                    observe(sequence, chain, self._logits(hidden))
            last_logits.append(self._logits(hidden[-1:])[0])
        self._cache, self._behind = cache, [[] for _ in tokens]
        return last_logits

    @torch.inference_mode()
    def verify(self, trees: Sequence[DraftTree | None]) -> list[Tensor | None]:
        """[T, V] fp32 logits of every node of each sequence's tree; None marks a sequence that sits out.

        Raises:
            RuntimeError: before any prefill, or after a verify that was interrupted.
            ValueError: a tree has tokens outside of the vocabulary.
        """
        cache = self._cache
        check_trees(trees, None if cache is None else len(cache.lengths), self.vocab_size)
        active = [sequence for sequence, tree in enumerate(trees) if tree is not None]
        self._verified = None
        if active:
            self._cache = None  # an interrupt between two layers would leave some of them a path ahead
            run = self._forward_joint if self.rollback == "joint" else self._forward
            hidden = run([trees[sequence] for sequence in active], active, [False] * len(active), cache)
            self._cache = cache
        self._verified = list(trees)
        if not active:
            return [None] * len(trees)
        parts = iter(self._logits(hidden).split([len(trees[sequence]) for sequence in active]))
        return [None if tree is None else next(parts) for tree in trees]

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int] | None]) -> None:
        """Makes a path of the last verified tree (node indices from the root, root included) state.

        Raises:
            RuntimeError: there is no verified tree.
            ValueError: a path does not follow its tree; nothing is committed then.
        """
        check_paths(paths, self._verified)
        for sequence, (path, tree) in enumerate(zip(paths, self._verified, strict=True)):
            if path is None:
                continue
            if self.rollback == "joint":
                self._behind[sequence] = tree.tokens[list(path)].tolist()
                self._cache.lengths[sequence] += len(path)
            else:
                self._cache.commit(sequence, path)
        self._verified = None

    def _forward_joint(
        self, trees: list[DraftTree], sequences: list[int], advances: list[bool], cache: StateCache
    ) -> Tensor:
        """`_forward` of trees below tokens that the states do not have yet, which then do."""
        batch, behind = len(cache.lengths), [self._behind[sequence] for sequence in sequences]
        moving = [sequence for sequence in sequences if self._behind[sequence]]
        for sequence in sequences:  # the drafts' state, for the other one moves in the same call
            cache.copy(sequence, batch + sequence)
        chains = [DraftTree.chain(self._behind[sequence]) for sequence in moving]
        places = moving + [batch + sequence for sequence in sequences]
        below = [_below(tokens, tree) for tokens, tree in zip(behind, trees, strict=True)]
        hidden = self._forward([*chains, *below], places, [True] * len(chains) + advances, cache)
        for sequence in sequences:
            self._behind[sequence] = []
        parts = hidden[sum(map(len, chains)) :].split([len(tree) for tree in below])
        return torch.cat([part[len(tokens) :] for part, tokens in zip(parts, behind, strict=True)])

    def _forward(self, trees: list[DraftTree], places: list[int], advances: list[bool], cache: StateCache) -> Tensor:
        """[R, hidden] of all nodes, tree after tree, after the last norm. See StateCache.round."""
        tokens = [tree.tokens for tree in trees]
        round = cache.round(trees, places, advances)  # may replace the records
        hidden = mamba_layers(
            self._embed(tokens[0] if len(tokens) == 1 else torch.cat(tokens)),
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
        cache.done(places, advances)
        return hidden

    def _embed(self, tokens: Tensor) -> Tensor:
        embedding = self.weights.embedding
        if isinstance(embedding, PackedWeight):
            return embedding.rows(tokens)
        return F.embedding(tokens, embedding).float()

    def _logits(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weights.head, out_dtype=torch.float32)


def _below(tokens: list[int], tree: DraftTree) -> DraftTree:
    """A tree below a chain of tokens."""
    if not tokens:
        return tree
    count = len(tokens)
    parents = torch.cat((torch.arange(-1, count - 1, dtype=torch.int32), tree.parents + count))
    parents[count] = count - 1
    return DraftTree(torch.cat((torch.tensor(tokens), tree.tokens)), parents)
