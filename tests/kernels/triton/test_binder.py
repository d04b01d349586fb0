"""Triton's own binder, without a GPU: what changes from round to round makes no new variant of a kernel.

A variant costs seconds of compiling in the middle of a text. And rows are only promised the same bits by the same code.
"""

import os
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")
from without_gpu import launches  # noqa: E402

from pyspec.kernels.gear import gear  # noqa: E402
from pyspec.kernels.linear import linear  # noqa: E402
from pyspec.kernels.merge_attention import merge_attention  # noqa: E402
from pyspec.kernels.rms_norm import rms_norm  # noqa: E402
from pyspec.kernels.rotary_write import rotary_write  # noqa: E402
from pyspec.kernels.row_statistics import row_statistics  # noqa: E402
from pyspec.kernels.swiglu import swiglu  # noqa: E402
from pyspec.kernels.tree_attention import tree_attention  # noqa: E402
from pyspec.ops.gear_format import GearFormat  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter binds otherwise"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has better to do, and is not asked"),
]

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 64, 256
# nodes of a tree and sequences of a batch
ROUNDS = [(1, 1), (2, 1), (3, 1), (15, 1), (16, 1), (17, 1), (31, 1), (32, 1), (1, 3), (16, 2), (32, 3)]


def new(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype)


def ints(*shape):
    return new(*shape, dtype=torch.int32)


def queries(sequences, nodes):
    return new(sequences, nodes, HEADS, HEAD_DIM).transpose(1, 2)


def attend_to_tree(nodes, sequences, window=None, softcap=None):
    for slots in (1024, 1088, 4096):
        cache = new(2, 2, sequences + 1, KV_HEADS, slots, HEAD_DIM)[1, :, :sequences]
        bits, lens = ints(sequences, nodes, 1), ints(sequences)
        tree_attention(queries(sequences, nodes), *cache, bits, lens, HEAD_DIM**-0.5, softcap, window, None)


def attend_to_pages(nodes, sequences):
    for pages in (64, 65, 100):
        bits, lens, table = ints(sequences, nodes, 1), ints(sequences), ints(sequences, pages)
        cache = new(2, 500, KV_HEADS, 16, HEAD_DIM)
        tree_attention(queries(sequences, nodes), *cache, bits, lens, HEAD_DIM**-0.5, None, None, table)


def attend_to_records(nodes, sequences):
    format = GearFormat(2, 64, rank=4, outliers=2)
    for blocks in (1, 16, 33):
        quantised = new(sequences, KV_HEADS, blocks, format.record_bytes(HEAD_DIM), dtype=torch.uint8)
        seen = ints(sequences, nodes)
        gear(queries(sequences, nodes), quantised, seen, *format.layout, HEAD_DIM**-0.5)


def merge(nodes, sequences):
    shape = (sequences, HEADS, nodes)
    parts = [new(*shape, HEAD_DIM), new(*shape, dtype=torch.float32)]
    merge_attention(*parts, *parts)


def project(nodes, sequences):
    linear(new(sequences * nodes, HIDDEN), new(512, HIDDEN), None, 512, torch.float32)


def project_in_int8(nodes, sequences):
    tiles = new(512 // 64, HIDDEN // 128, 64 * 4 * 34, dtype=torch.uint8)
    linear(new(sequences * nodes, HIDDEN), tiles, None, 512, torch.float32)


def normalise(nodes, sequences):
    hidden = new(sequences * nodes, HIDDEN, dtype=torch.float32)
    rms_norm(hidden, hidden.clone(), new(HIDDEN, dtype=torch.float32), 1e-5, torch.bfloat16)


def write(nodes, sequences):
    rows = nodes * sequences
    for slots in (1024, 1088, 4096):
        cache = new(2, 2, sequences, KV_HEADS, slots, HEAD_DIM)[1]
        qkv = new(rows, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=torch.float32)
        cos_sin = new(3000, 2, HEAD_DIM // 2, dtype=torch.float32)
        rotary_write(qkv, cos_sin, *ints(3, -(-rows // 4) * 4)[:, :rows], *cache, HEADS)


def gate(nodes, sequences):
    swiglu(new(nodes * sequences, 2 * 688, dtype=torch.float32), torch.bfloat16)


def read_logits(nodes, sequences):
    logits = new(nodes * sequences, 5001, dtype=torch.float32)
    for tokens in (None, new(len(logits), 3, dtype=torch.int64)):
        row_statistics(logits, tokens)


CALLS = {
    "tree_attention": attend_to_tree,
    "with a window": lambda *sizes: [attend_to_tree(*sizes, window=window) for window in (1, 16, 1000)],
    "with a softcap": lambda *sizes: attend_to_tree(*sizes, softcap=30.0),
    "with pages": attend_to_pages,
    "gear": attend_to_records,
    "merge_attention": merge,
    "linear": project,
    "linear in int8": project_in_int8,
    "rms_norm": normalise,
    "rotary_write": write,
    "swiglu": gate,
    "row_statistics": read_logits,
}


def variants_of(call, rounds=ROUNDS) -> dict[str, int]:
    """By kernel, how many variants of it the rounds launched."""
    found = defaultdict(set)
    with launches() as launched:
        for nodes, sequences in rounds:
            call(nodes, sequences)
        for launch in launched:
            found[launch.name].add(id(launch.cubin))
    return {name: len(cubins) for name, cubins in found.items()}


@pytest.mark.parametrize("name", CALLS)
def test_trees_batches_and_slots_make_no_new_variant(name):
    found = variants_of(CALLS[name])
    sizes = dict.fromkeys(("float_kernel", "int8_kernel"), 3)  # tiles of 16, 32 and 64 rows
    expected = {kernel: sizes.get(kernel, 1) for kernel in found}
    assert found and found == expected, found


def test_variants_are_told_apart():
    """What the test above counts: another number of words of ancestor bits is another kernel."""

    def call(nodes, sequences):
        arguments = ints(1, nodes, -(-nodes // 32)), ints(1)
        tree_attention(queries(1, nodes), *new(2, 1, KV_HEADS, 1024, HEAD_DIM), *arguments, 0.1, None, None, None)

    assert variants_of(call, [(32, 1), (33, 1), (64, 1)]) == {"fold_kernel": 2, "finish_kernel": 2}
