"""ragged_attention: the nodes of several sequences' trees, tree after tree, attend to a dense KV cache.

Each tree is one call of tree_attention's kernel over its own sequence of the cache; a chain of more than 64 nodes is a
piece of a prompt, and goes to the kernel of block_masked_attention, which gives the same bits. How many nodes a tree
has is a number in `starts`, not a shape: a recorded call serves every round with so many rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_tensors
from pyspec.ops._library import Op
from pyspec.ops.tree_attention import tree_attention


def ragged_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    sinks: Tensor | None = None,
    chunked: bool = False,
) -> Tensor:
    """Plain PyTorch, tree by tree. The specification of the kernels."""
    out, bounds = torch.empty_like(q), starts.tolist()
    for sequence, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if end == first:
            continue
        bits = ancestor_bits[None, first:end]
        keys_values = (k[sequence, None], v[sequence, None])
        settings = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks, "chunked": chunked}
        rows = q[first:end].transpose(0, 1)[None]
        mixed = tree_attention(rows, *keys_values, bits, prefix_lens[sequence, None], **settings)
        out[first:end] = mixed[0].transpose(0, 1)
    return out


def _padded(q, k, v, ancestor_bits, starts, prefix_lens, scale, softcap, window, sinks=None, chunked=False) -> Tensor:
    """On a GPU nobody looks at starts: all trees are padded to one number of nodes."""
    sequences, nodes = len(k), len(q) // len(k)
    bits = ancestor_bits.unflatten(0, (sequences, nodes))
    q = q.unflatten(0, (sequences, nodes)).transpose(1, 2)
    settings = {"scale": scale, "softcap": softcap, "window": window, "sinks": sinks, "chunked": chunked}
    mixed = tree_attention(q, k, v, bits, prefix_lens, **settings)
    return mixed.transpose(1, 2).flatten(0, 1)


def _check_trees(q, k, v, ancestor_bits, starts, prefix_lens, *rest) -> None:
    bounds = starts.tolist()
    if bounds[0] != 0 or bounds[-1] != len(q) or any(a > b for a, b in zip(bounds, bounds[1:], strict=False)):
        raise ValueError(f"starts must ascend from 0 to {len(q)}, got {bounds}")


_OP = Op(
    "ragged_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor ancestor_bits, Tensor starts, Tensor prefix_lens, float scale, "
    "float? softcap, int? window, Tensor? sinks=None, bool chunked=False) -> Tensor",
    ragged_attention_reference,
    lambda q, *rest: torch.empty_like(q),
    lambda: _padded,
    check=_check_trees,
)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
    chunked: bool = False,
) -> Tensor:
    """Attention of trees' nodes to their sequences' committed keys and to their own ancestors, in one call.

    Args:
        q: [R, Hq, D] fp32, fp16 or bf16, contiguous: the rows of all trees, tree after tree.
        k, v: [B, Hkv, S, D] like q; the keys of a tree's nodes lie behind the committed ones, see tree_attention.
        ancestor_bits: [R, W] int32, 32 W at least the nodes of the largest tree: row r has bit j set where node j of
            its own tree is r's node or an ancestor of it, perhaps one of an earlier call, see tree_attention; none in
            padding, which sees nothing.
        starts: [B + 1] int32, from 0 to R: tree b has the rows from starts[b] to starts[b + 1], perhaps none. On a GPU
            all trees must have R / B rows, padding included, which is not checked.
        prefix_lens: [B] int32, committed keys of each sequence.
        scale, softcap, window, sinks, chunked: as for tree_attention.

    Returns:
        Like q. Each row has the bits that tree_attention gives it.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument. On the CPU also when
            starts, prefix_lens or ancestor_bits point outside of the rows or of k.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(q=q, k=k, v=v, ancestor_bits=ancestor_bits, starts=starts, prefix_lens=prefix_lens)
    check_are_tensors(sinks=sinks, optional=("sinks",))
    if q.dim() != 3 or not q.is_contiguous():
        raise ValueError(f"q must be [rows, heads, head_dim] and contiguous, got {tuple(q.shape)} {q.stride()}")
    if k.dim() != 4 or k.stride(3) != 1 or v.stride(-1) != 1:
        raise ValueError(
            f"k and v must be [sequences, kv_heads, slots, head_dim] with a contiguous last dimension, "
            f"got {tuple(k.shape)} and {tuple(v.shape)}"
        )
    check_tensors(
        "q",
        q,
        ("k", k, q.dtype, (*k.shape[:3], q.shape[2])),
        ("v", v, q.dtype, k.shape),
        ("ancestor_bits", ancestor_bits, torch.int32, (len(q), *ancestor_bits.shape[1:])),
        ("starts", starts, torch.int32, (len(k) + 1,)),
        ("prefix_lens", prefix_lens, torch.int32, (len(k),)),
        ("sinks", sinks, torch.float32, q.shape[1:2]),
    )
    check_contiguous(sinks=sinks)
    if chunked and window is None:
        raise ValueError("window must be there where keys are seen in chunks, got None")
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    return _OP(q, k, v, ancestor_bits, starts, prefix_lens, scale, softcap, window, sinks, chunked)
