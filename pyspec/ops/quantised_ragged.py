"""gear_ragged, residual_vq_ragged: ragged rows attend to a quantised cache, its blocks and the keys behind them.

What gear_attention and residual_vq_attention do for a batch of trees of one size, in one call for trees of any sizes,
which are numbers and not shapes: a recorded call serves every round with so many rows.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from pyspec.ops._checks import BadData, check_are_tensors
from pyspec.ops._library import Op
from pyspec.ops.gear import TreeRows, attend_tree, join_exact
from pyspec.ops.gear_format import BLOCK, GearFormat
from pyspec.ops.residual_vq import attend_codes

#: What the arguments of both ops begin with.
ROWS = (
    "Tensor q, Tensor quantised, Tensor k, Tensor v, Tensor ancestor_bits, Tensor seen, Tensor starts, "
    "Tensor prefix_lens, int span, int records"
)


def by_tree(
    attend: Callable,
    window: int | None,
    q,
    quantised,
    k,
    v,
    ancestor_bits,
    seen,
    starts,
    prefix_lens,
    span,
    records,
    *,
    chunked: bool = False,
) -> Tensor:
    """The references' attention of ragged rows, tree by tree, out like q; those after window are the ops' ROWS.

    attend: (q [1, Hq, T, D], quantised, k, v, rows, records) of one sequence gives out like q and lse.
    chunked: rows see their own chunk of `window` positions.
    """
    if window is not None and not (window > 0 and span == records * BLOCK):
        raise BadData(
            f"window must be positive, over blocks that keep all their tokens, got {window} over blocks of {span} "
            f"tokens in {records} records"
        )
    out, bounds = torch.empty_like(q), starts.tolist()
    for sequence, (first, end) in enumerate(pairwise(bounds)):
        if first == end:
            continue
        bits = ancestor_bits[None, first:end, : (end - first + 31) // 32].contiguous()
        of_tree = seen[None, first:end]
        most = int((of_tree - of_tree[:, :1]).max())
        rows = TreeRows(bits, of_tree.contiguous(), of_tree[:, :1], prefix_lens[sequence, None], most, span)
        of_sequence = (x[sequence, None] for x in (quantised, k, v))
        rows = rows.in_chunks(window) if chunked else rows.within(window)
        mixed, _ = attend(q[first:end].transpose(0, 1)[None], *of_sequence, rows, records)
        out[first:end] = mixed[0].transpose(0, 1)
    return out


def gear_ragged_reference(*arguments) -> Tensor:
    """Each tree by attend_tree; arguments as in the schema. The specification of the kernels that run together."""
    rows, (bits, group, rank, outliers, key_channels, scale, *window) = arguments[:10], arguments[10:]
    format = GearFormat(bits, group, rank, outliers, False, key_channels)

    def attend(q, quantised, k, v, tree, records):
        return attend_tree(q, quantised, k, v, tree, format, scale, records)

    return by_tree(attend, *(window or [None]), *rows)


_GEAR = Op(
    "gear_ragged",
    f"({ROWS}, int bits, int group, int rank, int outliers, int key_channels, float scale, int? window=None) -> Tensor",
    gear_ragged_reference,
    lambda q, *rest: torch.empty_like(q),
    lambda: gear_ragged_reference,
)


def gear_ragged(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    seen: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    format: GearFormat,
    *,
    span: int,
    records: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of ragged rows, out like q, to quantised blocks and to the keys behind them, in one call.

    Args:
        q: [R, Hq, D], contiguous: the rows of all trees, tree after tree.
        quantised: [B, Hkv, records of a sequence, record] uint8.
        k, v: [B, Hkv, S, D] like q; slot 0 is the first position that the root of the sequence's tree does not see
            quantised.
        ancestor_bits, starts: as for ragged_attention.
        seen: [R] int32, blocks that each row sees quantised.
        prefix_lens: [B] int32, committed keys in k.
        format: of quantised.
        span, records: tokens of a block, and its records.
        scale: of the scores.
        window: positions that a row sees, its own included; None for all. Blocks must have all their tokens.

    Raises:
        ValueError: a shape, stride, dtype or number does not fit; the message names the argument.
    """
    check_are_tensors(q=q, quantised=quantised, k=k, v=v, ancestor_bits=ancestor_bits)
    check_are_tensors(seen=seen, starts=starts, prefix_lens=prefix_lens)
    numbers = (ancestor_bits, seen, starts, prefix_lens)
    return _GEAR(q, quantised, k, v, *numbers, span, records, *format.layout, scale, window)


def residual_vq_ragged_reference(*arguments) -> Tensor:
    """Each tree by attend_codes; arguments as in the schema. The specification of the kernels that run together."""
    rows, (codebooks, scale, *others) = arguments[:10], arguments[10:]
    rotary, window = (*others, None, None)[:2]

    def attend(q, quantised, k, v, tree, records):
        part = attend_codes(q, quantised, tree, codebooks, scale, rotary, records)
        return join_exact(part, q, k, v, tree, scale)

    return by_tree(attend, window, *rows)


_CODES = Op(
    "residual_vq_ragged",
    f"({ROWS}, Tensor codebooks, float scale, Tensor? rotary=None, int? window=None) -> Tensor",
    residual_vq_ragged_reference,
    lambda q, *rest: torch.empty_like(q),
    lambda: residual_vq_ragged_reference,
)


def residual_vq_ragged(
    q: Tensor,
    quantised: Tensor,
    k: Tensor,
    v: Tensor,
    ancestor_bits: Tensor,
    seen: Tensor,
    starts: Tensor,
    prefix_lens: Tensor,
    codebooks: Tensor,
    *,
    span: int,
    records: int,
    scale: float,
    rotary: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of ragged rows, out like q, to coded blocks and to the keys behind them; arguments as for gear_ragged.

    Args:
        codebooks, rotary: as for residual_vq_attention.
    """
    check_are_tensors(q=q, quantised=quantised, k=k, v=v, ancestor_bits=ancestor_bits, codebooks=codebooks)
    check_are_tensors(seen=seen, starts=starts, prefix_lens=prefix_lens, rotary=rotary, optional=("rotary",))
    numbers = (ancestor_bits, seen, starts, prefix_lens)
    return _CODES(q, quantised, k, v, *numbers, span, records, codebooks, scale, rotary, window)
