"""NativeRunner: what the runners on our own kernels share, whatever their state is: verify and commit of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import accumulate, repeat

import torch
from torch import Tensor

from pyspec.architectures.rotary import Rope
from pyspec.architectures.weights import NativeWeights
from pyspec.caches.prefixes import Prefixes
from pyspec.fingerprint import fingerprint_of
from pyspec.ops._checks import FLOATS
from pyspec.ops.linear import LinearWeight
from pyspec.runners._checks import check_paths, check_taps, check_trees
from pyspec.runners._inference import inference
from pyspec.runners.numbers import Numbers
from pyspec.runners.prompts import PromptPlan
from pyspec.runners.replay import BUCKETS, GRAPH_CHUNK, GraphRecorder, Replays, Rows, Step, TapeRecorder
from pyspec.runners.verified import ALL, SentStatistics, Verified, pack_statistics
from pyspec.tree import DraftTree

CHUNK = 256  # tokens of prompts in a call on a CPU: within 2% of the best by bench/prompt_chunks.py
WARM_PROMPTS = (512, 256, 128, 96, 64, 32, 1)  # every number of words that the ancestor bits of a piece may have


class NativeRunner:
    """A model with its state, `_cache`, which has the `lengths` of its sequences and their `check_room`.

    See pyspec.runners.Runner for the calls. Threads wait for each other at every call, or use a `fork`.

    Every row of logits has the same bits whatever is computed beside it: the tree, the batch, the chunks that a
    prompt was read in.

    Args:
        config: the model's shape.
        weights: filled weights; what is not laid out yet is laid out here, in its place.
        context_length: positions the model was made for.
        tokenizer: a pyspec.checkpoints.tokenizer.Tokenizer, or None.
        eos_tokens: tokens that end a text.
        dtype: of activations, fp32, fp16 or bf16: that of the weights, or anything with int8 and int4.
    """

    def __init__(
        self,
        config,
        weights: NativeWeights,
        context_length: int,
        tokenizer=None,
        eos_tokens: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ):
        sample = weights.sampled(config)
        weights.lay_out(weights.head.dtype)
        if weights.norm.device.type == "cpu":
            weights.move_together()
        weights.prepare(config)
        self.config = config
        self.weights = weights
        self.tokenizer = tokenizer
        self.eos_tokens = frozenset(eos_tokens)
        self.vocab_size = config.vocab_size
        self.context_length = context_length
        self.weight_dtype = weights.dtype
        self.dtype = dtype or (weights.head.dtype if weights.head.dtype in FLOATS else torch.bfloat16)
        self.device = weights.norm.device
        vocabulary = "" if tokenizer is None else tokenizer.fingerprint
        description = repr(sorted(asdict(config).items())) + vocabulary
        self.fingerprint = fingerprint_of(config.architecture, description, sample)
        self._records_graphs = self.device.type == "cuda"  # few shapes, each a graph, rather than tapes
        self._made_ropes: list[Rope] = []
        self._rope_positions = 0
        self._cache = None
        self._replays: Replays | None = None  # of a cache, which it keeps: both outlive the batch
        self._verified: dict[int, DraftTree] | None = None
        self._taps: tuple[int, ...] = ()  # of the batch
        self._prefixes = Prefixes(0)

    def lengths(self) -> list[int]:
        """Committed tokens of each sequence."""
        return [] if self._cache is None else list(self._cache.lengths)

    @property
    def cache(self):
        """The keys and values, or the states, of the batch: for benchmarks and training. None before any prefill."""
        return self._cache

    @property
    def layers(self) -> int:
        return len(self.weights.layers)

    @property
    def hidden_size(self) -> int:
        return len(self.weights.norm)

    @property
    def head(self) -> LinearWeight:
        return self.weights.head

    @property
    def embeds_by_op(self) -> bool:
        """Whether `embed` of int32 tokens is one op, which a tape records."""
        return self.weights.embeds_by_op(self.config)

    @inference
    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32: what the layers take in for tokens [R]."""
        return self._embed(tokens)

    @property
    def keeps_tree_keys(self) -> bool:
        """Whether the nodes of a tree may be verified a few at a time, see DraftTree.later."""
        return False

    def fork(self):
        """A runner on the same weights with a batch, and drafters, of its own: it waits for nobody else's calls."""
        fork = copy.copy(self)
        vars(fork).pop("_drafters", None)
        fork._prefixes = Prefixes(0)
        fork._drop_batch()
        return fork

    def _drop_batch(self) -> None:
        """Forgets the batch and all that knows its addresses."""
        self._cache = self._replays = self._verified = None

    @inference
    def warm(self, capacity: int | None = None, sequences: int = 1) -> None:
        """Compiles the kernels and captures the graphs that batches of so many sequences need; the batch is lost.

        None of that is left then for a prefill with at most this capacity, nor for verifying trees of up to 64 nodes.
        Batches of another size, or larger ones, have graphs of their own. On a CPU there is nothing to do.

        Args:
            capacity: as in prefill; the context length by default.
            sequences: of the batches.
        """
        if not self._records_graphs:
            return
        self._cache = self._verified = None
        capacity = self.context_length if capacity is None else capacity
        self._new_cache(sequences, capacity)
        self._replays.warm(self._step(), capacity)
        for length in WARM_PROMPTS:
            if length <= min(capacity, self.context_length):
                self.prefill([[0] * length] * sequences, capacity=capacity)
        for nodes in (nodes for nodes in BUCKETS if nodes < capacity):
            self.verify(dict.fromkeys(range(sequences), DraftTree([0] * nodes, [-1] + [0] * (nodes - 1))))
            path = sorted({0, nodes - 1})  # behind a gap, which takes other kernels to close
        if self._verified is not None:
            self.commit(dict.fromkeys(range(sequences), path))
        self._cache = self._verified = None

    @inference
    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Verified]:
        """What the model says after every node of the trees, by slot.

        Raises:
            RuntimeError: before any prefill, or after a verify that was interrupted and lost the state.
            ValueError: a tree has tokens outside of the vocabulary or does not fit the cache's capacity.
        """
        check_trees(trees, None if self._cache is None else len(self._cache.lengths), self.vocab_size)
        trees = dict(sorted(trees.items()))
        for slot, tree in trees.items():
            self._cache.check_room(slot, tree.earlier + len(tree))
            if tree.earlier and not self.keeps_tree_keys:
                raise ValueError(f"trees[{slot}] must be a whole tree over this cache, got nodes from {tree.earlier}")
        self._verified = None
        verified: dict[int, Verified] = {}
        if trees:
            rows, sizes = self._run_layers(trees), [len(tree) for tree in trees.values()]
            tapped = self._tapped(rows, sizes)
            if rows.logits is None:
                of_nodes = rows.of_trees(rows.hidden)
                logits = self._logits(of_nodes)
                rows = Rows(of_nodes, logits, pack_statistics(logits) if logits.is_cuda else None)
            parts = rows.of_trees(rows.logits).split(sizes)
            if rows.statistics is None:
                verified = dict(zip(trees, map(Verified, parts, repeat(None), repeat(ALL), tapped), strict=True))
            else:
                sent, ends = SentStatistics(rows.statistics), accumulate(map(len, parts))
                places = rows.places or [slice(end - len(part), end) for part, end in zip(parts, ends, strict=True)]
                verified = dict(zip(trees, map(Verified, parts, repeat(sent), places, tapped), strict=True))
        self._verified = {slot: tree.whole for slot, tree in trees.items()}
        return verified

    @inference
    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Makes paths of the last verified trees state, by slot: node indices from the root, root included.

        Raises:
            RuntimeError: there are no verified trees.
            ValueError: a path does not follow its tree; nothing is committed then.
        """
        check_paths(paths, self._verified)
        trees, self._verified = self._verified, None
        for slot, path in paths.items():
            self._extend(slot, path, trees[slot])

    # ==== slots ====

    @inference
    def open(self, slots: int, *, capacity: int | None = None, taps: Sequence[int] = (), cache=None) -> None:
        """Starts a batch of empty slots, for texts that come and go: see ExtendedRunner.

        Raises:
            ValueError: slots, taps or the cache do not fit; the batch before is then untouched.
        """
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        taps = check_taps(taps, len(self.weights.layers))
        self._check_cache(cache)
        self._cache = self._verified = None  # the old batch makes room for the new one
        self._taps = taps
        self._cache = self._empty_cache(slots, self.context_length if capacity is None else capacity, cache)

    @inference
    def begin(self, slot: int, tokens: Sequence[int]) -> int:
        """Empties a slot for a text, all but the longest known prefix; returns the tokens that are committed then.

        At least the last token of the text is left to be read or verified.
        """
        self._cache.clear(slot)
        return self._begin(self._cache, slot, tokens)

    @inference
    def read(
        self,
        pieces: Mapping[int, Sequence[int]],
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
    ) -> None:
        """Commits the next tokens of some slots' texts: the bits are those of any other pieces.

        Args:
            pieces: tokens by slot; where blocks pass (see the caches), none reaches behind the end of a block.
            observe: as in prefill.

        Raises:
            RuntimeError: there is no batch.
            ValueError: tokens do not fit, or cannot be quantised.
        """
        chains = {slot: DraftTree.chain(tokens) for slot, tokens in sorted(pieces.items())}
        check_trees(chains, None if self._cache is None else len(self._cache.lengths), self.vocab_size)
        for slot, chain in chains.items():
            self._cache.check_room(slot, len(chain))
        self._verified = None
        for slot, chain, hidden, tapped in self._read_rows(chains, self._cache):
            if observe is not None:
                observe(slot, chain, Verified(self._logits(hidden), taps=tapped))
            self._cache.advance(slot, len(chain))

    def keep_prefixes(self, memory: int) -> None:
        """Keeps beginnings of texts from now on, within so many bytes; 0 keeps none, and frees what was kept.

        Texts that begin alike, of this batch and of later ones, then read that once. Blocks of tokens are copied
        (pyspec.caches.prefixes), the least recently used ones making room.
        """
        if memory != self._prefixes.memory:
            self._prefixes = Prefixes(memory)

    @property
    def prefixes(self) -> Prefixes:
        """What is kept of texts, see keep_prefixes."""
        return self._prefixes

    @property
    def piece_end(self) -> int | None:
        """Tokens of a block whose end no piece of a text should reach behind; None where it may."""
        return self._cache.block if self._keeps_prefixes and self._cache.blocks_pass else None

    @inference
    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Keeps what is committed of a slot's text for others; tokens are the text, which may be longer."""
        self._keep(self._cache, slot, tokens)

    @property
    def _keeps_prefixes(self) -> bool:
        return self._prefixes.memory > 0 and not self._taps  # a text's drafter must see all that its head reads

    def _begin(self, cache, slot: int, tokens: Sequence[int]) -> int:
        return self._prefixes.begin(cache, slot, tokens) if self._keeps_prefixes else 0

    def _keep(self, cache, slot: int, tokens: Sequence[int]) -> None:
        if self._keeps_prefixes:
            self._prefixes.keep(cache, slot, tokens)

    def _check_cache(self, cache) -> None:
        """Raises ValueError unless this model's keys can be kept so."""
        if cache is not None:
            raise ValueError(f"cache must be dense for a {type(self).__name__}, got {cache}")

    def _empty_cache(self, sequences: int, capacity: int, settings):
        """The empty cache of a new batch, as settings have it."""
        return self._new_cache(sequences, capacity)

    def _prefill(
        self,
        prompts: list[list[int]],
        cache,
        observe: Callable[[int, DraftTree, Verified], None] | None,
        *,
        chunk: int = 0,
        at_once: int | None = None,
        share: bool = False,
    ) -> list[Tensor]:
        """Reads checked prompts into an empty cache, which becomes the batch's; the [V] fp32 logits after each.

        Args:
            chunk: tokens of prompts in a call; what this device likes by default.
            at_once: prompts in a call, at most.
            share: what two prompts begin with is read once.
        """
        plan, chunk = PromptPlan(prompts, share=share), chunk or (GRAPH_CHUNK if self._records_graphs else CHUNK)
        last_logits: dict[int, Tensor] = {}
        for sequence, prompt in enumerate(prompts):
            self._begin(cache, sequence, prompt)
        end = cache.block if self._keeps_prefixes and cache.blocks_pass else None
        while pieces := plan.next_pieces(cache.lengths, chunk, at_once or len(prompts), end):
            for sequence, chain, hidden, tapped in self._read_rows(pieces, cache):
                if observe is not None:
                    logits = self._logits(hidden)
                    for reader, count in plan.readers(sequence, cache.lengths[sequence], len(chain)):
                        of_reader = None if tapped is None else tapped[:count]
                        observe(reader, chain.first(count), Verified(logits[:count], taps=of_reader))
                cache.advance(sequence, len(chain))
                if cache.lengths[sequence] == len(prompts[sequence]):
                    last_logits[sequence] = self._logits(hidden[-1:])[0]
                for taker, count in plan.takers(sequence):
                    if cache.lengths[taker] < count <= cache.lengths[sequence]:
                        cache.copy_prefix(sequence, taker, count)
                self._keep(cache, sequence, prompts[sequence])
        self._cache = cache
        return [last_logits[sequence] for sequence in range(len(prompts))]

    def _read_rows(self, pieces: dict[int, DraftTree], cache) -> Iterator[tuple[int, DraftTree, Tensor, Tensor | None]]:
        """Each sequence with its next piece, the rows [T, H] that the layers give for it, and its taps."""
        rows, sizes = self._read(pieces, cache), [len(chain) for chain in pieces.values()]
        hidden, taps = rows.of_trees(rows.hidden).split(sizes), self._tapped(rows, sizes)
        return zip(pieces, pieces.values(), hidden, taps, strict=True)

    def _read(self, pieces: dict[int, DraftTree], cache) -> Rows:
        """What the layers give for each sequence's next piece of its prompt."""
        return self._replays.run(self._step(taps=self._taps), pieces, advances=pieces)

    def _tapped(self, rows: Rows, sizes: Sequence[int]) -> Sequence[Tensor | None]:
        """[T, taps, hidden] fp32 of each tree, copies: the next round's may come to lie there; None if none."""
        if not self._taps:
            return [None] * len(sizes)
        taps = [*rows.taps, rows.hidden.float()] if self._taps[-1] > len(self.weights.layers) else rows.taps
        return torch.stack([rows.of_trees(tap) for tap in taps], 1).split(sizes)

    def _run_layers(self, trees: dict[int, DraftTree]) -> Rows:
        """What the layers give for all nodes of the trees by slot, in ascending order of the slots."""
        return self._replays.run(self._step(taps=self._taps), trees)

    def _step(self, layers: Sequence[int] | None = None, taps: Sequence[int] = ()) -> Step:
        """A forward through all layers, or some."""
        taps = tuple(tap for tap in taps if tap <= len(self.weights.layers))  # what lies behind them comes anyway

        def forward(hidden: Tensor, cache, numbers: Numbers) -> list[Tensor]:
            return self.weights.forward(self.config, hidden, cache, numbers, self.dtype, layers, taps)

        return Step(self._embed, forward, (layers and tuple(layers), taps), self.embeds_by_op)

    def _ropes(self, positions: int) -> list[Rope]:
        """What each layer's heads are turned by at so many positions, or more."""
        if positions > self._rope_positions:
            self._made_ropes, self._rope_positions = self.config.ropes(positions, self.device), positions
        return self._made_ropes

    def _new_replays(self, cache) -> None:
        record = TapeRecorder()
        if self._records_graphs:  # with the weights alone: a runner that its replays knew would stay until collected
            logits = partial(self.weights.logits, self.config)
            record = GraphRecorder(logits, self.vocab_size, self.device)
        self._replays = Replays(cache, record)

    def _new_cache(self, sequences: int, capacity: int):
        """The empty cache of a new batch, the last one's if it fits, with `_replays` for it."""
        raise NotImplementedError  # abstract: each kind of runner has its own

    def _extend(self, sequence: int, path: Sequence[int], tree: DraftTree) -> None:
        """Makes a path of its verified tree state."""
        self._cache.commit(sequence, path)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.weights.embed(self.config, tokens.to(self.device))

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.weights.logits(self.config, hidden)
