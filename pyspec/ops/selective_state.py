"""selective_state: the recurrence of Mamba and Mamba-2 over the nodes of draft trees, with activation replay.

For a channel and one of its states, along the path to node t,

    s[t] = e^(dt[t] A) s[parent of t] + dt[t] x[t] B[t],    y[t] = sum over states of C[t] s[t] + D x[t]

with dt after softplus. The committed state is what the path starts from, and no node's state is ever written: the
inputs of a round's nodes (x, dt, B) are recorded instead, which is some 240 times less in Mamba-2, and when some of
them are accepted, the next call replays them before it begins. Each call thus reads the state once and writes it
once, like a step of plain decoding, and a replay takes the very steps that plain decoding would have taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec.arguments import described
from pyspec.ops._checks import BadData, check_are_tensors, check_contiguous, check_floating, check_tensors
from pyspec.ops._library import Op
from pyspec.tree import DraftTree

LANES = 16  # channels of a panel
MULTIPLE = 16  # of states


@dataclass(frozen=True)
class Round:
    """Which trees a call reads, and what of the last round is replayed first. All tensors are int32.

    A sequence has a record of two halves. Its accepted nodes are replayed from one, and those of its tree go to the
    other. Sequences that are not named are left alone, to the bit.
    """

    sequences: Tensor  #: [trees]: places in the state, each at most once
    starts: Tensor  #: [trees + 1]: the nodes of tree i are rows starts[i] .. starts[i + 1] - 1
    parents: Tensor  #: [rows]: as in DraftTree
    paths: Tensor  #: [trees, longest]: recorded nodes that were accepted, then -1
    halves: Tensor  #: [trees]: the half of the record that they lie in, 0 or 1
    advances: Tensor  #: [trees]: 1 for a chain that is accepted as a whole; the state moves behind it, unrecorded

    @classmethod
    def of(
        cls,
        trees: Sequence[DraftTree],
        sequences: Sequence[int],
        paths: Sequence[Sequence[int]],
        halves: Sequence[int],
        *,
        advances: Sequence[bool] | bool = False,
        device: torch.device | str = "cpu",
    ) -> Round:
        """A round of these trees, with a sequence, a path (it may be empty) and a half for each, and who advances."""
        starts = [0]
        for tree in trees:
            starts.append(starts[-1] + len(tree))
        longest = max(map(len, paths), default=0)
        filled = [[*path, *[-1] * (longest - len(path))] for path in paths]

        def places(values, *shape: int) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device="cpu").reshape(shape)

        parents = [torch.from_numpy(tree.parents) for tree in trees]
        round = cls(
            places(list(sequences), len(trees)),
            places(starts, len(starts)),
            parents[0] if len(parents) == 1 else torch.cat(parents),
            places(filled, len(trees), longest),
            places(list(halves), len(trees)),
            places([advances] * len(trees) if isinstance(advances, bool) else list(advances), len(trees)),
        )
        return round if torch.device(device).type == "cpu" else round.to(device)

    def to(self, device: torch.device | str) -> Round:
        """The round on another device, in one copy."""
        tensors = self.tensors()
        parts = torch.cat([tensor.flatten() for tensor in tensors]).to(device).split([t.numel() for t in tensors])
        return Round(*(part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)))

    def check(self, rows: int, sequences: int, record_nodes: int) -> None:
        """Raises BadData unless a round has so many rows, sequences of the state, and nodes that the record holds."""
        trees, starts = len(self.sequences), self.starts.tolist()
        for name in ("starts", "paths", "halves", "advances"):
            if len(getattr(self, name)) != trees + (name == "starts"):
                raise BadData(f"{name} must be for {trees} sequences, got shape {tuple(getattr(self, name).shape)}")
        if len(self.parents) != rows:
            raise BadData(f"parents must have one entry for each of the {rows} rows, got {len(self.parents)}")
        if starts[0] != 0 or starts[-1] != rows or any(b < a for a, b in pairwise(starts)):
            raise BadData(f"starts must go from 0 to {rows}, got {starts}")
        places = self.sequences.tolist()
        for i, place in enumerate(places):
            if not 0 <= place < sequences or place in places[:i]:
                raise BadData(f"sequences[{i}] is {place}, must be in [0, {sequences}) and there once")
            first, end = starts[i], starts[i + 1]
            advances, half = int(self.advances[i]), int(self.halves[i])
            if advances not in (0, 1) or half not in (0, 1):
                raise BadData(f"advances[{i}] and halves[{i}] must be 0 or 1, got {advances} and {half}")
            if not advances and end - first > record_nodes:
                raise BadData(f"tree {i} has {end - first} nodes, the record has room for {record_nodes}")
            for node, parent in enumerate(self.parents[first:end].tolist()):
                fits = parent == node - 1 if advances or not node else 0 <= parent < node
                if not fits:
                    chain = ", a chain that is accepted must have the node before" if advances else ""
                    raise BadData(f"parents of tree {i}: node {node} has parent {parent}{chain}")
            path = self.paths[i].tolist()
            ended = path.index(-1) if -1 in path else len(path)
            for place, node in enumerate(path):
                if node != -1 if place >= ended else not 0 <= node < record_nodes:
                    raise BadData(
                        f"paths[{i}][{place}] is {node}, must be a recorded node, of {record_nodes}, or -1 behind the "
                        "last"
                    )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors, in the order in which the ops take them."""
        return self.sequences, self.starts, self.parents, self.paths, self.halves, self.advances


def to_panels(values: Tensor) -> Tensor:
    """Lays out states [..., channels, N] as they lie in memory: [..., channels / 16, N, 16]."""
    return values.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def from_panels(panels: Tensor) -> Tensor:
    """States [..., channels, N] out of panels [..., channels / 16, N, 16]."""
    return panels.transpose(-1, -2).flatten(-3, -2)


def selective_state_reference(
    state: Tensor,
    record: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    z: Tensor | None,
    sequences: Tensor,
    starts: Tensor,
    parents: Tensor,
    paths: Tensor,
    halves: Tensor,
    advances: Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """Plain PyTorch, node by node; state and record are changed in place. The specification of the kernels."""
    channels, heads, states = x.shape[1], dt.shape[1], state.shape[2]
    x, B, C = x.float(), B.float(), C.float()
    dt = F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=50.0)
    nodes = torch.cat((x, dt, B), 1)  # as they are recorded
    y = torch.empty_like(x)

    def of_channels(values: Tensor) -> Tensor:
        """Repeats values [heads or groups, ...] for each channel, in panels."""
        return values.repeat_interleave(channels // len(values), 0).unflatten(0, (-1, LANES)).transpose(1, -1)

    rates = A if A.dim() == 3 else of_channels(A[:, None])  # [channels / 16, N or 1, 16]

    def step(s: Tensor, node: Tensor) -> Tensor:
        x, dt, B = node.split([channels, heads, B_size])
        dt = of_channels(dt[:, None])
        return s * torch.exp(dt * rates) + dt * x.view(-1, 1, LANES) * of_channels(B.view(-1, states))

    B_size = B.shape[1]
    for tree, sequence in enumerate(sequences.tolist()):
        first, last, half = int(starts[tree]), int(starts[tree + 1]), int(halves[tree])
        s = state[sequence]
        for node in paths[tree].tolist():
            if node >= 0:
                s = step(s, record[half, sequence, node])
        reached = []
        for row, parent in zip(range(first, last), parents[first:last].tolist(), strict=True):
            reached.append(step(reached[parent] if parent >= 0 else s, nodes[row]))
            y[row] = (reached[-1] * of_channels(C[row].view(-1, states))).sum(1).flatten()
        if advances[tree]:
            s = reached[-1] if reached else s
        else:
            record[1 - half, sequence, : last - first] = nodes[first:last]
        state[sequence] = s
    if D is not None:
        y += D * x
    if z is not None:
        y *= F.silu(z)
    return y.to(out_dtype)


def _fake(state, record, x, *rest) -> Tensor:
    return x.new_empty(x.shape, dtype=rest[-1])


def check_is_round(round) -> None:
    if not isinstance(round, Round):
        raise TypeError(f"round must be a Round, got {described(round)}")


def _check_round(state, record, x, dt, A, B, C, D, dt_bias, z, *rest) -> None:
    Round(*rest[:-1]).check(len(x), len(state), record.shape[2])


_OP = Op(
    "selective_state",
    "(Tensor(a!) state, Tensor(b!) record, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? dt_bias, Tensor? z, Tensor sequences, Tensor starts, Tensor parents, Tensor paths, Tensor halves, "
    "Tensor advances, ScalarType out_dtype) -> Tensor",
    selective_state_reference,
    _fake,
    cuda=True,
    check=_check_round,
)


def selective_state(
    state: Tensor,
    record: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    round: Round,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    z: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Replays what was accepted of the last round, stores the state, and verifies this round's nodes from there.

    A node has the bits of plain decoding along its path, and so has the state behind a replay.

    Args:
        state: [S, channels / 16, N, 16] fp32, contiguous (`to_panels`); N a multiple of 16. Changed where there is a
            path, or a tree that advances.
        record: [2, S, nodes, channels + heads + groups * N] fp32, contiguous: room for the nodes of the largest tree.
        x: [R, channels] fp32, fp16 or bf16.
        dt: [R, heads] fp32, before dt_bias and softplus.
        A: [heads] fp32 (Mamba-2: a head of channels / heads channels shares dt and A), or in panels
            [channels / 16, N, 16] with heads == channels (Mamba).
        B, C: [R, groups * N] like x; a group serves heads / groups neighbouring heads.
        round: the trees whose nodes the R rows are, and what to replay.
        D: [channels] fp32 or None.
        dt_bias: [heads] fp32 or None.
        z: [R, channels] fp32 or None: y is multiplied by silu(z).
        out_dtype: fp32, fp16 or bf16.

    Returns:
        [R, channels] of out_dtype.

    Raises:
        TypeError, ValueError: a dtype or shape does not fit; the message names the argument. On the CPU also when what
            round holds does not: a sequence twice, a node or a half that is not there.
        RuntimeError: an argument requires a gradient.
    """
    check_are_tensors(state=state, record=record, x=x, dt=dt, A=A, B=B, C=C)
    check_are_tensors(D=D, dt_bias=dt_bias, z=z, optional=("D", "dt_bias", "z"))
    check_is_round(round)
    if state.dim() != 4 or state.shape[3] != LANES or state.shape[2] % MULTIPLE:
        raise ValueError(
            f"state must be [sequences, channels / {LANES}, states, {LANES}] with a multiple of {MULTIPLE} states, "
            f"got {tuple(state.shape)}"
        )
    sequences, panels, states, _ = state.shape
    channels = panels * LANES
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C)):
        if tensor.dim() != 2:
            raise ValueError(f"{name} must be [rows, ...], got shape {tuple(tensor.shape)}")
    rows, heads, groups = len(x), dt.shape[1], B.shape[1] // states
    if not heads or not groups or heads % groups:
        raise ValueError(f"dt must have a multiple of the {groups} groups of B as heads, got {heads}")
    per_state = A.dim() == 3
    if per_state and (heads != channels or groups != 1):
        raise ValueError(f"A in panels needs dt [rows, {channels}] and one group, got {heads} and {groups}")
    if not per_state and channels % (heads * LANES):
        raise ValueError(f"dt must have heads of a multiple of {LANES} channels, got {heads} for {channels}")
    width = channels + heads + groups * states
    nodes = record.shape[2] if record.dim() == 4 else 0
    check_floating("x", x.dtype)
    check_floating("out_dtype", out_dtype)
    check_tensors(
        "state",
        state,
        ("state", state, torch.float32, state.shape),
        ("record", record, torch.float32, (2, sequences, nodes, width)),
        ("x", x, x.dtype, (rows, channels)),
        ("dt", dt, torch.float32, (rows, heads)),
        ("A", A, torch.float32, (panels, states, LANES) if per_state else (heads,)),
        ("B", B, x.dtype, (rows, groups * states)),
        ("C", C, x.dtype, (rows, groups * states)),
        ("D", D, torch.float32, (channels,)),
        ("dt_bias", dt_bias, torch.float32, (heads,)),
        ("z", z, torch.float32, (rows, channels)),
    )
    check_contiguous(state=state, record=record, A=A)
    for name, tensor in (("x", x), ("dt", dt), ("B", B), ("C", C), ("z", z)):
        if tensor is not None and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have a contiguous last dimension, got strides {tensor.stride()}")
    return _OP(state, record, x, dt, A, B, C, D, dt_bias, z, *round.tensors(), out_dtype)
