"""The CUDA kernels of the recurrences and of their convolution against the plain-PyTorch references, and for bits
against plain decoding: on a GPU where there is one, else on the CPU through tests/cuda_on_host, behind their own
bindings."""

import copy
import random

import pytest
import torch

from pyspec import DraftTree
from pyspec.ops import Round, causal_conv, gated_delta, selective_state  # noqa: F401, which define the ops
from pyspec.ops.causal_conv import causal_conv_reference
from pyspec.ops.gated_delta import gated_delta_reference
from pyspec.ops.selective_state import selective_state_reference
from tests.helpers.cuda_on_host import fenced_memory, op_on_host
from tests.helpers.on_gpu import assert_close, to_device
from tests.helpers.random_llama import root_path

HAS_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SEQUENCES, NODES = 3, 24
OPS = ("selective_state", "gated_delta", "causal_conv")
# heads, channels of a head (1: Mamba), groups, states
SHAPES = {
    "mamba": (48, 1, 1, 16),
    "mamba, 32 states": (16, 1, 1, 32),
    "mamba2": (2, 64, 1, 128),
    "mamba2, 4 groups": (8, 16, 4, 48),
    "mamba2, 256 states": (1, 16, 1, 256),
}
# heads, values of a head, key heads, keys, whether each key has its own decay
DELTAS = {
    "delta, Qwen3.5": (2, 32, 1, 128, False),
    "delta, Kimi": (2, 16, 2, 128, True),
    "delta, 48 keys": (4, 48, 2, 48, False),
    "delta, heads that take turns": (4, 16, 2, 32, False),
    "delta, 16 keys with decays": (3, 16, 1, 16, True),
    "delta, 80 keys": (1, 32, 1, 80, False),
    "delta, 256 keys": (1, 16, 1, 256, False),
    "delta, 240 keys with decays": (1, 16, 1, 240, True),
}


def kernel_of(name: str):
    """Runs an op's kernel on CPU tensors; the first two arguments are changed in place."""
    if not HAS_GPU:
        return op_on_host(name)[0]

    def call(*arguments):
        moved = [to_device(value, "cuda") if isinstance(value, torch.Tensor) else value for value in arguments]
        out = getattr(torch.ops.pyspec, name).default(*moved).cpu()
        for place, value in zip(arguments[:2], moved[:2], strict=True):
            place.copy_(value)
        return out

    return call


@pytest.fixture
def seed():
    """Sets the order in which blocks and threads run; a GPU has its own."""
    libraries = [] if HAS_GPU else [op_on_host(name)[1] for name in OPS]
    yield lambda value: [library.set(seed=value, blocks_in_flight=1 + value % 3) for library in libraries]
    for library in libraries:
        library.set()


def random_tree(rng: random.Random, size: int) -> DraftTree:
    return DraftTree([0] * size, [-1] + [rng.randrange(max(0, node - 5), node) for node in range(1, size)])


class Recurrence:
    """A layer's arguments; the state and the record are NaN where nobody has been."""

    name, reference = "selective_state", staticmethod(selective_state_reference)

    def __init__(self, shape: str = "mamba2, 4 groups", dtype: torch.dtype = torch.float32, seed: int = 0):
        self.heads, head_dim, self.groups, self.states = SHAPES[shape]
        self.channels, self.dtype = self.heads * head_dim, dtype
        self.generator = torch.Generator().manual_seed(seed)
        sizes = (self.channels // 16, self.states, 16) if head_dim == 1 else (self.heads,)
        self.A = -self.new(*sizes).abs().mul(2).exp()
        self.D = self.new(self.channels) if seed % 2 == 0 else None
        self.bias = self.new(self.heads) if seed % 3 else None
        self.state = torch.full((SEQUENCES, self.channels // 16, self.states, 16), torch.nan)
        width = self.channels + self.heads + self.groups * self.states
        self.record = torch.full((2, SEQUENCES, NODES, width), torch.nan)
        self.has_z = seed % 2 == 1

    def new(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def inputs(self, rows: int) -> list:
        wide = self.new(rows, self.channels + 2 * self.groups * self.states + 3).to(self.dtype)
        x, B, C = (part for part in wide.split([self.channels, *[self.groups * self.states] * 2, 3], 1)[:3])
        dt = self.new(rows, self.heads)
        dt[rows // 2, 0] = 30.0  # beyond where softplus is the identity
        return [x, dt, self.A, B, C, self.D, self.bias, self.new(rows, self.channels) if self.has_z else None]

    @staticmethod
    def rows_of(inputs: list, rows) -> list:
        return [value if i in (2, 5, 6) or value is None else value[rows] for i, value in enumerate(inputs)]


class Delta:
    name, reference = "gated_delta", staticmethod(gated_delta_reference)

    def __init__(self, shape: str = "delta, 48 keys", dtype: torch.dtype = torch.float32, seed: int = 0):
        self.heads, head_dim, self.key_heads, self.keys, per_key = DELTAS[shape]
        self.channels, self.decays = self.heads * head_dim, self.heads * (self.keys if per_key else 1)
        self.dtype, self.strength, self.tiled = dtype, 1.0 + seed % 2, "turns" in shape
        self.generator = torch.Generator().manual_seed(seed)
        self.A = -self.new(self.heads).abs().exp()
        self.bias = self.new(self.decays) if seed % 3 else None
        self.state = torch.full((SEQUENCES, self.channels // 16, self.keys, 16), torch.nan)
        width = self.key_heads * self.keys + self.channels + self.decays
        self.record = torch.full((2, SEQUENCES, NODES, width), torch.nan)

    new = Recurrence.new

    def inputs(self, rows: int) -> list:
        sizes = [self.key_heads * self.keys] * 2 + [self.channels, 3]
        q, k, v, _ = self.new(rows, sum(sizes)).to(self.dtype).split(sizes, 1)
        decay = self.new(rows, self.decays + 1)[:, 1:] - 2
        decay[rows // 2, 0] = 30.0  # beyond where softplus is the identity
        return [q, k, v, decay, self.new(rows, self.heads), self.A, self.bias]

    @staticmethod
    def rows_of(inputs: list, rows) -> list:
        return [value[rows] for value in inputs[:5]] + inputs[5:]


class Convolution:
    name, reference = "causal_conv", staticmethod(causal_conv_reference)

    def __init__(self, shape: str = "", dtype: torch.dtype = torch.float32, seed: int = 0):
        self.generator = torch.Generator().manual_seed(seed)
        self.taps, self.channels, self.dtype = (4, 1, 2, 8)[seed % 4], 144, dtype
        self.weight, self.bias = self.new(self.taps, self.channels), self.new(self.channels) if seed % 3 else None
        self.state = torch.full((SEQUENCES, self.taps - 1, self.channels), torch.nan)
        self.record = torch.full((2, SEQUENCES, NODES, self.channels), torch.nan)

    new = Recurrence.new

    def inputs(self, rows: int) -> list:
        return [self.new(rows, self.channels + 5)[:, :-5], self.weight, self.bias]

    @staticmethod
    def rows_of(inputs: list, rows) -> list:
        return [inputs[0][rows], *inputs[1:]]


def call(function, layer, inputs: list, round: Round, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    options = (layer.strength, layer.tiled) if isinstance(layer, Delta) else ()
    return function(layer.state, layer.record, *inputs, *round.tensors(), *options, dtype)


KINDS = [(Recurrence, shape) for shape in SHAPES] + [(Delta, shape) for shape in DELTAS] + [(Convolution, "")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, shape", KINDS)
def test_rounds_are_those_of_the_reference(kind, shape, dtype, seed):
    """Ragged batches of trees and chains that advance, and paths that are replayed; what is not used stays NaN."""
    rng = random.Random(shape)
    layer, kernel = kind(shape, dtype, rng.randrange(12)), kernel_of(kind.name)
    layer.state[1:] = layer.new(*layer.state[1:].shape)
    paths, halves = [[] for _ in range(SEQUENCES)], [0] * SEQUENCES
    for turn in range(5):
        seed(turn)
        active = rng.sample([1, 2], rng.choice([1, 2, 2]))
        trees = [random_tree(rng, rng.choice([1, 3, 9])) for _ in active]
        advances = [turn == 2 and len(tree) == 1 for tree in trees]
        inputs = layer.inputs(sum(map(len, trees)))
        of_active = [[values[b] for b in active] for values in (paths, halves)]
        round = Round.of(trees, active, *of_active, advances=advances)
        before = layer.state.clone(), layer.record.clone()
        copies = copy.copy(layer)
        copies.state, copies.record = before
        expected = call(kind.reference, copies, inputs, round, dtype)
        out = call(kernel, layer, inputs, round, dtype)
        close = {"atol": TOLERANCE[dtype] * max(1.0, float(expected.float().abs().max())), "rtol": TOLERANCE[dtype]}
        assert_close(out, expected, **close)
        for place, other in zip((layer.state, layer.record), before, strict=True):
            assert torch.equal(place.isnan(), other.isnan())
            assert_close(place, other, atol=2e-5, rtol=2e-5, equal_nan=True)
        for b, tree, advance in zip(active, trees, advances, strict=True):
            paths[b] = [] if advance else root_path(tree, rng.randrange(len(tree)))
            halves[b] = halves[b] if advance else 1 - halves[b]
    assert layer.state[0].isnan().all() and layer.record[:, 0].isnan().all()


@pytest.mark.parametrize("kind, shape", KINDS)
def test_trees_and_chains_have_the_bits_of_plain_decoding(kind, shape, seed):
    """Of a tree with more branches than states are kept of, some paths, and what they are replayed to."""
    rng = random.Random(1)
    layer, kernel = kind(shape, seed=4), kernel_of(kind.name)
    layer.state[2] = layer.new(*layer.state[2].shape)
    start, tree = layer.state.clone(), random_tree(rng, NODES)
    inputs = layer.inputs(NODES)
    seed(3)
    out = call(kernel, layer, inputs, Round.of([tree], [2], [[]], [1]))
    assert torch.equal(layer.state[2], start[2])
    seed(0)
    for node in (NODES - 1, NODES // 2, 5):
        path = root_path(tree, node)
        layer.state.copy_(start)
        rows = []
        for row in path:  # one at a time, each advancing
            one = Round.of([DraftTree.chain([0])], [2], [[]], [0], advances=True)
            rows.append(call(kernel, layer, kind.rows_of(inputs, [row]), one))
        assert torch.equal(torch.cat(rows), out[path])
        plain = layer.state[2].clone()

        layer.state.copy_(start)
        probe = layer.inputs(2)
        call(kernel, layer, inputs, Round.of([tree], [2], [[]], [1]))
        replayed = call(kernel, layer, probe, Round.of([DraftTree.chain([0] * 2)], [2], [path], [0]))
        assert torch.equal(layer.state[2], plain)
        behind = Round.of([DraftTree.chain([0] * 2)], [2], [[]], [0])
        assert torch.equal(call(kernel, layer, probe, behind), replayed)


@pytest.mark.parametrize("kind", [Recurrence, Delta, Convolution])
def test_a_tree_that_does_not_fit_changes_nothing(kind):
    layer, kernel = kind(), kernel_of(kind.name)
    layer.state[:] = layer.new(*layer.state.shape)
    layer.record[:] = 1.0
    inputs, good = layer.inputs(3), Round.of([DraftTree.chain([0] * 3)], [1], [[0, 1]], [0])
    before = layer.state.clone(), layer.record.clone()
    for name, value in (
        ("sequences", [SEQUENCES]),
        ("sequences", [-1]),
        ("starts", [0, 4]),
        ("starts", [-1, 2]),
        ("parents", [-1, 1, 0]),
        ("parents", [-1, -1, 0]),
        ("paths", [[0, NODES]]),
        ("halves", [2]),
    ):
        tensors = dict(zip(Round.__dataclass_fields__, good.tensors(), strict=True))
        call(kernel, layer, inputs, Round(**tensors | {name: torch.tensor(value, dtype=torch.int32)}))
        assert torch.equal(layer.state, before[0]) and torch.equal(layer.record, before[1]), name
    call(kernel, layer, inputs, good)
    assert not torch.equal(layer.record, before[1])


@pytest.mark.skipif(HAS_GPU, reason="the CPU's memory is watched")
@pytest.mark.parametrize("kind, shape", KINDS)
def test_nothing_outside_is_touched(kind, shape):
    layer, kernel = kind(shape), kernel_of(kind.name)
    fronts = []

    def fenced(tensor):
        if tensor is None or not tensor.numel():
            return tensor
        memory, front = fenced_memory(tensor.numel() * tensor.element_size())
        fronts.append(front)
        return memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)

    layer.state[:], layer.record[:] = 0.0, 0.0
    layer.state, layer.record = fenced(layer.state), fenced(layer.record)
    inputs = [fenced(value) for value in layer.inputs(NODES + 2)]
    tree = random_tree(random.Random(0), NODES)
    round = Round.of([tree, DraftTree.chain([0] * 2)], [2, 0], [[0, 3, NODES - 1], []], [1, 0])
    round = Round(*(fenced(value) for value in round.tensors()))
    assert call(kernel, layer, inputs, round).isfinite().all()
    assert all((front == 0xA7).all() for front in fronts)


def test_too_many_states_are_refused():
    layer, kernel = Recurrence(), kernel_of("selective_state")
    state, record = torch.zeros(1, 1, 272, 16), torch.zeros(2, 1, 4, 16 + 1 + 272)
    inputs = [torch.zeros(1, 16), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1, 272), torch.zeros(1, 272)]
    round = Round.of([DraftTree.chain([0])], [0], [[]], [0])
    with pytest.raises(RuntimeError, match="state must have at most 256 states"):
        kernel(state, record, *inputs, None, None, None, *round.tensors(), layer.dtype)
