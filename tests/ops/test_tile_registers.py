"""Other libraries of the process divide the tile registers of AMX too, and some count on finding them as they left
them: kernels that use tiles give a thread back as it was."""

import ctypes
import mmap

import pytest
import torch

from pyspec import BlockMask, DraftTree, ops
from pyspec.ops.linear import LinearWeight, lay_out_weight, linear
from pyspec.ops.linear_codes import lay_out_codes
from tests.helpers.every_backend import KERNELS, on_backend
from tests.helpers.weight_formats import random_codes

LOAD, STORE = b"\xc4\xe2\x78\x49\x07\xc3", b"\xc4\xe2\x79\x49\x07\xc3"  # ldtilecfg [rdi], sttilecfg [rdi]; ret
FORMAT = ops.GearFormat(4, 64, rank=1, outliers=2)
NODES = 64


def floats(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def codes() -> LinearWeight:
    weight = random_codes("q4_k", 64, 256)
    return LinearWeight(lay_out_codes(weight), 64, 256, weight.format)


def attention() -> dict:
    bits = torch.from_numpy(DraftTree.chain(list(range(NODES))).ancestor_bits)[None]
    return {"q": floats(1, 4, NODES, 64), "k": floats(1, 2, 300, 64), "v": floats(1, 2, 300, 64), "ancestor_bits": bits}


def gear() -> torch.Tensor:
    quantised = ops.gear_encode(floats(1, 2, 128, 64), floats(1, 2, 128, 64), FORMAT)
    lens = torch.tensor([236], dtype=torch.int32)
    return ops.gear_attention(**attention(), quantised=quantised, format=FORMAT, prefix_lens=lens)


CALLS = {
    "linear": lambda: linear(floats(NODES, 256), floats(64, 256)),
    "linear_int8": lambda: linear(floats(NODES, 256), lay_out_weight(floats(64, 256), torch.int8)),
    "linear_codes": lambda: linear(floats(NODES, 256), codes()),
    "tree_attention": lambda: ops.tree_attention(**attention(), prefix_lens=torch.tensor([236], dtype=torch.int32)),
    "block_masked_attention": lambda: ops.block_masked_attention(
        floats(1, 2, 200, 64), floats(1, 2, 200, 64), floats(1, 2, 200, 64), BlockMask.from_window(200, 200, window=90)
    ),
    "gear_attention": gear,
}


@pytest.fixture
def instructions():
    """ldtilecfg and sttilecfg as functions of an address."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(LOAD + STORE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    yield function(start), function(start + len(LOAD))


@pytest.mark.skipif("amx_bf16" not in KERNELS, reason="this processor has no tile registers, or the library no kernel")
@pytest.mark.parametrize("name", CALLS)
def test_a_thread_keeps_its_division(name, instructions):
    """Of the caller's thread, which works too; without a division of its own it has none afterwards either."""
    load, store = instructions
    mine, found = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    for rows in (3, 0):
        if rows:
            mine[0], mine[16], mine[48] = 1, 12, rows  # of palette 1: bytes of a row of tile 0, and its rows
        else:
            mine = ctypes.create_string_buffer(64)
        load(mine)
        with on_backend("amx_bf16"):
            CALLS[name]()
        store(found)
        load(ctypes.create_string_buffer(64))
        assert found.raw == mine.raw
