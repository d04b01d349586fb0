"""The Triton kernel of block_masked_attention compiled ahead of time, as test_compile.py does it for the others."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pyspec.kernels import block_masked_attention  # noqa: E402
from tests.helpers.triton_code import (  # noqa: E402
    EACH_ARCHITECTURE,
    ELEMENT,
    SHARED,
    SHARED_LIMIT,
    TENSOR_CORES,
    hot_loops,
    programs_at_a_time,
    resources,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def compile_block_masked(architecture, dtype, head_dim, words=2, group=1, permuted=False, shared=None):
    """As the launcher compiles it for a mask of all batch entries and heads."""
    kernel = block_masked_attention.block_masked_attention_kernel
    shared = shared or SHARED[architecture]
    rows = block_masked_attention.program_rows(words, group, 1, head_dim, dtype, shared)
    constants = {"HEADS": 32, "GROUP": group, "ROWS": rows, "MASK_BATCH": 1, "MASK_HEADS": 1, "WORDS": words}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "UPCAST": False}
    constants |= {} if permuted else {"row_order": None, "key_order": None}
    constants |= {} if permuted else {"softcap": None}
    types = {name: ELEMENT[dtype] for name in ("q", "k", "v", "out")} | {"lse": "*fp32"}
    lists = ("full_ranges", "full_tiles", "partial_ranges", "partial_tiles", "row_order", "key_order")
    types |= {name: "*i32" for name in lists} | {"bits": "*i32", "scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    options = block_masked_attention.compile_options(rows, head_dim, dtype, shared)
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def check_block_masked(compiled, architecture, folder: Path, is_wide_mma: bool):
    used = resources(compiled, folder)
    assert used["STACK"] <= 96 and used["LOCAL"] == 0
    # Over full tiles, then over partial ones; the last loop is for values that are not finite.
    loops = hot_loops(compiled, folder)
    for loop in loops[:-1]:
        assert len(re.findall(r"\b(?:STL|LDL)\b", loop)) <= loop.count("\n") // 50
    assert compiled.metadata.shared <= SHARED[architecture]
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx and "cp.async" in ptx  # the next tiles are on their way while one is folded
    assert bool(re.search(TENSOR_CORES[architecture if is_wide_mma else 80], ptx)) == ("bf16" in ptx)
    return used


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.bfloat16, 64), slow(torch.bfloat16, 128), (torch.float32, 64)], ids=str
)
def test_block_masked_attention_fits_the_machine(dtype, head_dim, architecture, tmp_path):
    compiled = compile_block_masked(architecture, dtype, head_dim)
    used = check_block_masked(compiled, architecture, tmp_path, is_wide_mma=True)
    if dtype == torch.bfloat16 and architecture >= 90:
        assert programs_at_a_time(compiled, used) == (2 if head_dim == 64 else 1)
        assert compiled.metadata.shared > (3 * 2 * 64 + 128) * head_dim * 2  # queries, a tile and two on their way


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 256), slow(torch.float32, 128)], ids=str)
def test_block_masked_attention_of_wide_heads_fits(dtype, head_dim, architecture, tmp_path):
    compiled = compile_block_masked(architecture, dtype, head_dim)
    check_block_masked(compiled, architecture, tmp_path, is_wide_mma=False)  # 32 rows are too few for the later ones


@pytest.mark.parametrize(
    "head_dim, variant",
    [
        slow(80, {}),
        slow(64, {"words": 1}),
        (64, {"words": 1, "group": 4}),
        slow(128, {"permuted": True}),
    ],
    ids=str,
)
def test_every_variant_of_block_masked_attention_fits(head_dim, variant, tmp_path):
    compiled = compile_block_masked(90, torch.bfloat16, head_dim, **variant)
    check_block_masked(compiled, 90, tmp_path, is_wide_mma=True)


@pytest.mark.parametrize("head_dim", [64, slow(128)])
def test_block_masked_attention_fits_small_gpus(head_dim, tmp_path):
    compiled = compile_block_masked(80, torch.bfloat16, head_dim, shared=SHARED_LIMIT)
    check_block_masked(compiled, 80, tmp_path, is_wide_mma=True)
    assert compiled.metadata.shared <= SHARED_LIMIT
