"""The Triton kernels of GEAR compiled ahead of time, as test_compile.py does it for the others."""

import os
import re

import pytest
import torch

from tests.helpers.slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pyspec.kernels import gear  # noqa: E402
from tests.helpers.triton_code import (  # noqa: E402
    EACH_ARCHITECTURE,
    ELEMENT,
    SHARED_LIMIT,
    arithmetic,
    hot_loops,
    programs_at_a_time,
    resources,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

GEAR = {  # bits, group, rank, outliers, channels of keys
    "gear": (2, 64, 4, 2, 0),
    "gear-l": (2, 64, 4, 0, 0),
    "3 bits": (3, 32, 4, 2, 0),
    "int4": (4, 128, 0, 0, 0),
    "int8": (8, 128, 0, 0, 0),
    "channels": (2, 64, 4, 2, 64),
}
# Of a record of 128 tokens, for each of 128 threads: all instructions, those of outliers and of low rank too.
GEAR_INSTRUCTIONS = {"gear": 2750, "gear-l": 1450, "int4": 1120, "int8": 1350}
GEAR_STACK_LIMIT = 40  # bytes of registers that are parked so that three programs fit, or four


def compile_gear(kernel, architecture, dtype, head_dim, name="gear", aligned=True, window=False):
    """As the launcher compiles it. aligned: strides of 16s."""
    rank, outliers = GEAR[name][2:4]
    constants = {"KV_HEADS": 8, "GROUP_HEADS": 4, "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    constants |= gear.fold_constants(head_dim, dtype, *GEAR[name])
    constants |= {} if window else {"oldest": None}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {
        "q": ELEMENT[dtype],
        "out": ELEMENT[dtype],
        "quantised": "*u8",
        "seen": "*i32",
        "oldest": "*i32",
        "scale": "fp32",
    }
    types |= dict.fromkeys(("chunk_largest", "chunk_total", "chunk_weighted", "lse"), "*fp32")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.startswith("stride") and aligned)
    }
    source = ASTSource(kernel, signature, constants, divisible)
    options = gear.compile_options(head_dim, dtype, is_plain=not rank and not outliers)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("head_dim", [slow(64), 128])
@pytest.mark.parametrize("name", ["gear", slow("gear-l"), "int4", slow("int8")])
def test_gear_fits_the_machine(name, head_dim, architecture, tmp_path):
    compiled = compile_gear(gear.fold_kernel, architecture, torch.bfloat16, head_dim, name)
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= (3 if "gear" in name else 4)
    assert used["STACK"] <= GEAR_STACK_LIMIT and used["LOCAL"] == 0
    assert compiled.metadata.shared <= SHARED_LIMIT / 2
    assert re.search(r"mma\.sync\S*\.f32\.f16\.f16\.f32", compiled.asm["ptx"]) and "tf32" not in compiled.asm["ptx"]
    record = max(hot_loops(compiled, tmp_path), key=len)
    assert not re.search(r"\bLDG\S*\.[US]8\b", record)  # numbers come in pairs at least
    assert len(re.findall(r"\bSTS\.U16\b", record)) <= 16  # low rank's, not a tile's
    if architecture == 90:
        assert len(record.splitlines()) <= GEAR_INSTRUCTIONS[name]


@pytest.mark.parametrize(
    "name, dtype, head_dim",
    [
        ("int4", torch.bfloat16, 80),
        slow("3 bits", torch.bfloat16, 96),
        slow("int8", torch.bfloat16, 256),
        slow("int8", torch.float32, 64),
        slow("channels", torch.bfloat16, 128),
    ],
    ids=str,
)
def test_other_formats_of_gear_fit(name, dtype, head_dim, tmp_path):
    compiled = compile_gear(gear.fold_kernel, 90, dtype, head_dim, name)
    used = resources(compiled, tmp_path)
    assert used["STACK"] <= (3 if name == "channels" else 1) * GEAR_STACK_LIMIT and used["LOCAL"] == 0
    assert compiled.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("name", ["int4", slow("gear")])
def test_windows_take_no_program_away(name, architecture, tmp_path):
    compiled = compile_gear(gear.fold_kernel, architecture, torch.bfloat16, 128, name, window=True)
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= (3 if "gear" in name else 4)
    assert used["STACK"] <= GEAR_STACK_LIMIT and used["LOCAL"] == 0
    used = resources(compile_gear(gear.merge_kernel, architecture, torch.bfloat16, 128, window=True), tmp_path)
    assert used["REG"] <= 96 and used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), slow(torch.float32, 256)], ids=str)
def test_merging_gear_spills_nothing(dtype, head_dim, architecture, tmp_path):
    used = resources(compile_gear(gear.merge_kernel, architecture, dtype, head_dim), tmp_path)
    assert used["REG"] <= 80 and used["STACK"] == used["LOCAL"] == 0


def test_every_variant_of_gear_sums_in_one_order():
    """Whatever is aligned; multiply-adds are never contracted."""
    compiled = [compile_gear(gear.fold_kernel, 90, torch.bfloat16, 64, aligned=aligned) for aligned in (True, False)]
    orders = [arithmetic(each) for each in compiled]
    assert len(orders[0]) >= 8 and orders[0] == orders[1]
    assert not any(re.search(r"\b(mul|add|sub)\.f(16x2|16|32)", each.asm["ptx"]) for each in compiled)
