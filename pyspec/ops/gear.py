"""gear: attention that reads keys and values quantised to 2, 3, 4 or 8 bits (GEAR, KIVI, plain) as they lie.

What a record of 128 tokens holds is in pyspec.ops.gear_format, how it is made in pyspec.ops.gear_encode.

`gear_attention` is the attention of a draft tree to quantised blocks, then to the keys and values behind them in full
precision. What a row sees quantised depends on its position alone (`blocks_seen`), never on the tree or on what
was committed, so the row rule of tree_attention holds here too: a row has the bits of plain decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_places
from pyspec.ops._library import Op
from pyspec.ops.gear_encode import check_floats
from pyspec.ops.gear_format import BLOCK, HALF, GearFormat, check_records, gear_decode
from pyspec.ops.merge_attention import merge_attention
from pyspec.ops.tree_attention import tree_attention


def blocks_seen(positions: Tensor | int, window: int, span: int = BLOCK) -> Tensor | int:
    """How many quantised blocks a row at each position sees; it sees the keys behind them in full precision.

    A block, of span tokens, is seen quantised by the rows that are at least `window` positions behind its end. So the
    nodes of a tree of at most window + 1 nodes need only blocks that are committed whole.
    """
    blocks = (positions - window) // span
    return max(blocks, 0) if isinstance(blocks, int) else blocks.clamp_min(0)


# ==== attention to quantised blocks ====


def used_blocks(quantised: Tensor, seen: Tensor) -> Tensor:
    """The quantised records, with zeros in place of the blocks that no row sees, which may hold anything."""
    used = torch.arange(quantised.shape[2], device=quantised.device) < seen.amax(1, keepdim=True)  # [B, blocks]
    return quantised.masked_fill(~used[:, None, :, None], 0)


def attention_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, oldest: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The references' attention to the first seen [B, T] blocks, decoded to k and v [B, Hkv, S, D] fp32.

    oldest: [B, T], the first token that each row sees; None for all.
    """
    slots, kv_heads = torch.arange(k.shape[2], device=q.device), k.shape[1]
    visible = slots < seen[..., None] * BLOCK
    if oldest is not None:
        visible = visible & (slots >= oldest[..., None])
    visible = visible[:, None, None]  # [B, 1, 1, T, S]
    grouped = q.float().unflatten(1, (kv_heads, q.shape[1] // kv_heads))
    scores = (torch.einsum("bhgtd,bhsd->bhgts", grouped, k) * scale).masked_fill(~visible, -torch.inf)
    weights = torch.where(visible, scores.softmax(-1), 0.0)
    out = torch.einsum("bhgts,bhsd->bhgtd", weights, v).flatten(1, 2)
    return torch.empty_like(q).copy_(out), scores.logsumexp(-1).flatten(1, 2)


def gear_reference(
    q: Tensor,
    quantised: Tensor,
    seen: Tensor,
    bits: int,
    group: int,
    rank: int,
    outliers: int,
    key_channels: int,
    scale: float,
    oldest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Plain PyTorch, in fp32: out like q and lse [B, Hq, T]. The specification of the kernels.

    oldest: [B, T] int32, the first token that each row sees; None for all.
    """
    format = GearFormat(bits, group, rank, outliers, False, key_channels)
    k, v = gear_decode(used_blocks(quantised, seen), format, q.shape[3])
    return attention_to_blocks(q, k, v, seen, scale, oldest)


def check_seen(q: Tensor, quantised: Tensor, seen: Tensor, *rest) -> None:
    """Raises BadData where a row sees blocks that quantised does not have."""
    check_places("seen", seen, quantised.shape[2] + 1, f"quantised has {quantised.shape[2]} blocks")


def _fake(q, quantised, seen, bits, group, rank, outliers, key_channels, scale, oldest=None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _triton():
    from pyspec.kernels.gear import gear as launch

    return launch


_OP = Op(
    "gear",
    "(Tensor q, Tensor quantised, Tensor seen, int bits, int group, int rank, int outliers, "
    "int key_channels, float scale, Tensor? oldest=None) "
    "-> (Tensor, Tensor)",
    gear_reference,
    _fake,
    _triton,
    check=check_seen,
)


# ==== attention of a tree to quantised blocks and to the keys behind them ====


@dataclass(frozen=True)
class TreeRows:
    """What the nodes of a batch of trees see, the same in all layers."""

    ancestor_bits: Tensor  # [B, T, ceil(T / 32)] int32
    seen: Tensor  # [B, T] int32, quantised blocks; 0 for padding
    first: Tensor  # [B, 1] int32, those of the root
    dense_lens: Tensor  # [B] int32, committed keys behind the root's blocks
    most: int  # blocks that a node sees quantised and its root does not
    span: int = BLOCK  # tokens of a block
    window: int | None = None  # positions that a node sees, its own included; None for all
    oldest: Tensor | None = None  # [B, T] int32, the first token that a node sees in its blocks; None for all
    begins: Tensor | None = None  # [B, T], the first token that a node sees exactly; None where its blocks end

    @classmethod
    def of(cls, ancestor_bits: Tensor, prefix_lens: Tensor, window: int, span: int = BLOCK) -> TreeRows:
        depths = _depths(ancestor_bits)
        seen = blocks_seen(prefix_lens[:, None] + depths, window, span).masked_fill(depths < 0, 0).int()
        first = blocks_seen(prefix_lens, window, span)
        most = int((seen - first[:, None]).max()) if seen.numel() else 0
        return cls(ancestor_bits, seen, first[:, None], prefix_lens - first * span, max(most, 0), span)

    def within(self, window: int | None) -> TreeRows:
        """The rows where a node sees so many positions, its own included. Blocks have all their tokens then."""
        if window is None:
            return self
        return replace(self, window=window, oldest=(self._positions - window + 1).clamp_min(0).int())

    def in_chunks(self, chunk: int) -> TreeRows:
        """The rows where a node sees its own chunk of so many positions. Blocks have all their tokens then."""
        oldest = self._positions.clamp_min(0) // chunk * chunk
        return replace(self, oldest=oldest.int(), begins=torch.maximum(oldest, self.seen * self.span))

    @property
    def _positions(self) -> Tensor:
        return self.first * self.span + self.dense_lens[:, None] + _depths(self.ancestor_bits)

    def ancestors_from(self, position: int) -> Tensor:
        """ancestor_bits of the first sequence's nodes, without the ancestors that lie before a position."""
        nodes = torch.arange(self.ancestor_bits.shape[1], device=self.ancestor_bits.device)
        kept = self._positions[0] >= position
        words = torch.zeros_like(self.ancestor_bits[0, 0])
        words.index_add_(0, nodes // 32, (kept.int() << nodes % 32).int())  # a bit for each node: no carries
        return self.ancestor_bits & words


def _depths(ancestor_bits: Tensor) -> Tensor:
    """[B, T] of nodes, -1 of padding, by the bits of their ancestors."""
    nodes = torch.arange(ancestor_bits.shape[1], device=ancestor_bits.device)
    return ((ancestor_bits[..., nodes // 32] >> nodes % 32) & 1).sum(-1) - 1


def attend_tree(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    v: Tensor,
    rows: TreeRows,
    format: GearFormat,
    scale: float,
    records: int = 1,
) -> tuple[Tensor, Tensor]:
    """gear_attention for rows worked out before: out like q, lse [B, Hq, T]. A block has `records` records."""
    part = _OP(q, quantised, rows.seen * records, *format.layout, scale, rows.oldest)
    return join_exact(part, q, k, v, rows, scale)


def join_exact(
    quantised_part: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, rows: TreeRows, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to quantised blocks, out like q and lse [B, Hq, T], joined with that to the exact keys behind them."""
    scores = {"scale": scale, "window": rows.window, "return_lse": True}
    if rows.begins is not None:
        return merge_attention(*quantised_part, *_exact_in_chunks(q, k, v, rows, scores))
    dense, dense_lse = tree_attention(q, k, v, rows.ancestor_bits, rows.dense_lens, **scores)
    for more in range(1, rows.most + 1):  # nodes that are far enough from a block to see it quantised, unlike the root
        past = more * rows.span
        lens = (rows.dense_lens - past).clamp_min(0)
        there = tree_attention(q, k[:, :, past:], v[:, :, past:], rows.ancestor_bits, lens, **scores)
        chosen = (rows.seen - rows.first == more)[:, None]
        dense = torch.where(chosen[..., None], there[0], dense)
        dense_lse = torch.where(chosen, there[1], dense_lse)
    return merge_attention(*quantised_part, dense, dense_lse)


def _exact_in_chunks(q: Tensor, k: Tensor, v: Tensor, rows: TreeRows, scores: dict) -> tuple[Tensor, Tensor]:
    """Attention of one sequence's nodes to the exact keys from `begins` on, out like q and lse.

    Where a node's begin is said by its position alone, so it has the bits of plain decoding.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    start, length = int(rows.first[0, 0]) * rows.span, int(rows.dense_lens[0])
    for begin in rows.begins.unique().tolist():
        past = min(max(begin - start, 0), length)
        bits, lens = rows.ancestors_from(begin), rows.dense_lens - past
        there = tree_attention(q, k[:, :, past:], v[:, :, past:], bits, lens, **scores)
        chosen = rows.begins[0] == begin
        out[:, :, chosen], lse[:, :, chosen] = there[0][:, :, chosen], there[1][:, :, chosen]
    return out, lse


def gear_attention(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    format: GearFormat,
    *,
    window: int = HALF,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a draft tree's nodes to quantised blocks, the keys behind them, and their own ancestors.

    A row at position p sees the first blocks_seen(p, window) blocks quantised and what follows in full precision.

    Args:
        q: [B, Hq, T, D] fp32, fp16 or bf16, T at most window + 1.
        quantised: [B, Hkv, blocks, record] uint8 of gear_encode, at least the blocks that are seen.
        k, v: [B, Hkv, S, D] like q. Slot 0 is the first position that the root does not see quantised,
            blocks_seen(n, window) * 128 for n committed keys; the tree's keys follow the committed ones.
        ancestor_bits, prefix_lens: as for tree_attention; n counts quantised tokens too.
        format: of quantised.
        window: how far behind a block's end a row must be to see it quantised.
        scale: factor of the scores, positive; 1 / sqrt(D) by default.
        return_lse: also return the natural log-sum-exp of the scores.

    Returns:
        out like q; with return_lse also lse [B, Hq, T] fp32.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: a shape, stride, device or option does not fit; the message names the argument. On the CPU also when
            prefix_lens point outside of quantised or k.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(q=q, quantised=quantised, k=k, v=v, ancestor_bits=ancestor_bits, prefix_lens=prefix_lens)
    check_floats("q", q)
    head_dim = q.shape[3]
    check_records(quantised, format, head_dim)
    check_tree(q, quantised, k, ancestor_bits, prefix_lens, window, scale)
    rows = TreeRows.of(ancestor_bits, prefix_lens, window)
    out, lse = attend_tree(q, quantised, k, v, rows, format, 1 / math.sqrt(head_dim) if scale is None else scale)
    return (out, lse) if return_lse else out


def check_tree(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    ancestor_bits: Tensor,
    prefix_lens: Tensor,
    window: int,
    scale: float | None,
) -> None:
    """Raises ValueError unless a tree's queries, its shape and its quantised blocks fit together."""
    batch, heads, nodes, _ = q.shape
    if quantised.shape[0] != batch or not quantised.shape[1] or heads % quantised.shape[1]:
        raise ValueError(
            f"quantised must have batch {batch} and a number of heads that divides the {heads} of q, "
            f"got shape {tuple(quantised.shape)}"
        )
    if quantised.device != q.device:
        raise ValueError(f"quantised must be on {q.device} like q, got {quantised.device}")
    if k.dim() != 4 or k.shape[1] != quantised.shape[1]:
        raise ValueError(f"k must have the {quantised.shape[1]} heads of quantised, got shape {tuple(k.shape)}")
    for name, tensor, shape in (
        ("ancestor_bits", ancestor_bits, (batch, nodes, (nodes + 31) // 32)),
        ("prefix_lens", prefix_lens, (batch,)),
    ):
        if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be int32 {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if nodes > window + 1:
        raise ValueError(f"q must have at most window + 1 = {window + 1} nodes, got {nodes}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
