"""What benchmarks do to a runner on our own kernels that its public calls do not offer, all of it in this file.

Who changes the insides of those runners changes this file, and no benchmark. `runner.cache`, the keys and values or
the states of the batch, is public.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from pyspec.architectures import weights
from pyspec.runners.numbers import Numbers
from pyspec.runners.replay import GRAPH_CHUNK, Shape, launch_by_launch
from pyspec.runners.tape import Tape
from pyspec.tree import DraftTree


def weight_bytes(runner) -> int:
    """Bytes of weights that a step reads: the matrices of all layers, and the head."""
    layers = runner.weights.layers
    return sum(getattr(layer, name).nbytes for layer in layers for name in layer.MATRICES) + runner.weights.head.nbytes


@torch.inference_mode()
def read(
    runner, trees: Sequence[DraftTree], sequences: Sequence[int], advances: Sequence[bool], logits: bool = True
) -> Tensor:
    """Logits [R, V] fp32, or hidden rows [R, hidden], of the nodes of all trees by a runner with a recurrent state.

    Args:
        sequences: the one that each tree stands behind.
        advances: whether its state moves behind the tree, a chain, at once and without a commit.
        logits: whether to compute them.
    """
    moving = [sequence for sequence, moves in zip(sequences, advances, strict=True) if moves]
    rows = runner._replays.run(runner._step(), dict(zip(sequences, trees, strict=True)), advances=moving)
    if not logits:
        return rows.of_trees(rows.hidden)
    return runner._logits(rows.of_trees(rows.hidden)) if rows.logits is None else rows.of_trees(rows.logits)


def launched(runner, tree: DraftTree) -> Callable[[], None]:
    """A call that verifies a tree of the first sequence launch by launch, without what was recorded."""

    def call() -> None:
        with launch_by_launch():
            runner.verify({0: tree})

    return call


@torch.inference_mode()
def record_prompt(runner, tokens: int) -> None:
    """Records what `warm` would for one prompt of so many tokens in whole pieces, and nothing else; the batch is lost.

    It is for a runner on a GPU whose cache, without recurrent states, has room for them.
    """
    replays = runner._replays
    runner.prefill([[0]], capacity=tokens)
    for end in range(GRAPH_CHUNK, tokens + 1, GRAPH_CHUNK):
        shape = Shape(GRAPH_CHUNK, GRAPH_CHUNK, (GRAPH_CHUNK + 31) // 32, replays.cache.extents(end)[0])
        replays._replay(runner._step(), shape)


@torch.inference_mode()
def seconds_of_recording(runner, tree: DraftTree) -> float:
    """Seconds that the tape of a verify of the first sequence's tree takes to be recorded again, and is not run."""
    replays, step = runner._replays, runner._step()
    filled = {"plan": replays._plan({0: tree}, ()), "blocks": replays.cache.blocks, "advances": ()}
    shape = replays._shape({0: tree})
    replays._replays.pop((shape, step.key), None)
    start = time.perf_counter()
    replays._replay(step, shape, {0: tree}, filled)
    return time.perf_counter() - start


@torch.inference_mode()
def attend_step(runner, token: int, place: int, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits [V] fp32 after a token at a place of the first sequence, with an attention of the caller's.

    Its keys and values go into the dense cache, at its place.

    Args:
        attend: (layer, q [Hq, D], k [Hkv, place + 1, D], v like k) gives [Hq, D]; the query's own key is the last.
    """
    cache, numbers = runner.cache.view([0], place + 1), Numbers([0], 1, 1, 0, runner.device)
    numbers.fill({0: DraftTree.chain([token])}, [place], [0])
    cache.attend = lambda layer, q, *rest, **settings: attend(layer, q[0], *cache.keys_values[layer, :, 0])[None]
    hidden, *_ = runner.weights.forward(runner.config, runner._embed(numbers.tokens), cache, numbers, runner.dtype)
    return runner._logits(hidden)[0]


@contextmanager
def seconds_in_ops() -> Iterator[Callable[[], float]]:
    """What it gives tells the seconds so far that runners on the CPU have spent inside of ops."""
    inside = 0.0

    def timed(op: Callable) -> Callable:
        def call(*args, **settings):
            nonlocal inside
            start = time.perf_counter()
            result = op(*args, **settings)
            inside += time.perf_counter() - start
            return result

        return call

    with (
        mock.patch.object(Tape, "run", timed(Tape.run)),
        mock.patch.object(weights, "linear", timed(weights.linear)),
    ):
        yield lambda: inside
