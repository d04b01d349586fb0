"""llama_layers: all layers of a Llama-shaped model for the nodes of some trees, as one call.

What it computes is written below in six ops a layer (`layers_by_ops`). On the CPU the same kernels run as one
program on all threads at once (csrc/cpu/llama_layers.cpp), which gives the same bits without 200 dispatches a
token; on a GPU the ops run one by one, replayed as a CUDA graph (pyspec/models/static_steps.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyspec.ops._library import Op
from pyspec.ops.linear import PackedWeight, linear
from pyspec.ops.rms_norm import rms_norm
from pyspec.ops.rotary_write import rotary_write
from pyspec.ops.swiglu import swiglu
from pyspec.ops.tree_attention import tree_attention

__all__ = ["layers_by_ops", "llama_layers", "llama_layers_reference"]

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
    dtype, size, head_dim = keys_values.dtype, hidden.shape[1], keys_values.shape[-1]
    qkv_size = (heads + 2 * keys_values.shape[3]) * head_dim

    def project(x: Tensor, weight: Tensor, outputs: int, bias: Tensor | None = None) -> Tensor:
        bias = None if bias is None or not bias.numel() else bias
        return linear(x, PackedWeight(weight, outputs, x.shape[1]), bias, out_dtype=torch.float32)

    delta = None
    for layer, (k, v) in enumerate(keys_values.unbind(0)):
        attention_norm, qkv, output, feed_forward_norm, gate_up, down = weights[WEIGHTS * layer :][:WEIGHTS]
        qkv_bias, output_bias = biases[2 * layer :][:2] if biases else (None, None)
        x = rms_norm(hidden, attention_norm, epsilon, delta=delta, out_dtype=dtype)
        projected = project(x, qkv, qkv_size, qkv_bias)
        q = rotary_write(projected, cos_sin, positions, sequences, slots, k, v, heads=heads)
        delta = project(attend(layer, q, k, v).flatten(1), output, size, output_bias)
        x = rms_norm(hidden, feed_forward_norm, epsilon, delta=delta, out_dtype=dtype)
        x = swiglu(project(x, gate_up, 2 * intermediate), out_dtype=dtype)
        delta = project(x, down, size)
    return rms_norm(hidden, last_norm, epsilon, delta=delta, out_dtype=dtype)


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
    device = hidden.device
    sizes = [len(bits) for bits in ancestor_bits]
    repeats = torch.tensor(sizes, device=device)
    row_sequences = torch.tensor(sequences, dtype=torch.int32, device=device).repeat_interleave(repeats)
    starts = torch.tensor(lengths, dtype=torch.int32, device=device)
    nodes = torch.cat([torch.arange(n, dtype=torch.int32, device=device) for n in sizes])
    slots = starts.repeat_interleave(repeats) + nodes

    trees = list(zip(sequences, ancestor_bits, starts.split(1), strict=True))

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed = [
            tree_attention(
                part.transpose(0, 1)[None],
                k[sequence, None],
                v[sequence, None],
                bits[None],
                start,
                window=windows[layer] or None,
            )[0].transpose(0, 1)
            for part, (sequence, bits, start) in zip(q.split(sizes), trees, strict=True)
        ]
        return torch.cat(mixed)

    return layers_by_ops(
        hidden,
        weights,
        biases,
        last_norm,
        keys_values,
        cos_sin,
        positions,
        row_sequences,
        slots,
        attend,
        heads,
        intermediate,
        epsilon,
    )


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
    return _OP(
        hidden,
        weights,
        biases,
        last_norm,
        keys_values,
        cos_sin,
        positions,
        ancestor_bits,
        sequences,
        lengths,
        windows,
        heads,
        intermediate,
        epsilon,
    )
