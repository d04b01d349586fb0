"""The calls that `pyspec bench kernels` times: every op in the shapes of six real models.

What a case says of bytes and operations is the least that any kernel must do: each input read once, each output written
once, each multiplication done once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pyspec import ops
from pyspec.caches import cache_from_name
from pyspec.masks import BlockMask
from pyspec.measure.problems import TREE, Problem, Random, nbytes
from pyspec.measure.recurrent_cases import (
    DeltaNet,
    StateSpace,
    causal_conv_problem,
    gated_delta_problem,
    selective_state_problem,
)
from pyspec.ops.gear import BLOCK, HALF, TreeRows, attend_tree, blocks_seen, join_exact
from pyspec.ops.residual_vq import WIDTH, attend_codes
from pyspec.runners import flash_attn
from pyspec.tree import DraftTree

CONTEXT, PROMPT = 4096, 2048  # tokens before a round, tokens of a prompt
DOCUMENTS = 8  # in the prompt
DEPTH, CODES = 8, 256  # of residual VQ


@dataclass(frozen=True)
class Attention:
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


Part = Attention | StateSpace | DeltaNet

# From the models' own configurations.
MODELS: dict[str, tuple[Part, ...]] = {
    "SmolLM2-135M": (Attention(576, 1536, 9, 3, 64, 49152),),
    "Llama-3.1-8B": (Attention(4096, 14336, 32, 8, 128, 128256),),
    "Qwen2.5-32B": (Attention(5120, 27648, 40, 8, 128, 152064),),
    "Mamba-2 2.7B": (StateSpace(2560, 80, 64, 128),),
    "Qwen3.5 0.8B": (DeltaNet(16, 128, 16, 128),),
    "Falcon-H1 1.5B": (Attention(2048, 4096, 8, 2, 128, 65537), StateSpace(2048, 48, 64, 256)),
}


@dataclass(frozen=True)
class Case:
    op: str
    model: str
    shape: str
    make: Callable[[str], Problem]  # from a device


def _tree(device: str) -> tuple[Tensor, Tensor]:
    """Ancestor bits [1, T, 1] and what each node sees of the tree [T, T] bool: two children a node."""
    tree = DraftTree([0] * TREE, [(node - 1) // 2 if node else -1 for node in range(TREE)])
    bits = torch.from_numpy(tree.ancestor_bits)
    sees = (bits >> torch.arange(TREE, device="cpu")) & 1 == 1
    return bits[None].to(device), sees.to(device)


# ==== attention ====


def _flash_attn(name: str, q: Tensor, make: Callable[[], Callable]) -> dict[str, Callable]:
    """The call of flash-attn that make gives, as a peer; none where flash-attn cannot run."""
    return {name: make()} if flash_attn.why_not(q.dtype, q.device) is None else {}


def _tree_attention(a: Attention, device: str) -> Problem:
    random = Random(device)
    q = random(1, a.heads, TREE, a.head_dim, dtype=torch.bfloat16)
    k, v = (random(1, a.kv_heads, CONTEXT + TREE, a.head_dim, dtype=torch.bfloat16) for _ in "kv")
    bits, sees = _tree(device)
    lens = torch.tensor([CONTEXT], dtype=torch.int32, device=device)
    mask = torch.cat([torch.ones(TREE, CONTEXT, dtype=torch.bool, device=device), sees], 1)
    return Problem(
        lambda: ops.tree_attention(q, k, v, bits, lens),
        bytes=nbytes(q, k, v, q),
        operations=4 * a.heads * int(mask.sum()) * a.head_dim,
        tolerance=2e-2,
        peers={"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)}
        # which takes no mask of a tree
        | _flash_attn("flash-attn, a chain", q, lambda: partial(flash_attn.attention, q, k, v)),
        dtype=torch.bfloat16,
    )


def _block_masked_attention(a: Attention, device: str) -> Problem:
    random = Random(device)
    q = random(1, a.heads, PROMPT, a.head_dim, dtype=torch.bfloat16)
    k, v = (random(1, a.kv_heads, PROMPT, a.head_dim, dtype=torch.bfloat16) for _ in "kv")
    mask = BlockMask.from_documents([PROMPT // DOCUMENTS] * DOCUMENTS, device=device)
    dense = mask.to_dense()[0, 0]
    return Problem(
        lambda: ops.block_masked_attention(q, k, v, mask),
        bytes=nbytes(q, k, v, q),
        operations=4 * a.heads * int(dense.sum()) * a.head_dim,
        tolerance=2e-2,
        peers={"sdpa": lambda: F.scaled_dot_product_attention(q, k, v, dense, enable_gqa=True)}
        | _flash_attn("flash-attn", q, lambda: flash_attn.documents(q, k, v, PROMPT // DOCUMENTS)),
        dtype=torch.bfloat16,
    )


def _quantised_attention(a: Attention, device: str, encode: Callable, attend: Callable, operations: int) -> Problem:
    """One row over quantised blocks and the exact keys behind them; a window of half a block stays exact."""
    random = Random(device)
    q = random(1, a.heads, 1, a.head_dim, dtype=torch.bfloat16)
    k, v = (random(1, a.kv_heads, CONTEXT + BLOCK, a.head_dim, dtype=torch.bfloat16) for _ in "kv")
    blocks = blocks_seen(CONTEXT, HALF)
    quantised = encode(k[:, :, : blocks * BLOCK].contiguous(), v[:, :, : blocks * BLOCK].contiguous())
    tail = [x[:, :, blocks * BLOCK :].contiguous() for x in (k, v)]
    bits = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    lens = torch.tensor([CONTEXT], dtype=torch.int32, device=device)
    rows = TreeRows.of(bits, lens, HALF)  # once a round, for all layers
    seen = [x[:, :, : CONTEXT + 1] for x in (k, v)]
    return Problem(
        lambda: attend(q, quantised, *tail, rows),
        bytes=nbytes(q, quantised, q) + 4 * a.kv_heads * (CONTEXT - blocks * BLOCK) * a.head_dim,
        operations=operations,
        tolerance=2e-2,
        peers={"dense tree_attention": lambda: ops.tree_attention(q, k, v, bits, lens)}
        | _flash_attn("dense flash-attn", q, lambda: partial(flash_attn.attention, q, *seen)),
        dtype=torch.bfloat16,
    )


def _gear(a: Attention, device: str, cache: str = "gear-4bit") -> Problem:
    format = cache_from_name(cache)
    return _quantised_attention(
        a,
        device,
        lambda k, v: ops.gear_encode(k, v, format),
        lambda q, quantised, k, v, rows: attend_tree(q, quantised, k, v, rows, format, a.head_dim**-0.5)[0],
        operations=4 * a.heads * CONTEXT * a.head_dim,
    )


def _residual_vq(a: Attention, device: str) -> Problem:
    codebooks = Random(device)(2, DEPTH, CODES, WIDTH, dtype=torch.float16, scale=0.5)
    adds = 2 * a.heads * CONTEXT * a.head_dim // WIDTH * DEPTH  # of table entries and of masses

    def attend(q: Tensor, quantised: Tensor, k: Tensor, v: Tensor, rows: TreeRows) -> Tensor:
        scale = a.head_dim**-0.5
        return join_exact(attend_codes(q, quantised, rows, codebooks, scale), q, k, v, rows, scale)[0]

    return _quantised_attention(
        a,
        device,
        lambda k, v: ops.residual_vq_encode(k, v, codebooks),
        attend,
        operations=adds + 4 * a.heads * a.head_dim * DEPTH * CODES,
    )


# ==== rows ====


def _linear(a: Attention | StateSpace, rows: int, weight_dtype: torch.dtype | str, device: str) -> Problem:
    """The down projection of a layer, or the inputs and gates of a state space layer."""
    outputs, inputs = (a.hidden, a.intermediate) if isinstance(a, Attention) else (2 * a.channels, a.hidden)
    random = Random(device)
    is_quantised = weight_dtype in (torch.int8, "int4")  # any floats go with them
    dtype = (torch.float32 if device == "cpu" else torch.bfloat16) if is_quantised else weight_dtype
    weight, x = random(outputs, inputs, dtype=dtype, scale=inputs**-0.5), random(rows, inputs, dtype=dtype)
    laid_out = ops.lay_out_weight(weight, weight_dtype)
    peer = weight.to(torch.bfloat16)
    rows_of_peer = x.to(torch.bfloat16)
    return Problem(
        lambda: ops.linear(x, laid_out),
        bytes=laid_out.nbytes + x.nbytes + rows * outputs * x.element_size(),
        operations=2 * rows * outputs * inputs,
        tolerance=2e-2,
        peers={"torch bf16": lambda: F.linear(rows_of_peer, peer)},
        dtype=torch.int8 if is_quantised and device == "cpu" else dtype,
    )


def _row_statistics(a: Attention, device: str) -> Problem:
    logits = Random(device)(TREE, a.vocab, scale=3.0)
    return Problem(
        lambda: ops.row_statistics(logits).log_sum_exp,
        bytes=logits.nbytes,
        operations=4 * logits.numel(),
        peers={"torch logsumexp + topk": lambda: (logits.logsumexp(1), logits.topk(8, 1))},
    )


def _topk(a: Attention, device: str) -> Problem:
    x = Random(device)(TREE, a.vocab)
    return Problem(
        lambda: ops.topk(x, 64, sorted=True).values,
        bytes=x.nbytes,
        operations=x.numel(),
        peers={"torch.topk": lambda: x.topk(64)},
    )


def _rms_norm(a: Attention | StateSpace, device: str) -> Problem:
    random = Random(device)
    hidden, delta, weight = random(TREE, a.hidden), random(TREE, a.hidden, scale=1e-3), random(a.hidden)
    kept = hidden.clone()
    return Problem(
        lambda: ops.rms_norm(hidden, weight, 1e-5, delta=delta, out_dtype=torch.bfloat16),
        bytes=2 * hidden.nbytes + delta.nbytes + weight.nbytes + hidden.nbytes // 2,
        operations=5 * hidden.numel(),
        tolerance=2e-2,
        peers={"torch": lambda: F.rms_norm(hidden + delta, (a.hidden,), weight, 1e-5).bfloat16()},
        fresh=lambda: hidden.copy_(kept),
    )


def _swiglu(a: Attention, device: str) -> Problem:
    gate_up = Random(device)(TREE, 2 * a.intermediate)
    return Problem(
        lambda: ops.swiglu(gate_up),
        bytes=gate_up.nbytes * 3 // 2,
        operations=5 * gate_up.numel() // 2,
        peers={"torch": lambda: F.silu(gate_up[:, : a.intermediate]) * gate_up[:, a.intermediate :]},
    )


# ==== all ====

_Builder = tuple[str, Callable[[Part, str], Problem]]  # what the shape is called, and the maker


def _described(part: Part) -> dict[str, list[_Builder]]:
    """Describes the calls of each op that a part of a model runs."""
    after = f"{TREE // 2} drafts after 4 accepted"
    if isinstance(part, DeltaNet):
        round = f"{after}, {part.heads}/{part.key_heads} heads of {part.head_dim}, keys of {part.state}"
        return {"gated_delta": [(round, gated_delta_problem)], "causal_conv": [(after, causal_conv_problem)]}
    product = f"{part.intermediate} to {part.hidden}" if isinstance(part, Attention) else f"{part.hidden} to in and z"
    wide = [
        (
            f"{product}, {rows} row{'s' * (rows > 1)}, {name}",
            lambda p, d, rows=rows, dtype=dtype: _linear(p, rows, dtype, d),
        )
        for name, dtype in (("bf16", torch.bfloat16), ("int8", torch.int8), ("int4", "int4"))
        for rows in (1, TREE)
    ]
    norm = (f"{TREE} rows of {part.hidden}", _rms_norm)
    if isinstance(part, StateSpace):
        round = f"{after}, {part.heads} heads, state {part.state}"
        return {
            "selective_state": [(round, selective_state_problem)],
            "causal_conv": [(after, causal_conv_problem)],
            "linear": wide,
            "rms_norm": [norm],
        }
    heads = f"{part.heads}/{part.kv_heads} heads of {part.head_dim}"
    return {
        "tree_attention": [(f"{TREE} nodes behind {CONTEXT}, {heads}", _tree_attention)],
        "block_masked_attention": [(f"{DOCUMENTS} documents, {PROMPT} tokens, {heads}", _block_masked_attention)],
        "gear": [
            (f"{cache}, 1 row behind {CONTEXT}, {heads}", lambda p, d, cache=cache: _gear(p, d, cache))
            for cache in ("gear-4bit", "gear-2bit")
        ],
        "residual_vq": [(f"{DEPTH} x {CODES} codes, 1 row behind {CONTEXT}, {heads}", _residual_vq)],
        "linear": wide,
        "row_statistics": [(f"{TREE} rows of {part.vocab}", _row_statistics)],
        "topk": [(f"64 of {part.vocab}, {TREE} rows", _topk)],
        "rms_norm": [norm],
        "swiglu": [(f"{TREE} rows of {part.intermediate}", _swiglu)],
    }


OPS = tuple(dict.fromkeys(op for parts in MODELS.values() for part in parts for op in _described(part)))


def cases(wanted: tuple[str, ...] = OPS) -> Iterator[Case]:
    """The cases of some ops, op by op."""
    for op in OPS:
        if op not in wanted:
            continue
        for model, parts in MODELS.items():
            found = {}  # by shape: both parts of a hybrid have the norms of one width
            for part in parts:
                for shape, maker in _described(part).get(op, ()):
                    make = lambda device, maker=maker, part=part: maker(part, device)  # noqa: E731
                    found.setdefault(shape, Case(op, model, shape, make))
            yield from found.values()
