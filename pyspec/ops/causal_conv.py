"""causal_conv: the short convolution before a recurrence, over each node's ancestors.

out[t] = silu(bias + sum over taps i of weight[taps - 1 - i] x[the ancestor of t that is i above it])

Some models leave silu out, and have no recurrence behind it.
Above the root lies a window of the last committed inputs. As in selective_state, a round's inputs are recorded, and
the next call takes what was accepted of them into the window before it begins.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_floating, check_tensors
from pyspec.ops._library import Op
from pyspec.ops.selective_state import Round, check_is_round

LANES = 16
MOST_TAPS = 8


def causal_conv_reference(
    window: Tensor,
    record: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sequences: Tensor,
    starts: Tensor,
    parents: Tensor,
    paths: Tensor,
    halves: Tensor,
    advances: Tensor,
    out_dtype: torch.dtype,
    is_linear: bool = False,
) -> Tensor:
    """Plain PyTorch, node by node; window and record are changed in place. The specification of the kernels."""
    taps = len(weight)
    out = torch.empty_like(x)
    for tree, sequence in enumerate(sequences.tolist()):
        first, last, half = int(starts[tree]), int(starts[tree + 1]), int(halves[tree])
        path = [node for node in paths[tree].tolist() if node >= 0]
        before = torch.cat((window[sequence], record[half, sequence, path]))
        before = before[len(before) - (taps - 1) :]
        seen = []  # of each node, the inputs that its taps see
        for row, parent in zip(range(first, last), parents[first:last].tolist(), strict=True):
            above = seen[parent][1:] if parent >= 0 else before
            seen.append(torch.cat((above, x[row, None])))
            out[row] = (seen[-1] * weight).sum(0)
        if advances[tree]:
            before = seen[-1][1:] if seen else before
        else:
            record[1 - half, sequence, : last - first] = x[first:last]
        window[sequence] = before
    out = out if bias is None else out + bias
    return (out if is_linear else F.silu(out)).to(out_dtype)


def _fake(window, record, x, weight, bias, *rest) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[6])


def _check_round(window, record, x, weight, bias, *rest) -> None:
    Round(*rest[:6]).check(len(x), len(window), record.shape[2])


_OP = Op(
    "causal_conv",
    "(Tensor(a!) window, Tensor(b!) record, Tensor x, Tensor weight, Tensor? bias, Tensor sequences, Tensor starts, "
    "Tensor parents, Tensor paths, Tensor halves, Tensor advances, ScalarType out_dtype, bool is_linear=False) "
    "-> Tensor",
    causal_conv_reference,
    _fake,
    cuda=True,
    check=_check_round,
)


def causal_conv(
    window: Tensor,
    record: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    round: Round,
    *,
    out_dtype: torch.dtype = torch.float32,
    is_linear: bool = False,
) -> Tensor:
    """Moves the window behind what was accepted of the last round, and convolves this round's nodes.

    A node has the bits of plain decoding along its path, whatever is beside it.

    Args:
        window: [S, taps - 1, channels] fp32, contiguous: inputs before the next, newest last. Zeros at the start.
        record: [2, S, nodes, channels] fp32, contiguous: room for the nodes of the largest tree.
        x: [R, channels] fp32 with a contiguous last dimension; channels a multiple of 16.
        weight: [taps, channels] fp32, contiguous; the last tap is the node's own input. At most 8 taps.
        bias: [channels] fp32 or None.
        round: the trees whose nodes the R rows are, and what to replay.
        out_dtype: fp32, fp16 or bf16.
        is_linear: whether silu is left out.

    Returns:
        [R, channels] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument. On the CPU also when what
            round holds does not: a sequence twice, a node or a half that is not there.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(window=window, record=record, x=x, weight=weight, bias=bias, optional=("bias",))
    check_is_round(round)
    if weight.dim() != 2 or not 1 <= len(weight) <= MOST_TAPS or weight.shape[1] % LANES:
        raise ValueError(
            f"weight must be [1 to {MOST_TAPS} taps, a multiple of {LANES} channels], got {tuple(weight.shape)}"
        )
    taps, channels = weight.shape
    sequences = len(window)
    nodes = record.shape[2] if record.dim() == 4 else 0
    check_tensors(
        "window",
        window,
        ("window", window, torch.float32, (sequences, taps - 1, channels)),
        ("record", record, torch.float32, (2, sequences, nodes, channels)),
        ("x", x, torch.float32, (len(x), channels)),
        ("weight", weight, torch.float32, (taps, channels)),
        ("bias", bias, torch.float32, (channels,)),
    )
    check_contiguous(window=window, record=record, weight=weight, bias=bias)
    if x.stride(1) != 1:
        raise ValueError(f"x must have a contiguous last dimension, got strides {x.stride()}")
    check_floating("out_dtype", out_dtype)
    return _OP(window, record, x, weight, bias, *round.tensors(), out_dtype, is_linear)
