"""Replay: a forward is recorded once for each shape, and run again with new numbers.

The layers are launches whose sizes come from shapes alone. Whatever a round changes lies in one buffer of fixed address
(`Numbers`), so what was launched for one round serves all of its shape: on a CPU as a tape, on a GPU as a graph.

A tape is recorded for exactly the rows that a round has. A graph is for a few sizes, and rounds are padded to the next:
with attention every tree, where padded nodes have no ancestors, so that they attend to nothing and nobody attends to
them, and their keys all go to the scratch slot behind the tree; with a recurrence alone only what follows the last
tree, which belongs to nobody. A sequence that sits out has a tree without nodes and a path without any. Padding costs
no bits: rows do not depend on the rows beside them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from pyspec.runners.numbers import Numbers
from pyspec.runners.tape import Arena, Tape, can_record
from pyspec.runners.verified import pack_statistics
from pyspec.tree import DraftTree

__all__ = [
    "BUCKETS",
    "GRAPH_CHUNK",
    "GraphRecorder",
    "Replays",
    "Rows",
    "TapeRecorder",
    "launch_by_launch",
]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # nodes of a tree with a graph; larger trees run launch by launch
PROMPT_BUCKETS = (128, 256, 512)  # of a piece of a prompt, beside those: `warm` records them for a single sequence
GRAPH_CHUNK = PROMPT_BUCKETS[-1]  # tokens of a prompt in a call: weights are read once for them
MOST_TAPES = 64  # of one batch: those that were used last


_launched = False


@contextmanager
def launch_by_launch() -> Iterator[None]:
    """Nothing is recorded or replayed in this context: every round calls its ops one by one, to the same bits."""
    global _launched
    before, _launched = _launched, True
    try:
        yield
    finally:
        _launched = before


class Rows(NamedTuple):
    """What the layers give: rows of some trees, perhaps among others. A replay's lie where the next one's will."""

    hidden: Tensor  # [rows, hidden], after the last norm
    logits: Tensor | None = None  # [rows, V] fp32, where the head is in the graph
    statistics: Tensor | None = None  # of logits, see pyspec.runners.verified.pack_statistics
    places: Sequence[slice] | None = None  # of the trees' rows, ascending; None if there are no others
    taps: Sequence[Tensor] = ()  # [rows, hidden] fp32 each

    def of_trees(self, values: Tensor) -> Tensor:
        """The trees' rows of hidden or logits, tree after tree; a copy if there are others."""
        if self.places is None:
            return values
        first, end = self.places[0].start, self.places[-1].stop
        if end - first == sum(place.stop - place.start for place in self.places):
            return values[first:end].clone()
        return torch.cat([values[place] for place in self.places])


class Step(NamedTuple):
    """A forward over a round's trees: embedded [rows, H] fp32 are used up; normed [rows, H] come back, then taps."""

    embed: Callable[[Tensor], Tensor]
    layers: Callable[[Tensor, object, Numbers], list[Tensor]]  # of embedded rows, a cache and the round's numbers
    key: tuple = ()  # tells steps apart that share a cache
    embeds_by_op: bool = False  # whether embed is an op, which is recorded with the layers

    def __call__(self, cache, numbers: Numbers) -> list[Tensor]:
        return self.layers(self.embed(numbers.tokens), cache, numbers)


class Recorder(Protocol):
    """Makes a function that repeats a step's launches."""

    is_graph: bool

    def __call__(self, step: Step, cache, numbers: Numbers) -> Callable[[], Rows]: ...


class Shape(NamedTuple):
    """What launches take their sizes from. A GPU has few, because each is a graph."""

    rows: int
    padded: int  # rows of each tree, padding included; 0: rows follow each other
    words: int  # of a row's ancestor bits
    extent: int | None  # what attention is launched for, where trees are padded: see the caches


class Replays:
    """Runs a model's layers over the trees of a batch, recorded where that pays.

    A step is passed to every call and not kept, because its model keeps the replays.

    Args:
        cache: of the batch. What is recorded knows its address and serves no other.
        record: makes a function that repeats a step's launches.
    """

    def __init__(self, cache, record: Recorder):
        self.cache = cache
        self._record = record
        self._memory = cache.memory
        self._replays: OrderedDict[tuple, tuple[Numbers, Callable[[], Rows]]] = OrderedDict()

    def warm(self, step: Step, capacity: int) -> None:
        """Records all graphs that trees of up to 64 nodes in texts up to a capacity, and a single prompt, will replay.

        Writes to the first slots: there must be no text yet.
        """
        self._plan({0: DraftTree.chain([0] * BUCKETS[-1])}, ())  # which makes the room
        for shape in self._all_shapes(capacity):
            self._replay(step, shape)

    def run(self, step: Step, trees: Mapping[int, DraftTree], advances: Collection[int] = ()) -> Rows:
        """What the layers give for the nodes of all trees, at least one, by sequence in ascending order.

        Args:
            advances: the sequences whose tree is a chain that is accepted as a whole, such as a piece of a prompt.
        """
        cache, plan = self.cache, self._plan(trees, advances)
        shape, filled = (
            self._shape(trees),
            {"plan": plan, "blocks": cache.blocks, "angles": cache.angles, "advances": advances},
        )
        if self._is_launched(shape, step.key, advances):
            rows = self._by_launch(step, trees, shape, filled)
        else:
            numbers, replay = self._replay(step, shape, trees, filled)
            numbers.fill(trees, cache.lengths, cache.starts, padded=shape.padded, **filled)
            rows = replay()._replace(places=_places(trees, cache, shape.padded) if self._record.is_graph else None)
        cache.done(trees, advances)
        return rows

    @property
    def are_tapes(self) -> bool:
        """Whether steps are recorded as tapes now."""
        return not _launched and not self._record.is_graph and _is_taped(self.cache)

    @property
    def arena(self) -> int:
        """The address of the memory that tapes need while they run; another one after more are recorded."""
        return self._record.arena.address

    def tape(self, step: Step, rows: int, words: int) -> tuple[Numbers, TapeReplay]:
        """The tape of a step for so many rows, to be run by others, and the numbers that it reads."""
        numbers, nothing = self._numbers(range(self._sequences), rows, words), [0] * self._sequences
        numbers.fill({0: DraftTree.chain([0] * rows)}, nothing, nothing)  # something that ops take
        return numbers, self._record(step, self.cache.view(range(self._sequences), None), numbers)

    def _plan(self, trees: Mapping[int, DraftTree], advances: Collection[int]):
        """The cache's plan of a round. Where it has made room, what knew the old addresses is dropped."""
        plan = self.cache.plan(trees, advances)
        if self.cache.memory != self._memory:
            self._memory = self.cache.memory
            self._replays.clear()
        return plan

    def _is_launched(self, shape: Shape, key, advances: Collection[int]) -> bool:
        """Whether a round runs launch by launch: a graph of it is not there and would serve no other."""
        cache = self.cache
        if _launched or not self._record.is_graph:
            return _launched or not _is_taped(cache)
        if cache.has_keys and cache.has_states and self._sequences > 1:
            return True  # padding between trees is nothing that a recurrence can pass over
        is_large = shape.padded > BUCKETS[-1] if shape.padded else shape.rows > GRAPH_CHUNK
        return (shape, key) not in self._replays and (is_large or bool(advances))

    def _by_launch(self, step: Step, trees: Mapping[int, DraftTree], shape: Shape, filled: dict) -> Rows:
        cache = self.cache
        if not (self._record.is_graph and cache.has_keys):
            rows = shape.rows if shape.padded else sum(map(len, trees.values()))
            numbers = self._numbers(range(self._sequences), rows, shape.words)
            numbers.fill(trees, cache.lengths, cache.starts, padded=shape.padded, **filled)
            places = _places(trees, cache, shape.padded) if shape.padded else None
            return _rows(step(cache, numbers))._replace(places=places)
        parts = []  # one by one: with a size for all, one large tree would be padding for the others
        for sequence, tree in trees.items():
            padded = _bucket_of(len(tree))
            numbers = self._numbers([sequence], padded, (padded + 31) // 32)
            numbers.fill({sequence: tree}, cache.lengths, cache.starts, padded=padded, **filled)
            view = cache.view([sequence], cache.extent([sequence], trees))
            parts.append([found[: len(tree)] for found in step(view, numbers)])
        return _rows([torch.cat(part) for part in zip(*parts, strict=True)])

    def _replay(self, step: Step, shape: Shape, trees=(), filled=None) -> tuple[Numbers, Callable[[], Rows]]:
        key = (shape, step.key)
        if key in self._replays:
            if not self._record.is_graph:
                self._replays.move_to_end(key)
            return self._replays[key]
        cache = self.cache
        numbers = self._numbers(range(self._sequences), shape.rows, shape.words)
        if self._record.is_graph:  # which runs the step too: with nobody in it, or a path would be replayed twice
            numbers.fill({}, cache.lengths, cache.starts, padded=shape.padded, blocks=cache.blocks)
        else:
            numbers.fill(trees, cache.lengths, cache.starts, **filled)
            if len(self._replays) == MOST_TAPES:
                self._replays.popitem(last=False)
        view = cache.view(range(self._sequences), shape.extent)
        self._replays[key] = numbers, self._record(step, view, numbers)
        return self._replays[key]

    @property
    def _sequences(self) -> int:
        return len(self.cache.lengths)

    def _numbers(self, sequences: Sequence[int], rows: int, words: int) -> Numbers:
        return Numbers(sequences, rows, words, self.cache.longest_path, self.cache.device)

    def _shape(self, trees: Mapping[int, DraftTree]) -> Shape:
        rows, words = sum(map(len, trees.values())), max(tree.ancestor_bits.shape[1] for tree in trees.values())
        if not self._record.is_graph and not (self.cache.has_keys and self.cache.device.type == "cuda"):
            return Shape(rows, 0, max(words, (rows + 31) // 32), None)
        if not self.cache.has_keys:
            return Shape(_bucket_of(rows), 0, max(words, (_bucket_of(rows) + 31) // 32), None)
        nodes = _bucket_of(max(map(len, trees.values())))
        extent = self.cache.extent(range(self._sequences), trees) if self._record.is_graph else None
        return Shape(nodes * self._sequences, nodes, max(words, (nodes + 31) // 32), extent)

    def _all_shapes(self, capacity: int) -> list[Shape]:
        """Of graphs, the largest first: the others find room in the memory that it needs."""
        prompts = PROMPT_BUCKETS if self._sequences == 1 or not self.cache.has_keys else ()
        buckets = [*reversed(prompts), *reversed(BUCKETS)]
        if not self.cache.has_keys:
            return [Shape(rows, 0, (rows + 31) // 32, None) for rows in buckets]
        fitting = [nodes for nodes in buckets if nodes // 2 < capacity]  # else a smaller one holds any tree that fits
        extents = self.cache.extents(capacity)
        return [
            Shape(nodes * self._sequences, nodes, (nodes + 31) // 32, extent) for nodes in fitting for extent in extents
        ]


class TapeRecorder:
    """Records steps as tapes on a CPU, which share one arena. What embeds by no op stays outside of it."""

    is_graph = False

    def __init__(self):
        self.arena = Arena()

    def __call__(self, step: Step, cache, numbers: Numbers) -> TapeReplay:
        if step.embeds_by_op:
            return TapeReplay(Tape(lambda: step(cache, numbers), self.arena), lambda: None)
        hidden = step.embed(numbers.tokens)
        tape = Tape(lambda: step.layers(hidden, cache, numbers), self.arena)
        return TapeReplay(tape, lambda: hidden.copy_(step.embed(numbers.tokens)))


class TapeReplay(NamedTuple):
    """A step that was recorded as a tape."""

    tape: Tape
    embed: Callable[[], object]  # what comes before it

    def __call__(self) -> Rows:
        self.embed()
        return _rows(self.tape.run())


class GraphRecorder:
    """Records steps, with the head behind them, as CUDA graphs that share one pool of memory.

    They may share it because what a graph leaves there is copied before the next one is replayed.
    """

    is_graph = True

    def __init__(self, logits: Callable[[Tensor], Tensor], vocab_size: int, device: torch.device):
        self._head = _GraphedHead(logits, vocab_size, device)
        self._stream = torch.cuda.Stream(device)  # one, for memory of the pool goes from graph to graph of a stream
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def __call__(self, step: Step, cache, numbers: Numbers) -> Callable[[], Rows]:
        """Runs the step once, so that its kernels are compiled and loaded, then captures it.

        The function that comes back replays the graph and returns its result, which is always the same memory.
        """
        callers = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            self._head(*step(cache, numbers))
        callers.wait_stream(self._stream)
        if not self._graphs:  # a pool dies with the last of its graphs, and takes no others then
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = self._head(*step(cache, numbers))
        self._graphs.add(graph)

        def replay() -> Rows:
            graph.replay()
            return result

        return replay


class _GraphedHead:
    """The end of a graph: logits of its rows, and what the host reads of them.

    Graphs of up to 64 rows have it. Their logits are copied to one place, so that each needs the memory for its own
    while it runs only. For more rows the head is launched, which takes less time than they do, and less memory.
    """

    def __init__(self, logits: Callable[[Tensor], Tensor], vocab_size: int, device: torch.device):
        self._logits_of = logits
        self._logits = torch.empty(BUCKETS[-1], vocab_size, dtype=torch.float32, device=device)

    def __call__(self, hidden: Tensor, *taps: Tensor) -> Rows:
        if len(hidden) > len(self._logits):
            return Rows(hidden, taps=taps)
        logits = self._logits_of(hidden)
        statistics = pack_statistics(logits)
        return Rows(hidden, self._logits[: len(hidden)].copy_(logits), statistics, taps=taps)


def _is_taped(cache) -> bool:
    """Whether steps over a cache may be recorded as tapes."""
    return cache.device.type == "cpu" and cache.is_recordable and can_record()


def _rows(found: Sequence[Tensor]) -> Rows:
    """What a step gave."""
    return Rows(found[0], taps=found[1:])


def _bucket_of(nodes: int) -> int:
    """Nodes of a tree with its padding: a power of two, because every size of ancestor_bits has kernels of its own."""
    return 1 << (nodes - 1).bit_length()


def _places(trees: Mapping[int, DraftTree], cache, padded: int) -> list[slice]:
    """The trees' rows among all."""
    if padded:
        return [slice(padded * sequence, padded * sequence + len(tree)) for sequence, tree in trees.items()]
    ends = accumulate(map(len, trees.values()))
    return [slice(end - len(tree), end) for tree, end in zip(trees.values(), ends, strict=True)]
