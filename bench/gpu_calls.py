"""The calls of GPU kernels that compiled_kernels.py compiles: launchers with tensors of real shapes, as on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyspec.kernels.block_masked_attention import block_masked_attention
from pyspec.kernels.gear import gear
from pyspec.kernels.linear import linear
from pyspec.kernels.linear_codes import linear_codes
from pyspec.kernels.merge_attention import merge_attention
from pyspec.kernels.rms_norm import rms_norm
from pyspec.kernels.rotary_write import rotary_write
from pyspec.kernels.row_statistics import row_statistics
from pyspec.kernels.swiglu import swiglu
from pyspec.kernels.tree_attention import tree_attention
from pyspec.ops import linear_codes_tiles
from pyspec.ops.gear_format import GearFormat
from pyspec.ops.residual_vq import ResidualVqFormat
from pyspec.ops.selective_state import Round
from pyspec.ops.weight_formats import FORMATS
from pyspec.tree import DraftTree

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
INT32, BYTES = torch.int32, torch.uint8


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


@dataclass(frozen=True)
class Call:
    """A call of an op, and how many tiles all programs of a kernel go through in it, where that is known."""

    run: Callable[[], object]
    tiles: dict[str, float] = field(default_factory=dict)
    source: str = ""  # of CUDA C++: run takes the op, which tests/helpers/cuda_on_host.py runs on the CPU


def attend_to_tree(nodes, prefix, dtype=BF16, heads=32, kv_heads=8, head_dim=128, window=None, softcap=None, page=None):
    slots = prefix + nodes
    words, group = -(-nodes // 32), heads // kv_heads
    rows = 64 if dtype == BF16 and head_dim <= 128 else 16  # of a program
    sets = -(-group // rows) * -(-nodes // (rows // min(group, rows)))

    def run():
        q = new(1, nodes, heads, head_dim, dtype=dtype).transpose(1, 2)
        cache, table = new(2, 1, kv_heads, slots, head_dim, dtype=dtype), None
        if page:
            cache = new(2, -(-slots // page), kv_heads, page, head_dim, dtype=dtype)
            table = new(1, cache.shape[1], dtype=INT32)
        places = new(1, nodes, words, dtype=INT32), new(1, dtype=INT32)
        return tree_attention(q, *cache, *places, head_dim**-0.5, softcap, window, table)

    seen = min(prefix, window or prefix)
    return Call(run, {"fold_kernel": kv_heads * seen // 64 * sets, "finish_kernel": kv_heads * nodes * -(-group // 16)})


def project(rows, outputs, inputs, dtype=BF16, out_dtype=FP32):
    def run():
        groups = -(-inputs // 32)
        row_bytes = 32 * groups + 2 * (groups + -groups % 8)
        weight = new(outputs, row_bytes, dtype=BYTES) if dtype == BYTES else new(outputs, inputs, dtype=dtype)
        return linear(new(rows, inputs, dtype=FP32 if dtype == FP32 else BF16), weight, None, outputs, out_dtype)

    kernel, tile = ("int8_kernel", 128 * 128) if dtype == BYTES else ("float_kernel", 64 * 64)
    sets = -(-rows // (64 if dtype == BF16 else 16))
    return Call(run, {kernel: outputs * inputs / tile * sets})


def project_codes(name, rows, outputs, inputs):
    """Of a weight in one of the formats of 4 bits."""
    format = FORMATS[name]

    def run():
        tiles = -(-outputs // linear_codes_tiles.OUTPUTS), -(-inputs // linear_codes_tiles.tile_inputs(format))
        weight = new(*tiles, linear_codes_tiles.tile_bytes(format), dtype=BYTES)
        return linear_codes(new(rows, inputs), weight, None, outputs, format, FP32)

    return Call(run, {"codes_kernel": outputs * inputs / (128 * linear_codes_tiles.tile_inputs(format))})


def read_statistics(rows, vocab):
    return Call(lambda: row_statistics(new(rows, vocab, dtype=FP32), None))


def attend_to_records(nodes, tokens, format, heads=32, kv_heads=8, head_dim=128):
    def run():
        quantised = new(1, kv_heads, tokens // 128, format.record_bytes(head_dim), dtype=BYTES)
        q = new(1, nodes, heads, head_dim, dtype=BF16).transpose(1, 2)
        return gear(q, quantised, new(1, nodes, dtype=INT32), *format.layout, head_dim**-0.5)

    return Call(run, {"fold_kernel": tokens // 128 * kv_heads * -(-nodes * heads // kv_heads // 16)})


def attend_to_blocks(batch, heads, rows, head_dim, dtype=BF16):
    """Causal: half of all tiles."""

    def run():
        blocks, words = rows // 128, 2
        full, partial = blocks * (blocks - 1), blocks * 2
        lists = new(1, 1, blocks, 2, dtype=INT32), new(full, dtype=INT32), new(1, 1, blocks, 2, dtype=INT32)
        lists = (*lists, new(partial, 2, dtype=INT32), new(2, words, 64, dtype=torch.int64))
        qkv = (new(batch, heads, rows, head_dim, dtype=dtype) for _ in range(3))
        return block_masked_attention(*qkv, *lists, None, None, head_dim**-0.5, None)

    tiles = batch * heads * (rows / 64) ** 2 / 2
    item_rows = (128 if head_dim <= 128 else 32) if dtype == BF16 else 16
    return Call(run, {"block_masked_attention_kernel": tiles * 64 / item_rows})


def normalise(rows, size):
    hidden = (rows, size)
    return Call(lambda: rms_norm(new(*hidden, dtype=FP32), new(*hidden, dtype=FP32), new(size, dtype=FP32), 1e-5, BF16))


def write_keys(rows, heads=32, kv_heads=8, head_dim=128):
    def run():
        qkv, cos_sin = new(rows, (heads + 2 * kv_heads) * head_dim, dtype=FP32), new(rows, 2, head_dim // 2, dtype=FP32)
        cache = new(2, 1, kv_heads, rows, head_dim)  # no more than is written
        return rotary_write(qkv, cos_sin, *(new(rows, dtype=INT32) for _ in range(3)), *cache, heads)

    return Call(run)


def merge(rows, head_dim):
    def run():
        parts = [new(rows, head_dim), new(rows, dtype=FP32)]
        return merge_attention(*parts, *parts)

    return Call(run)


def select(rows, size, k, dtype, buckets=0):
    return Call(lambda op: op(new(rows, size, dtype=dtype), k, buckets, 1, True, True, False), source="topk")


def chain_after(nodes, accepted):
    return Round.of([DraftTree.chain([0] * nodes)], [0], [list(range(accepted))], [0])


def advance(nodes, accepted, heads, channels, groups, states, per_state=False):
    """A layer's recurrence over a chain of nodes, after so many were accepted."""

    def run(op):
        wide = (new(nodes, groups * states) for _ in range(2))
        A = new(channels // 16, states, 16, dtype=FP32) if per_state else new(heads, dtype=FP32)
        state = new(1, channels // 16, states, 16, dtype=FP32)
        record = new(2, 1, nodes, channels + heads + groups * states, dtype=FP32)
        inputs = (new(nodes, channels), new(nodes, heads, dtype=FP32), A, *wide, new(channels, dtype=FP32), None, None)
        return op(state, record, *inputs, *chain_after(nodes, accepted).tensors(), BF16)

    return Call(run, source="selective_state")


def correct(nodes, accepted, heads, head_dim, key_heads, keys, per_key=False):
    """A gated delta net over a chain of nodes, after so many were accepted."""

    def run(op):
        channels, decays = heads * head_dim, heads * (keys if per_key else 1)
        state = new(1, channels // 16, keys, 16, dtype=FP32)
        record = new(2, 1, nodes, key_heads * keys + channels + decays, dtype=FP32)
        inputs = [new(nodes, key_heads * keys), new(nodes, key_heads * keys), new(nodes, channels)]
        inputs += [new(nodes, size, dtype=FP32) for size in (decays, heads)] + [new(heads, dtype=FP32), None]
        return op(state, record, *inputs, *chain_after(nodes, accepted).tensors(), 1.0, False, BF16)

    return Call(run, source="gated_delta")


def convolve(nodes, accepted, channels, taps=4):
    def run(op):
        inputs = (new(nodes, channels, dtype=FP32), new(taps, channels, dtype=FP32), new(channels, dtype=FP32))
        state, record = new(1, taps - 1, channels, dtype=FP32), new(2, 1, nodes, channels, dtype=FP32)
        return op(state, record, *inputs, *chain_after(nodes, accepted).tensors(), BF16)

    return Call(run, source="causal_conv")


def attend_to_codes(nodes, tokens, depth, codes, heads=32, kv_heads=8, head_dim=128):
    def run(op):
        record = ResidualVqFormat(depth, codes).record_bytes(head_dim)
        quantised, books = new(1, kv_heads, tokens // 128, record, dtype=BYTES), new(2, depth, codes, 32, dtype=FP16)
        return op(new(1, heads, nodes, head_dim), quantised, new(1, nodes, dtype=INT32), books, head_dim**-0.5, None)

    return Call(run, source="residual_vq")


CALLS = {
    "tree_attention T=1 n=4096": attend_to_tree(1, 4096),
    "tree_attention T=16 n=4096": attend_to_tree(16, 4096),
    "tree_attention T=64 n=4096": attend_to_tree(64, 4096),
    "tree_attention T=1 n=131072": attend_to_tree(1, 131072),
    "tree_attention pages, window, softcap": attend_to_tree(64, 4096, window=1000, softcap=30.0, page=16),
    "tree_attention D=64 fp32": attend_to_tree(16, 4096, FP32, 8, 4, 64),
    "tree_attention D=128 fp32": attend_to_tree(16, 4096, FP32),
    "linear bf16 14336x4096": project(16, 14336, 4096),
    "linear bf16 128256x4096": project(16, 128256, 4096, out_dtype=BF16),
    "linear fp32 4096x4096": project(16, 4096, 4096, FP32),
    "linear int8 14336x4096": project(16, 14336, 4096, BYTES),
    **{
        f"linear {name} 14336x4096, {rows} rows": project_codes(name, rows, 14336, 4096)
        for name, rows in [("q4_0", 8), ("q4_0", 64), ("int4_32", 8), ("int4_32", 16), ("q4_k", 8), ("iq4_nl", 8)]
    },
    "linear int8 128256x4096": project(16, 128256, 4096, BYTES, BF16),
    "row_statistics 16x128256": read_statistics(16, 128256),
    "gear 2 bits, rank 4, 2 outliers n=32768": attend_to_records(1, 32768, GearFormat(2, 64, rank=4, outliers=2)),
    "gear 2 bits n=32768": attend_to_records(1, 32768, GearFormat(2, 64)),
    "gear 4 bits n=32768": attend_to_records(1, 32768, GearFormat(4, 128)),
    "gear 8 bits n=32768": attend_to_records(1, 32768, GearFormat(8, 128)),
    "gear 3 bits D=96 n=4096": attend_to_records(1, 4096, GearFormat(3, 32, outliers=4), head_dim=96),
    "gear 64 channels n=4096": attend_to_records(1, 4096, GearFormat(2, 64, rank=4, outliers=2, key_channels=64)),
    "block_masked_attention D=64": attend_to_blocks(4, 32, 16384, 64),
    "block_masked_attention D=128": attend_to_blocks(4, 32, 16384, 128),
    "block_masked_attention D=256": attend_to_blocks(4, 8, 16384, 256),
    "block_masked_attention D=64 fp32": attend_to_blocks(1, 32, 4096, 64, FP32),
    "merge_attention": merge(512, 128),
    "rms_norm": normalise(16, 4096),
    "rotary_write": write_keys(16),
    "swiglu": Call(lambda: swiglu(new(16, 2 * 14336, dtype=FP32), BF16)),
    "topk 16x128256 k=64": select(16, 128256, 64, FP32),
    "topk 256x65536 fp16 k=256": select(256, 65536, 256, FP16),
    "topk 256x65536 fp16 k=256 in 512 buckets": select(256, 65536, 256, FP16, 512),
    "selective_state Mamba-2 2.7B T=8 after 4": advance(8, 4, 80, 5120, 1, 128),
    "selective_state Mamba 370M T=8 after 4": advance(8, 4, 2048, 2048, 1, 16, per_state=True),
    "gated_delta Qwen3.5-0.8B T=8 after 4": correct(8, 4, 16, 128, 16, 128),
    "gated_delta a decay a key T=8 after 4": correct(8, 4, 32, 128, 32, 128, per_key=True),
    "causal_conv Mamba-2 2.7B T=8 after 4": convolve(8, 4, 5376),
    "residual_vq 8x256 n=4096": attend_to_codes(1, 4096, 8, 256),
    "residual_vq 8x256 n=32768": attend_to_codes(1, 32768, 8, 256),
}
