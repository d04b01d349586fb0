"""Steps of fixed shape: how a verify runs on a GPU, and the CUDA graphs that replay it.

A step is the model's layers over trees that were all padded to one number of nodes. Whatever a round changes (tokens,
positions, lengths, the tree) is numbers in one buffer on the device, which one copy from pinned memory fills; so the
same launches serve every round, and a graph of them is captured once for each shape and then replayed. Nothing in a
step waits for the device.

Padding costs no bits: rows do not depend on the rows beside them. Padded nodes have no ancestor bits, so they attend
to nothing and nobody attends to them, and their keys all go to the scratch slot behind the tree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache
from pyspec.trees import DraftTree

__all__ = ["BUCKETS", "PROMPT_BUCKETS", "STATIC_CHUNK", "GraphRecorder", "StaticSteps", "StepInputs", "slots_for"]

BUCKETS = (1, 2, 4, 8, 16, 32, 64)  # nodes of a tree with a graph; larger trees run launch by launch
PROMPT_BUCKETS = (128, 256, 512)  # of a piece of a prompt, beside those: `warm` records them for a single sequence
STATIC_CHUNK = PROMPT_BUCKETS[-1]  # tokens of a prompt in a call: weights are read once for them
FEWEST_SLOTS = 1024  # that attention's grid is made for; doubled until the longest sequence fits

Step = Callable[["StepInputs", Tensor], Tensor]
Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def slots_for(capacity: int) -> int:
    """Slots to allocate for a capacity: padding has one too, and a somewhat longer text should fit as well."""
    slots = capacity + 1
    return slots + -slots % FEWEST_SLOTS


def bucket_of(nodes: int) -> int:
    """Nodes of a tree with its padding: a power of two, because every size of ancestor_bits has kernels of its own."""
    return 1 << (nodes - 1).bit_length()


class StepInputs:
    """What a step reads beside weights and cache, as views of one int32 buffer.

    Args:
        sequences, nodes: of the batch, and of each sequence's tree with its padding.
        device: where the step runs.
        pin_memory: for the host's copy of a buffer on a GPU.
    """

    tokens: Tensor  # [sequences, nodes]; 0 in padding, and so are positions
    positions: Tensor  # [sequences, nodes]
    sequences: Tensor  # [sequences, nodes], where in the cache the node's key goes
    slots: Tensor  # [sequences, nodes]; of padding the one behind the tree
    prefix_lens: Tensor  # [sequences]; 0 for a sequence that sits out
    ancestor_bits: Tensor  # [sequences, nodes, ceil(nodes / 32)]; 0 in padding

    def __init__(self, sequences: int, nodes: int, device: torch.device, pin_memory: bool = False):
        self._shape = sequences, nodes
        shapes = dict.fromkeys(("tokens", "positions", "sequences", "slots"), self._shape)
        shapes |= {"prefix_lens": (sequences,), "ancestor_bits": (*self._shape, (nodes + 31) // 32)}
        # each starts at 16 bytes, so that Triton never compiles a kernel a second time for another alignment
        sizes = [math.prod(shape) for shape in shapes.values()]
        aligned = [size + -size % 4 for size in sizes]
        self.buffer = torch.zeros(sum(aligned), dtype=torch.int32, device=device, pin_memory=pin_memory)
        for (name, shape), size, part in zip(shapes.items(), sizes, self.buffer.split(aligned), strict=True):
            setattr(self, name, part[:size].view(shape))

    def fill(self, trees: Sequence[DraftTree | None], lengths: Sequence[int]) -> None:
        """Describes trees behind their sequences' committed lengths; None sits out. Does not wait for the device.

        The host's copy is new each time: torch keeps it until the device has read it.
        """
        host = StepInputs(*self._shape, torch.device("cpu"), pin_memory=self.buffer.is_cuda)
        host.sequences += torch.arange(len(trees), dtype=torch.int32, device="cpu")[:, None]
        each_node = torch.arange(self._shape[1], dtype=torch.int32, device="cpu")
        for index, tree in enumerate(trees):
            if tree is None:
                host.slots[index] = lengths[index]
                continue
            nodes, words = tree.ancestor_bits.shape
            torch.add(each_node.clamp(max=nodes), lengths[index], out=host.slots[index])
            host.tokens[index, :nodes] = tree.tokens
            host.positions[index, :nodes] = tree.depths + lengths[index]
            host.prefix_lens[index] = lengths[index]
            host.ancestor_bits[index, :nodes, :words] = tree.ancestor_bits
        self.buffer.copy_(host.buffer, non_blocking=True)


class StaticSteps:
    """Runs a model's layers over the trees of a batch, with everything that changes on the device.

    A step is a function of (inputs, keys_values [layers, 2, B, kv_heads, S, D]) that gives [B * nodes, hidden] for B
    sequences by launches that take their sizes from shapes alone. It is passed to every call and not kept, because its
    model keeps the steps.

    Args:
        cache: of the batch, with slots_for its capacity. Graphs know its address and serve no other.
        record: makes a function that repeats a step's launches, such as GraphRecorder.
    """

    def __init__(self, cache: DenseCache, record: Recorder):
        self.cache = cache
        self._record = record
        self._inputs: dict[int, StepInputs] = {}  # by nodes
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}  # by nodes and slots

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

    def together(self, step: Step, trees: Sequence[DraftTree | None], record: bool = True) -> Tensor:
        """[R, hidden] of the nodes of all trees, tree after tree, in one replay; None sits out, not all do.

        Trees of more than 64 nodes run one by one, launch by launch, unless their replay was recorded. So do all whose
        was not, without record.
        """
        active = [(sequence, tree) for sequence, tree in enumerate(trees) if tree is not None]
        nodes, lengths = bucket_of(max(len(tree) for _, tree in active)), self.cache.lengths
        ends = [length + (0 if tree is None else len(tree)) for tree, length in zip(trees, lengths, strict=True)]
        slots = self._slots(max(ends) + 1)
        if (nodes, slots) not in self._replays and (nodes > BUCKETS[-1] or not record):
            return torch.cat([self.alone(step, tree, sequence) for sequence, tree in active])
        inputs = self._inputs_of(nodes)
        inputs.fill(trees, lengths)
        # recorded when the inputs are there, so that the keys of the warm-up go where they belong
        hidden = self._replay(step, nodes, slots)().unflatten(0, (len(trees), nodes))
        return torch.cat([hidden[sequence, : len(tree)] for sequence, tree in active])

    def _inputs_of(self, nodes: int) -> StepInputs:
        if nodes not in self._inputs:
            self._inputs[nodes] = StepInputs(self.sequences, nodes, self.cache.keys_values.device)
        return self._inputs[nodes]

    def _replay(self, step: Step, nodes: int, slots: int) -> Callable[[], Tensor]:
        if (nodes, slots) not in self._replays:
            inputs, keys_values = self._inputs_of(nodes), self.cache.keys_values[..., :slots, :]
            self._replays[nodes, slots] = self._record(lambda: step(inputs, keys_values))
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
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Runs the step once, so that its kernels are compiled and loaded, then captures it.

        The function that comes back replays the graph and returns its result, which is always the same memory.
        """
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            result = step()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
