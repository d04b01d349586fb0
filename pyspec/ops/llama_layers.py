"""llama_layers: all layers of a Llama-shaped model for the nodes of some trees, as one call.

What it computes is written below in six ops a layer (`layers_by_ops`). On the CPU the same kernels run as one
program on all threads at once (csrc/cpu/llama_layers.cpp), which gives the same bits without 200 dispatches a
token; on a GPU the ops run one by one, replayed as a CUDA graph (pyspec/runners/static_steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors
from pyspec.ops._library import Op
from pyspec.ops.linear import PackedWeight, linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.rotary_write import rotary_write
from pyspec.ops.swiglu import swiglu
from pyspec.ops.tree_attention import tree_attention

__all__ = ["TreeRows", "attention_block", "feed_forward", "layers_by_ops", "llama_layers", "llama_layers_reference"]

WEIGHTS = 6  # of a layer: attention_norm, qkv, output, feed_forward_norm, gate_up, down


def layers_by_ops(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    last_norm: Tensor,
    keys_values: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    attend: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    heads: int,
    intermediate: int,
    epsilon: float,
) -> Tensor:
    """The layers, op by op; hidden and keys_values are changed in place.

    Takes what llama_layers takes, but sequences and slots are those of every row, [R] int32, and attention is the
    caller's: attend(layer, q [R, heads, D], k, v [B, kv_heads, S, D]) gives [R, heads, D].
    """
    dtype, delta = keys_values.dtype, None
    for layer, (k, v) in enumerate(keys_values.unbind(0)):
        attention_norm, qkv, output, feed_forward_norm, gate_up, down = weights[WEIGHTS * layer :][:WEIGHTS]
        qkv_bias, output_bias = biases[2 * layer :][:2] if biases else (None, None)
        x = rms_norm(hidden, attention_norm, epsilon, delta=delta, out_dtype=dtype)
        place = (cos_sin, positions, sequences, slots, k, v)
        delta = attention_block(x, (qkv, output), (qkv_bias, output_bias), *place, partial(attend, layer), heads)
        x = rms_norm(hidden, feed_forward_norm, epsilon, delta=delta, out_dtype=dtype)
        delta = feed_forward(x, gate_up, down, intermediate)
    return rms_norm(hidden, last_norm, epsilon, delta=delta, out_dtype=dtype)


def attention_block(
    x: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None],
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    slots: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    heads: int,
) -> Tensor:
    """[R, H] fp32: what attention adds to normed rows x [R, H]; weights and biases are those of qkv and output."""
    head_dim = k.shape[-1]
    projected = _project(x, weights[0], (heads + 2 * k.shape[1]) * head_dim, biases[0])
    q = rotary_write(projected, cos_sin, positions, sequences, slots, k, v, heads=heads)
    return _project(attend(q, k, v).flatten(1), weights[1], x.shape[1], biases[1])


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor, intermediate: int) -> Tensor:
    """[R, H] fp32: what the feed-forward layer adds to normed rows x [R, H]."""
    gated = swiglu(_project(x, gate_up, 2 * intermediate), out_dtype=x.dtype)
    return _project(gated, down, x.shape[1])


def _project(x: Tensor, weight: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None or not bias.numel() else bias
    return linear(x, PackedWeight(weight, outputs, x.shape[1]), bias, out_dtype=torch.float32)


class TreeRows:
    """Where the rows of some trees lie in a cache, and their attention, tree by tree.

    Args:
        ancestor_bits: for each tree [T, ceil(T / 32)] int32.
        sequences, lengths: for each tree its sequence of the cache and how many keys are committed there.
        device: of the cache.
    """

    sequences: Tensor  # [R] int32
    slots: Tensor  # [R] int32

    def __init__(
        self, ancestor_bits: Sequence[Tensor], sequences: Sequence[int], lengths: Sequence[int], device: torch.device
    ):
        self._sizes = [len(bits) for bits in ancestor_bits]
        repeats = torch.tensor(self._sizes, device=device)
        starts = torch.tensor(lengths, dtype=torch.int32, device=device)
        nodes = torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in self._sizes])
        self.sequences = torch.tensor(sequences, dtype=torch.int32, device=device).repeat_interleave(repeats)
        self.slots = starts.repeat_interleave(repeats) + nodes
        bits = [of_tree.to(device) for of_tree in ancestor_bits]
        self._trees = list(zip(sequences, bits, starts.split(1), strict=True))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """[R, heads, D] of queries [R, heads, D] and keys and values [B, kv_heads, S, D]."""
        mixed = [
            tree_attention(
                part.transpose(0, 1)[None], k[sequence, None], v[sequence, None], bits[None], start, window=window
            )[0].transpose(0, 1)
            for part, (sequence, bits, start) in zip(q.split(self._sizes), self._trees, strict=True)
        ]
        return torch.cat(mixed)


def llama_layers_reference(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    last_norm: Tensor,
    keys_values: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    ancestor_bits: Sequence[Tensor],
    sequences: Sequence[int],
    lengths: Sequence[int],
    windows: Sequence[int],
    heads: int,
    intermediate: int,
    epsilon: float,
) -> Tensor:
    """The layers, op by op; hidden and keys_values are changed in place. The specification of the program."""
    rows = TreeRows(ancestor_bits, sequences, lengths, hidden.device)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rows.attend(q, k, v, windows[layer] or None)

    place = (keys_values, cos_sin, positions, rows.sequences, rows.slots)
    return layers_by_ops(hidden, weights, biases, last_norm, *place, attend, heads, intermediate, epsilon)


def _fake(hidden, weights, biases, last_norm, keys_values, *rest) -> Tensor:
    return torch.empty_like(hidden, dtype=keys_values.dtype)


_OP = Op(
    "llama_layers",
    "(Tensor(a!) hidden, Tensor[] weights, Tensor[] biases, Tensor last_norm, Tensor(b!) keys_values, Tensor cos_sin, "
    "Tensor positions, Tensor[] ancestor_bits, int[] sequences, int[] lengths, int[] windows, int heads, "
    "int intermediate, float epsilon) -> Tensor",
    llama_layers_reference,
    _fake,
    lambda: llama_layers_reference,
)


def llama_layers(
    hidden: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    last_norm: Tensor,
    keys_values: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    ancestor_bits: Sequence[Tensor],
    sequences: Sequence[int],
    lengths: Sequence[int],
    *,
    windows: Sequence[int],
    heads: int,
    intermediate: int,
    epsilon: float,
) -> Tensor:
    """Runs the nodes of some trees through all layers; their keys and values go to the cache.

    Each row has the bits of plain decoding along the node's path, whatever is beside it.

    Args:
        hidden: [R, H] fp32 and contiguous: the embeddings of all nodes, tree after tree; used up.
        weights: for each layer attention_norm [H] fp32, qkv, output, feed_forward_norm [H] fp32, gate_up, down,
            where matrices are the data of `pack_weight`.
        biases: none, or for each layer those of qkv and of output, fp32 (empty: none).
        last_norm: [H] fp32.
        keys_values: [layers, 2, B, kv_heads, S, D] fp32, fp16 or bf16; its dtype is the activations' too.
        cos_sin: [P, 2, D / 2] fp32, see rotary_write.
        positions: [R] int32, of every node.
        ancestor_bits: for each tree [T, ceil(T / 32)] int32 (DraftTree.ancestor_bits).
        sequences, lengths: for each tree its sequence of the cache and how many keys are committed there.
        windows: for each layer the sliding window, 0 for none.
        heads, intermediate: of the queries; columns of a gate.
        epsilon: of the norms.

    Returns:
        [R, H] of the cache's dtype, after the last norm.

    Raises:
        RuntimeError, ValueError, TypeError: something does not fit; the message names it.
    """
    check_are_tensors(hidden=hidden, last_norm=last_norm, keys_values=keys_values, cos_sin=cos_sin, positions=positions)
    place = (keys_values, cos_sin, positions, ancestor_bits, sequences, lengths)
    return _OP(hidden, weights, biases, last_norm, *place, windows, heads, intermediate, epsilon)
