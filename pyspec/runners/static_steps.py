"""Steps of fixed shape: how a verify runs on a GPU, and the CUDA graphs that replay it.

A step is the model's layers over trees that were all padded to one number of nodes, and behind them the head. Whatever
a round changes (tokens, positions, lengths, the tree) is numbers in one buffer on the device, which one copy from
pinned memory fills; so the same launches serve every round, and a graph of them is captured once for each shape and
then replayed. Nothing in a step waits for the device.

Padding costs no bits: rows do not depend on the rows beside them. Padded nodes have no ancestor bits, so they attend
to nothing and nobody attends to them, and their keys all go to the scratch slot behind the tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache
from pyspec.ops.linear import PackedWeight, linear
from pyspec.runners.static_inputs import StaticInputs
from pyspec.runners.verified import pack_statistics
from pyspec.tree import DraftTree

__all__ = [
    "BUCKETS",
    "PROMPT_BUCKETS",
    "STATIC_CHUNK",
    "GraphRecorder",
    "GraphedHead",
    "Rows",
    "StaticSteps",
    "StepInputs",
    "slots_for",
]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # nodes of a tree with a graph; larger trees run launch by launch
PROMPT_BUCKETS = (128, 256, 512)  # of a piece of a prompt, beside those: `warm` records them for a single sequence
STATIC_CHUNK = PROMPT_BUCKETS[-1]  # tokens of a prompt in a call: weights are read once for them
FEWEST_SLOTS = 1024  # that attention's grid is made for; doubled until the longest sequence fits

Step = Callable[["StepInputs", Tensor], Tensor]
Recorder = Callable[[Callable[[], "Rows"]], Callable[[], "Rows"]]


def slots_for(capacity: int) -> int:
    """Slots to allocate for a capacity: padding has one too, and a somewhat longer text should fit as well."""
    slots = capacity + 1
    return slots + -slots % FEWEST_SLOTS


def bucket_of(nodes: int) -> int:
    """Nodes of a tree with its padding: a power of two, because every size of ancestor_bits has kernels of its own."""
    return 1 << (nodes - 1).bit_length()


class StepInputs(StaticInputs):
    """What a step reads beside weights and cache.

    Args:
        count, nodes: sequences of the batch, and nodes of each one's tree with its padding.
        device: where the step runs.
    """

    tokens: Tensor  # [sequences, nodes]; 0 in padding, and so are positions
    positions: Tensor  # [sequences, nodes]
    sequences: Tensor  # [sequences, nodes], where in the cache the node's key goes
    slots: Tensor  # [sequences, nodes]; of padding the one behind the tree
    prefix_lens: Tensor  # [sequences]; 0 for a sequence that sits out
    ancestor_bits: Tensor  # [sequences, nodes, ceil(nodes / 32)]; 0 in padding

    def __init__(self, count: int, nodes: int, device: torch.device):
        shapes = dict.fromkeys(("tokens", "positions", "sequences", "slots"), (count, nodes))
        super().__init__(device, **shapes, prefix_lens=(count,), ancestor_bits=(count, nodes, (nodes + 31) // 32))
        self._each_node = np.arange(nodes, dtype=np.int32)

    def fill(self, trees: Sequence[DraftTree | None], lengths: Sequence[int]) -> None:
        """Describes trees behind their sequences' committed lengths; None sits out. Does not wait for the device."""
        host = self.host()
        tokens, positions, sequences, slots, prefix_lens, ancestor_bits = host.values()
        for index, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
            sequences[index] = index
            if tree is None:
                slots[index] = length
                continue
            nodes, words = tree.ancestor_bits.shape
            np.add(np.minimum(self._each_node, nodes), length, out=slots[index])
            tokens[index, :nodes] = tree.tokens
            np.add(tree.depths, length, out=positions[index, :nodes])
            prefix_lens[index] = length
            ancestor_bits[index, :nodes, :words] = tree.ancestor_bits
        self.send()


class Rows(NamedTuple):
    """What the layers give: rows of some trees, perhaps among others. A replay's lie where the next one's will."""

    hidden: Tensor  # [rows, hidden], after the last norm
    logits: Tensor | None = None  # [rows, V] fp32, where the head is in the graph
    statistics: Tensor | None = None  # of logits, see pyspec.runners.verified.pack_statistics
    places: Sequence[slice] | None = None  # of the trees' rows, ascending; None if there are no others

    def of_trees(self, values: Tensor) -> Tensor:
        """The trees' rows of hidden or logits, tree after tree; a copy if there are others."""
        if self.places is None:
            return values
        first, end = self.places[0].start, self.places[-1].stop
        if end - first == sum(place.stop - place.start for place in self.places):
            return values[first:end].clone()
        return torch.cat([values[place] for place in self.places])


class GraphedHead:
    """The end of a graph: logits of its rows, and what the host reads of them.

    Graphs of up to 64 rows have it. Their logits are copied to one place, so that each needs the memory for its own
    while it runs only. For more rows the head is launched, which takes less time than they do, and less memory.
    """

    def __init__(self, weight: PackedWeight):
        self._weight = weight
        self._logits = torch.empty(BUCKETS[-1], weight.outputs, dtype=torch.float32, device=weight.data.device)

    def __call__(self, hidden: Tensor) -> Rows:
        if len(hidden) > len(self._logits):
            return Rows(hidden)
        logits = linear(hidden, self._weight, out_dtype=torch.float32)
        statistics = pack_statistics(logits)
        return Rows(hidden, self._logits[: len(hidden)].copy_(logits), statistics)


class StaticSteps:
    """Runs a model's layers over the trees of a batch, with everything that changes on the device.

    A step is a function of (inputs, keys_values [layers, 2, B, kv_heads, S, D]) that gives [B * nodes, hidden] for B
    sequences by launches that take their sizes from shapes alone. It is passed to every call and not kept, because its
    model keeps the steps.

    Args:
        cache: of the batch, with slots_for its capacity. Graphs know its address and serve no other.
        record: makes a function that repeats a step's launches, such as GraphRecorder.
        head: what a recorded step ends with.
    """

    def __init__(self, cache: DenseCache, record: Recorder, head: GraphedHead):
        self.cache = cache
        self._record = record
        self._head = head
        self._inputs: dict[int, StepInputs] = {}  # by nodes
        self._replays: dict[tuple[int, int], Callable[[], Rows]] = {}  # by nodes and slots

    @property
    def sequences(self) -> int:
        return self.cache.keys_values.shape[2]

    @property
    def slots(self) -> int:
        """That are allocated for a sequence."""
        return self.cache.keys_values.shape[4]

    def fits(self, sequences: int, capacity: int) -> bool:
        """Whether the cache can serve a batch of this size."""
        return self.sequences == sequences and self.slots > capacity

    def warm(self, step: Step, capacity: int) -> None:
        """Records all that trees of up to 64 nodes in texts up to a capacity, and a single prompt, will replay.

        Writes to the first slots: there must be no text yet.
        """
        sizes = [self._slots(1)]
        while sizes[-1] <= capacity:
            sizes.append(self._slots(sizes[-1] + 1))
        buckets = [*BUCKETS, *(PROMPT_BUCKETS if self.sequences == 1 else ())]
        for nodes in reversed(buckets):  # the largest first: the others find room in the memory that it needs
            if nodes // 2 < capacity:  # else a smaller bucket holds any tree that fits
                self._inputs_of(nodes).fill([None] * self.sequences, [0] * self.sequences)
                for slots in reversed(sizes):
                    self._replay(step, nodes, slots)

    def alone(self, step: Step, tree: DraftTree, sequence: int) -> Tensor:
        """[T, hidden] of one tree of any size behind one sequence, launch by launch."""
        length = self.cache.lengths[sequence]
        inputs = StepInputs(1, bucket_of(len(tree)), self.cache.keys_values.device)
        inputs.fill([tree], [length])
        of_sequence = self.cache.keys_values[:, :, sequence : sequence + 1]
        return step(inputs, of_sequence[..., : self._slots(length + len(tree) + 1), :])[: len(tree)]

    def together(self, step: Step, trees: Sequence[DraftTree | None], record: bool = True) -> Rows:
        """What the layers give for the nodes of all trees, in one replay; None sits out, not all do.

        Trees of more than 64 nodes run one by one, launch by launch, unless their replay was recorded. So do all whose
        was not, without record.
        """
        active = [(sequence, tree) for sequence, tree in enumerate(trees) if tree is not None]
        nodes, lengths = bucket_of(max(len(tree) for _, tree in active)), self.cache.lengths
        ends = [length + (0 if tree is None else len(tree)) for tree, length in zip(trees, lengths, strict=True)]
        slots = self._slots(max(ends) + 1)
        if (nodes, slots) not in self._replays and (nodes > BUCKETS[-1] or not record):
            return Rows(torch.cat([self.alone(step, tree, sequence) for sequence, tree in active]))
        inputs = self._inputs_of(nodes)
        inputs.fill(trees, lengths)
        # recorded when the inputs are there, so that the keys of the warm-up go where they belong
        rows = self._replay(step, nodes, slots)()
        return rows._replace(places=[slice(row * nodes, row * nodes + len(tree)) for row, tree in active])

    def _inputs_of(self, nodes: int) -> StepInputs:
        if nodes not in self._inputs:
            self._inputs[nodes] = StepInputs(self.sequences, nodes, self.cache.keys_values.device)
        return self._inputs[nodes]

    def _replay(self, step: Step, nodes: int, slots: int) -> Callable[[], Rows]:
        if (nodes, slots) not in self._replays:
            inputs, keys_values = self._inputs_of(nodes), self.cache.keys_values[..., :slots, :]
            self._replays[nodes, slots] = self._record(lambda: self._head(step(inputs, keys_values)))
        return self._replays[nodes, slots]

    def _slots(self, needed: int) -> int:
        """Slots that attention is launched for: few sizes, because each is a graph, but not those of a long cache."""
        slots = FEWEST_SLOTS
        while slots < needed:
            slots *= 2
        return min(slots, self.slots)


class GraphRecorder:
    """Records steps as CUDA graphs that share one pool of memory.

    They may share it because what a graph leaves there is copied before the next one is replayed.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device)  # one, for memory of the pool goes from graph to graph of a stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Rows]) -> Callable[[], Rows]:
        """Runs the step once, so that its kernels are compiled and loaded, then captures it.

        The function that comes back replays the graph and returns its result, which is always the same memory.
        """
        callers = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(callers)
        with torch.cuda.stream(self._stream):
            step()
        callers.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = step()

        def replay() -> Rows:
            graph.replay()
            return result

        return replay
