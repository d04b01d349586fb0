"""The backward kernels compiled ahead of time, as test_compile.py does it for the forward ones."""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pyspec.kernels import block_masked_attention_backward as backward  # noqa: E402
from pyspec.kernels import lists_by_key  # noqa: E402
from tests.helpers.triton_code import (  # noqa: E402
    ARCHITECTURES,
    EACH_ARCHITECTURE,
    ELEMENT,
    SHARED_LIMIT,
    TENSOR_CORES,
    hot_loops,
    programs_at_a_time,
    resources,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

KERNELS = [backward.query_kernel, backward.key_kernel]
LISTS = ["full_ranges", "full_tiles", "partial_ranges", "partial_tiles", "counts", "full_blocks", "partial_blocks"]


def compile_backward(kernel, architecture, dtype, head_dim, words=2, group=1, options=False):
    """As the launcher compiles it for a mask of all batch entries and heads; options: permuted, capped, and d_lse."""
    size = backward.item_size(head_dim, dtype)
    constants = {"GROUP": group, "ROWS": size, "KEYS": size, "MASK_BATCH": 1, "MASK_HEADS": 1, "WORDS": words}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "UPCAST": False}
    constants |= {} if options else dict.fromkeys(("row_order", "key_order", "softcap", "d_lse"))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = dict.fromkeys(("d_out", "q", "k", "v", "out", "d_q", "d_k", "d_v"), ELEMENT[dtype])
    types |= dict.fromkeys(("lse", "d_lse", "row_lse", "row_constant"), "*fp32")
    types |= dict.fromkeys((*LISTS, "bits", "row_order", "key_order"), "*i32") | {"scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = ASTSource(kernel, signature, constants, divisible)
    chosen = backward.compile_options(head_dim, dtype)[KERNELS.index(kernel)]
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=chosen)


def check(compiled, folder: Path, tensor_cores: str | None) -> dict[str, int]:
    used = resources(compiled, folder)
    assert used["LOCAL"] == 0
    # Over full tiles and over partial ones; what comes after is for values that are not finite.
    # The most that Triton 3.9 reloads are 12 addresses in 473 instructions.
    for loop in hot_loops(compiled, folder)[:2]:
        assert len(re.findall(r"\b(?:STL|LDL)\b", loop)) <= loop.count("\n") // 32
    assert compiled.metadata.shared <= SHARED_LIMIT + 16 * 1024  # the most is on sm_100, which has twice as much
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx
    assert (re.search(tensor_cores, ptx) is not None) if tensor_cores else ("mma" not in ptx)
    return used


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("head_dim", [64, slow(128)])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_backward_fits_the_machine(kernel, head_dim, architecture, tmp_path):
    compiled = compile_backward(kernel, architecture, torch.bfloat16, head_dim)
    used = check(compiled, tmp_path, TENSOR_CORES[architecture])
    # One's products run beside another's powers of 2.
    assert programs_at_a_time(compiled, used) >= (3 if head_dim == 64 and architecture >= 90 else 2)
    assert "cp.async" in compiled.asm["ptx"]  # the next rows are on their way while some are multiplied


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype, head_dim", [slow(torch.bfloat16, 256), (torch.float32, 64)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_backward_of_wide_heads_and_of_fp32_fits(kernel, dtype, head_dim, architecture, tmp_path):
    compiled = compile_backward(kernel, architecture, dtype, head_dim)
    # 32 rows are too few for tensor cores later than those of sm_80; fp32 has none
    used = check(compiled, tmp_path, None if dtype == torch.float32 else TENSOR_CORES[80])
    assert used["STACK"] == 0


@pytest.mark.parametrize(
    "head_dim, variant",
    [slow(80, {}), slow(64, {"words": 1}), slow(128, {"group": 4}), slow(64, {"options": True})],
    ids=str,
)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_every_variant_of_the_backward_fits(kernel, head_dim, variant, tmp_path):
    check(compile_backward(kernel, 90, torch.bfloat16, head_dim, **variant), tmp_path, TENSOR_CORES[90])


def test_lists_by_key_compiles(tmp_path):
    kernel = lists_by_key.lists_kernel
    signature = {name: "*i32" if name in LISTS else "i32" for name in kernel.arg_names}
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, {})
        used = resources(triton.compile(source, target=GPUTarget("cuda", architecture, 32)), tmp_path)
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0
