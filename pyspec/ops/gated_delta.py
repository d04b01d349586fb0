"""gated_delta: the recurrence of gated delta nets over the nodes of draft trees, with activation replay.

A head's state is a matrix of N keys by head_dim values. Along the path to node t, with q and k brought to length 1,

    u = beta (v - k . (d s)),    s[t] = d s[parent of t] + k u,    y[t] = q . s[t] / sqrt(N)

with d = e^(A softplus(decay)), one for a head or, in Kimi's delta attention, one for each of its keys, and beta after
a sigmoid: what the state answers to k is moved towards v. As in selective_state no node's state is ever written: k, u
and d are recorded, about a hundredth of a state. It is u that is recorded and not v, because u knows the state that it
corrected: a replay is then free of sums, and takes the very steps that plain decoding takes.

Yang, Kautz and Hatamizadeh, Gated Delta Networks (arXiv 2412.06464); Kimi Linear (arXiv 2510.26692).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.ops._checks import check_are_tensors, check_contiguous, check_floating, check_tensors
from pyspec.ops._library import Op
from pyspec.ops.selective_state import LANES, MULTIPLE, Round, check_is_round

EPSILON = 1e-6  # added to the squared lengths of q and k, as Flash Linear Attention does


def gated_delta_reference(
    state: Tensor,
    record: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    sequences: Tensor,
    starts: Tensor,
    parents: Tensor,
    paths: Tensor,
    halves: Tensor,
    advances: Tensor,
    strength: float,
    tiled: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch, node by node; state and record are changed in place. The specification of the kernels."""
    _, panels, keys, _ = state.shape
    rows, channels = v.shape
    q, k, v, beta = _unit(q, keys), _unit(k, keys), v.float(), strength * torch.sigmoid(beta)
    rate = F.softplus(decay if dt_bias is None else decay + dt_bias, threshold=50.0)
    d = torch.exp(A[:, None] * rate.view(rows, len(A), -1)).flatten(1)
    y = torch.empty_like(v)

    key_heads = k.shape[1] // keys
    heads = torch.arange(len(A), device=A.device).repeat_interleave(panels // len(A))  # of each panel
    key_heads = heads % key_heads if tiled else heads // (len(A) // key_heads)

    def for_panels(values: Tensor, size: int, of: Tensor) -> Tensor:
        """What each panel has of values, of which a head has `size`: [channels / 16, size, 1]."""
        return values.view(-1, size)[of][..., None]

    def step(s: Tensor, node: Tensor) -> Tensor:
        k, u, d = node.split([q.shape[1], channels, decay.shape[1]])
        return decayed(s, d) + for_panels(k, keys, key_heads) * u.view(-1, 1, LANES)

    def decayed(s: Tensor, d: Tensor) -> Tensor:
        return s * for_panels(d, len(d) // len(A), heads)

    for tree, sequence in enumerate(sequences.tolist()):
        first, last, half = int(starts[tree]), int(starts[tree + 1]), int(halves[tree])
        s = state[sequence]
        for node in paths[tree].tolist():
            if node >= 0:
                s = step(s, record[half, sequence, node])
        reached = []
        for row, parent in zip(range(first, last), parents[first:last].tolist(), strict=True):
            above = reached[parent] if parent >= 0 else s
            answer = (decayed(above, d[row]) * for_panels(k[row], keys, key_heads)).sum(1).flatten()
            u = (v[row] - answer) * beta[row].repeat_interleave(channels // len(A))
            node = torch.cat((k[row], u, d[row]))
            reached.append(step(above, node))
            y[row] = (reached[-1] * for_panels(q[row], keys, key_heads)).sum(1).flatten() / keys**0.5
            if not advances[tree]:
                record[1 - half, sequence, row - first] = node
        state[sequence] = reached[-1] if advances[tree] and reached else s
    return y.to(out_dtype)


def _unit(x: Tensor, keys: int) -> Tensor:
    x = x.float().unflatten(1, (-1, keys))
    return (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)).flatten(1)


def _fake(state, record, q, k, v, *rest) -> Tensor:
    return v.new_empty(v.shape, dtype=rest[-1])


def _check_round(state, record, q, k, v, decay, beta, A, dt_bias, *rest) -> None:
    Round(*rest[:6]).check(len(v), len(state), record.shape[2])


_OP = Op(
    "gated_delta",
    "(Tensor(a!) state, Tensor(b!) record, Tensor q, Tensor k, Tensor v, Tensor decay, Tensor beta, Tensor A, "
    "Tensor? dt_bias, Tensor sequences, Tensor starts, Tensor parents, Tensor paths, Tensor halves, Tensor advances, "
    "float strength, bool tiled, ScalarType out_dtype) -> Tensor",
    gated_delta_reference,
    _fake,
    cuda=True,
    check=_check_round,
)


def gated_delta(
    state: Tensor,
    record: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    A: Tensor,
    round: Round,
    *,
    dt_bias: Tensor | None = None,
    strength: float = 1.0,
    tiled: bool = False,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Replays what was accepted of the last round, stores the state, and verifies this round's nodes from there.

    A node has the bits of plain decoding along its path, and so has the state behind a replay.

    Args:
        state: [S, channels / 16, N, 16] fp32, contiguous (`pyspec.ops.selective_state.to_panels` of heads one behind
            the other, each [head_dim, N]); head_dim and N multiples of 16. Changed where there is a path, or a tree
            that advances.
        record: [2, S, nodes, key_heads * N + channels + decays] fp32, contiguous: room for the nodes of the largest
            tree.
        q, k: [R, key_heads * N] fp32, fp16 or bf16, not yet of length 1; one serves heads / key_heads neighbouring
            heads, or with tiled those of every key_heads-th place, head h's being h % key_heads.
        v: [R, channels] like q, channels = heads * head_dim.
        decay: [R, decays] fp32, before dt_bias and softplus; decays is heads, or heads * N with one for each key.
        beta: [R, heads] fp32, before the sigmoid.
        A: [heads] fp32, negative.
        round: the trees whose nodes the R rows are, and what to replay.
        dt_bias: [decays] fp32 or None.
        strength: of a correction, in (0, 2]: beta is strength * sigmoid(beta). 2 lets a state change its sign.
        tiled: how heads share those of q and k; files of llama.cpp have them so.
        out_dtype: fp32, fp16 or bf16.

    Returns:
        [R, channels] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype, a shape or strength does not fit; the message names the argument. On the CPU
            also when what round holds does not: a sequence twice, a node or a half that is not there.
        RuntimeError: an argument requires a gradient.
    """
    given = {"state": state, "record": record, "q": q, "k": k, "v": v, "decay": decay, "beta": beta, "A": A}
    check_are_tensors(**given, dt_bias=dt_bias, optional=("dt_bias",))
    check_is_round(round)
    if state.dim() != 4 or state.shape[3] != LANES or state.shape[2] % MULTIPLE or not state.shape[2]:
        raise ValueError(
            f"state must be [sequences, channels / {LANES}, N, {LANES}] with N a multiple of {MULTIPLE}, "
            f"got {tuple(state.shape)}"
        )
    (sequences, panels, keys, _), heads = state.shape, A.numel()
    for name, tensor in (("q", q), ("v", v), ("decay", decay)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be [rows, ...], got shape {tuple(tensor.shape)}")
    rows, channels, key_heads, decays = len(v), panels * LANES, q.shape[1] // keys, decay.shape[1]
    if not heads or channels % (heads * LANES):
        raise ValueError(f"A must have heads of a multiple of {LANES} channels, got {heads} for {channels}")
    if not key_heads or heads % key_heads:
        raise ValueError(f"q must have key heads of {keys} that divide the {heads} heads, got {q.shape[1]} numbers")
    if decays not in (heads, heads * keys):
        raise ValueError(f"decay must be [rows, {heads}] or [rows, {heads * keys}], got {tuple(decay.shape)}")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 2:
        raise ValueError(f"strength must be in (0, 2], got {strength!r}")
    if not isinstance(tiled, bool):
        raise TypeError(f"tiled must be True or False, got {tiled!r}")
    for name, dtype in (("v", v.dtype), ("out_dtype", out_dtype)):
        check_floating(name, dtype)
    nodes = record.shape[2] if record.dim() == 4 else 0
    check_tensors(
        "state",
        state,
        ("state", state, torch.float32, state.shape),
        ("record", record, torch.float32, (2, sequences, nodes, key_heads * keys + channels + decays)),
        ("q", q, v.dtype, (rows, key_heads * keys)),
        ("k", k, v.dtype, (rows, key_heads * keys)),
        ("v", v, v.dtype, (rows, channels)),
        ("decay", decay, torch.float32, (rows, decays)),
        ("beta", beta, torch.float32, (rows, heads)),
        ("A", A, torch.float32, (heads,)),
        ("dt_bias", dt_bias, torch.float32, (decays,)),
    )
    check_contiguous(state=state, record=record, A=A, dt_bias=dt_bias)
    for name, tensor in [*given.items()][2:7]:
        if tensor.stride(1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
    return _OP(state, record, q, k, v, decay, beta, A, dt_bias, *round.tensors(), float(strength), tiled, out_dtype)
