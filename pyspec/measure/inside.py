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

from pyspec.ops.llama_layers import layers_by_ops
from pyspec.runners import attention, native
from pyspec.tree import DraftTree

__all__ = ["attend_step", "launched", "read", "seconds_in_ops", "weight_bytes"]


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
    rows = runner._forward(list(trees), list(sequences), list(advances), runner.cache)
    if not logits:
        return rows.of_trees(rows.hidden)
    return runner._logits(rows.of_trees(rows.hidden)) if rows.logits is None else rows.of_trees(rows.logits)


def launched(runner, tree: DraftTree) -> Callable[[], None]:
    """A call that verifies a tree of the first sequence on a GPU launch by launch, without the graph."""

    @torch.inference_mode()
    def call() -> None:
        runner._logits(runner._steps.alone(runner._step, tree, 0))

    return call


@torch.inference_mode()
def attend_step(runner, token: int, place: int, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Logits [V] fp32 after a token at a place of the first sequence, with an attention of the caller's.

    Its keys and values go into the dense cache, at its place.

    Args:
        attend: (layer, q [Hq, D], k [Hkv, place + 1, D], v like k) gives [Hq, D]; the query's own key is the last.
    """
    at, config = torch.tensor([place], dtype=torch.int32), runner.config

    def of_layer(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(layer, q[0], k[0, :, : place + 1], v[0, :, : place + 1])[None]

    hidden = layers_by_ops(
        runner._embed(torch.tensor([token])),
        runner._matrices,
        runner._biases,
        runner.weights.norm,
        runner.cache.keys_values,
        runner._cos_sin,
        at,
        torch.zeros(1, dtype=torch.int32),
        at,
        of_layer,
        config.heads,
        config.intermediate_size,
        config.norm_epsilon,
    )
    return runner._logits(hidden)[0]


@contextmanager
def seconds_in_ops() -> Iterator[Callable[[], float]]:
    """What it gives tells the seconds so far that Llama runners on the CPU have spent inside of ops."""
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
        mock.patch.object(attention, "llama_layers", timed(attention.llama_layers)),
        mock.patch.object(native, "linear", timed(native.linear)),
    ):
        yield lambda: inside
