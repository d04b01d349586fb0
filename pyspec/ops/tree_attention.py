"""tree_attention: every node of a draft tree attends to the committed prefix and to its own ancestors.

For node t of a sequence with n committed keys, with A(t) its ancestors and itself,

    out[t] = sum over j in prefix + A(t) of softmax(scale * q[t] . k[j]) v[j].

The tree's keys lie at slots n, n + 1, ... in node order; their positions are n + depth. A sliding window
counts positions, so two siblings see equally far back. The rows may be some nodes of a tree that grows, one after
another: the bits name those before them too, whose keys are there since an earlier call.

The kernels obey the row rule: out[t] has the same bits as plain decoding (T = 1) of the path to t. A key at
position p always falls in tile p // 64; tiles that the prefix fills are shared by all rows, later ones are
gathered per row by depth; tiles are folded in order, in chunks of fixed size that are then merged in order. See
docs/tree_attention.md.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyspec.ops._checks import FLOATS, BadData, check_are_tensors, check_contiguous, check_places, check_tensors
from pyspec.ops._library import Op

HEAD_DIMS = (64, 80, 96, 128, 256)
TREE_HEAD_DIMS = (*HEAD_DIMS, 512)  # of this op and ragged_attention


def tree_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    scale: float,
    softcap: float | None,
    window: int | None,
    block_table: Tensor | None,
    sinks: Tensor | None = None,
    chunked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32: out like q and lse [B, Hq, T]. The specification of the kernels."""
    if block_table is not None:  # pages [P, Hkv, page, D] to [B, Hkv, pages * page, D]
        pages = block_table.long().clamp(0, len(k) - 1)  # those behind a sequence's last key may be anything
        k, v = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k, v))
    nodes, slots = q.shape[2], k.shape[2]

    named = 32 * ancestor_bits.shape[2]
    index = torch.arange(named, device=q.device)
    is_ancestor = (ancestor_bits[:, :, index // 32] >> (index % 32)) & 1 == 1  # [B, T, named]
    depths = is_ancestor.cumsum(-1) - 1  # of the named nodes as each row counts them
    depth = depths[..., -1]  # [B, T], of the rows' own nodes; -1 for padding
    prefix_lens = prefix_lens.long()

    node_of_slot = torch.arange(slots, device=q.device) - prefix_lens[:, None]  # [B, S]; negative in the prefix
    in_tree = (node_of_slot >= 0) & (node_of_slot < named)
    node = node_of_slot.clamp(0, named - 1)[:, None].expand(-1, nodes, -1)
    is_node_visible = is_ancestor.gather(2, node) & in_tree[:, None]
    is_prefix_visible = (node_of_slot < 0)[:, None] & (depth >= 0)[..., None]
    visible = is_prefix_visible | is_node_visible  # [B, T, S]
    if window is not None:
        # position - n, in prefix and tree alike
        slot_depth = torch.where(in_tree[:, None], depths.gather(2, node), node_of_slot[:, None])
        if chunked:
            row_chunk, slot_chunk = ((x + prefix_lens[:, None, None]) // window for x in (depth[..., None], slot_depth))
            visible &= row_chunk == slot_chunk
        else:
            visible &= depth[..., None] - slot_depth < window

    return dense_attention(q, k, v, visible[:, None, None], scale, softcap, sinks)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys that visible [B, Hkv or 1, group or 1, T, S] names, in fp32: out like q, lse [B, Hq, T]."""
    seen = visible.any(3).any(2)  # [B, Hkv or 1, S]; a value that no row may see could be NaN
    grouped_q = q.float().unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
    scores = torch.einsum("bhgtd,bhsd->bhgts", grouped_q, k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(visible, scores.softmax(-1), 0.0)
    if sinks is not None:
        seen_alone, sees = lse, lse > -torch.inf
        lse = torch.where(sees, torch.logaddexp(lse, sinks.view(1, k.shape[1], -1, 1)), lse)
        weights *= torch.where(sees, (seen_alone - lse).exp(), 1.0)[..., None]
    values = torch.where(seen[..., None], v.float(), 0.0)
    out = torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)
    return torch.empty_like(q).copy_(out), lse.flatten(1, 2)


def _check_reach(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table, *rest) -> None:
    """Raises BadData unless every slot that a row sees is inside of k."""
    slots = k.shape[2] if block_table is None else block_table.shape[1] * k.shape[2]
    for b, n in enumerate(prefix_lens.tolist()):
        named = np.bitwise_or.reduce(ancestor_bits[b].cpu().numpy().astype("<i4"), 0)
        reach = int.from_bytes(named.tobytes(), "little").bit_length()
        if n < 0:
            raise BadData(f"prefix_lens[{b}] must not be negative, got {n}")
        if n + reach > slots:
            raise BadData(
                f"prefix_lens[{b}] is {n} and ancestor_bits name node {reach - 1}, but k has only {slots} slots"
            )
        if block_table is not None:
            pages = block_table[b, : -(-(n + reach) // k.shape[2])]
            check_places(f"block_table[{b}]", pages, len(k), "k has {} pages")


def _fake(q, *rest) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _triton():
    from pyspec.kernels.tree_attention import tree_attention as launch

    return launch


_OP = Op(
    "tree_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor ancestor_bits, Tensor prefix_lens, float scale, float? softcap, "
    "int? window, Tensor? block_table, Tensor? sinks=None, bool chunked=False) -> (Tensor, Tensor)",
    tree_attention_reference,
    _fake,
    _triton,
    check=_check_reach,
)


def check_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> None:
    """Raises unless the heads of q [B, Hq, T, D] can attend to k and v [any, Hkv, S, D] on one device."""
    check_are_tensors(q=q, k=k, v=v)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in FLOATS or tensor.dtype != q.dtype:
            raise TypeError(
                f"{name} must be float32, float16 or bfloat16 and like q, got {tensor.dtype} (q is {q.dtype})"
            )
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(tensor.shape)}")
        if tensor.stride(3) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {tensor.device}")
    heads, head_dim = q.shape[1], q.shape[3]
    if head_dim not in TREE_HEAD_DIMS:
        raise ValueError(f"q must have a head_dim of {TREE_HEAD_DIMS}, got {head_dim}")
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[3] != head_dim:
        raise ValueError(f"k must have head_dim {head_dim} like q, got shape {tuple(k.shape)}")
    if k.shape[1] < 1 or heads % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides the {heads} of q, got {k.shape[1]}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")


def _check(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table, sinks, chunked) -> None:
    check_attention(q, k, v, scale, softcap)
    options = {"block_table": block_table, "sinks": sinks}
    check_are_tensors(ancestor_bits=ancestor_bits, prefix_lens=prefix_lens, **options, optional=tuple(options))
    batch, _, nodes, _ = q.shape
    if nodes < 1:
        raise ValueError(f"q must have at least one node, got shape {tuple(q.shape)}")
    if block_table is None and k.shape[0] != batch:
        raise ValueError(f"k must have batch {batch} like q, got shape {tuple(k.shape)}")
    pages = () if block_table is None else block_table.shape[-1:]
    words = max([(nodes + 31) // 32, *ancestor_bits.shape[2:]])
    check_tensors(
        "q",
        q,
        ("ancestor_bits", ancestor_bits, torch.int32, (batch, nodes, words)),
        ("prefix_lens", prefix_lens, torch.int32, (batch,)),
        ("block_table", block_table, torch.int32, (batch, *pages)),
        ("sinks", sinks, torch.float32, (q.shape[1],)),
    )
    check_contiguous(sinks=sinks)
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if chunked and window is None:
        raise ValueError("window must be there where keys are seen in chunks, got None")


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    sinks: Tensor | None = None,
    chunked: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a draft tree's nodes to the committed prefix and to their own ancestors.

    Args:
        q: [B, Hq, T, D] fp32, fp16 or bf16; D in TREE_HEAD_DIMS; any strides with a contiguous last dimension.
        k, v: [B, Hkv, S, D] with the key of the tree's node j at slot n + j, or pages [P, Hkv, page, D] with a
            block_table. Hq % Hkv == 0.
        ancestor_bits: [B, T, W] int32, W at least ceil(T / 32); bit j of a row is set iff node j is the row's own or
            an ancestor of it (DraftTree.ancestor_bits). The rows are consecutive nodes of a tree, of which those before
            them need only keys. A smaller tree is padded with zero rows, which give 0 and lse -inf.
        prefix_lens: [B] int32, committed keys n of each sequence.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        softcap: scores become softcap * tanh(scores / softcap).
        window: only keys less than this many positions back are visible; a node's position is n + depth.
        block_table: [B, pages] int32, the pages of each sequence in order.
        sinks: [Hq] fp32 and contiguous, each head's score of one more key, which has no value: it takes a share of the
            weights, neither scaled nor capped nor outside of a window. Padding does not see it.
        chunked: windows do not slide: a position p sees keys from window (p // window) on.
        return_lse: also return the natural log-sum-exp of the scores, the sink's among them.

    Returns:
        out like q; with return_lse also lse [B, Hq, T] fp32. Sums are kept in fp32.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride, device or option does not fit; the message names the argument. On the CPU also when
            prefix_lens, ancestor_bits or block_table point outside of k; on a GPU nobody looks at what they hold, for
            that would wait for the device.
        RuntimeError: an argument requires a gradient.
    """
    _check(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table, sinks, chunked)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    out, lse = _OP(q, k, v, ancestor_bits, prefix_lens, scale, softcap, window, block_table, sinks, chunked)
    return (out, lse) if return_lse else out
