"""The Triton kernels compiled ahead of time for three GPU generations: registers, spills, tensor cores, layouts.

No GPU is needed: Triton compiles for a named target and brings ptxas and cuobjdump. Limits are what was measured with
Triton 3.9 and, where other code came of it, with 3.6.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pyspec.kernels import (  # noqa: E402
    block_masked_attention,
    gear,
    linear,
    merge_attention,
    rms_norm,
    rotary_write,
    row_statistics,
    swiglu,
    tree_attention,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

KERNELS = [tree_attention.prefix_kernel, tree_attention.tail_kernel]
ARCHITECTURES = [80, 90, 100]
EACH_ARCHITECTURE = [slow(80), 90, slow(100)]
IS_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
SHARED_LIMIT = 99 * 1024  # bytes a block may have on every GPU since Ampere
REGISTERS = 65536  # of a multiprocessor
REGISTER_LIMIT = {"prefix_kernel": 128, "tail_kernel": 168}
PAGED_REGISTER_LIMIT = {"prefix_kernel": 168 if IS_OLD else 128, "tail_kernel": 168}
# The hot loop spills nothing. ptxas may park a value of the tail's epilogue, stored before its loops.
STACK_LIMIT = {"prefix_kernel": 0, "tail_kernel": 16}
ELEMENT = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def compile_kernel(kernel, architecture, dtype, head_dim, nodes=32, is_paged=False, options=False, aligned=True):
    """The kernel as the launcher compiles it. options: with a window and a softcap; aligned: strides of 16s."""
    index = KERNELS.index(kernel)
    constants = {
        "KV_HEADS": 8,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "WORDS": (nodes + 31) // 32,
        "PAGE": 16 if is_paged else None,
        "UPCAST": False,
    }
    if not is_paged:
        constants["block_table"] = None
    if not options:
        constants["softcap"] = constants["window"] = None
    types = {name: ELEMENT[dtype] for name in ("q", "k", "v", "out")}
    types |= {name: "*i32" for name in ("ancestor_bits", "prefix_lens", "block_table")}
    types |= {name: "*fp32" for name in ("chunk_largest", "chunk_total", "chunk_weighted", "lse")}
    types |= {"scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.startswith("stride") and aligned)
    }
    source = ASTSource(kernel, signature, constants, divisible)
    compile_options = tree_attention.compile_options(head_dim, dtype, is_paged)[index]
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=compile_options)


def resources(compiled, folder: Path) -> dict[str, int]:
    """What cuobjdump says: REG, STACK, SHARED, LOCAL."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def programs_at_a_time(compiled, used: dict[str, int]) -> int:
    """How many of a kernel's programs the registers of a multiprocessor are enough for."""
    return REGISTERS // (used["REG"] * 32 * compiled.metadata.num_warps)


def hot_loops(compiled, folder: Path) -> list[str]:
    """The machine code of each innermost loop, in order: of those of over 100 instructions, which do not only wait."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    code = [(int(place, 16), line) for place, line in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", text)]
    jumps = [(place, re.search(r"\bBRA\b.* (0x[0-9a-f]+) *$", line)) for place, line in code]
    loops = [(int(jump[1], 16), place) for place, jump in jumps if jump and place - int(jump[1], 16) > 100 * 16]
    inner = [loop for loop in loops if not any(loop != (a, b) and loop[0] <= a and b <= loop[1] for a, b in loops)]
    return ["\n".join(line for place, line in code if first <= place <= last) for first, last in sorted(inner)]


def check_resources(compiled, kernel, folder: Path, register_limit=REGISTER_LIMIT):
    used = resources(compiled, folder)
    assert used["REG"] <= register_limit[kernel.__name__]
    assert used["STACK"] <= STACK_LIMIT[kernel.__name__] and used["LOCAL"] == 0
    assert compiled.metadata.shared <= SHARED_LIMIT


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("head_dim", [slow(64), 128])
@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_fits_the_machine(kernel, dtype, head_dim, architecture, tmp_path):
    compiled = compile_kernel(kernel, architecture, dtype, head_dim)
    check_resources(compiled, kernel, tmp_path)
    tensor_core_steps = len(re.findall(r"mma\.sync\.aligned\.m16n8k16\S*\.f32\.bf16\.bf16\.f32", compiled.asm["ptx"]))
    # Four warps share two products of 16 * 64 * head_dim; fp32 is not rounded to tensor-core formats.
    expected = 2 * 64 * head_dim // (8 * 16) // 4 if dtype == torch.bfloat16 else 0
    assert tensor_core_steps == expected
    assert "tf32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_fits_with_pages_and_options(kernel, tmp_path):
    compiled = compile_kernel(kernel, 90, torch.bfloat16, 128, nodes=64, is_paged=True, options=True)
    check_resources(compiled, kernel, tmp_path, PAGED_REGISTER_LIMIT)


def arithmetic(compiled) -> list[str]:
    """The floating-point dots and reductions with the layouts that fix their order of summation."""
    text = compiled.asm["ttgir"]
    layouts = dict(
        re.findall(r"^(#\w+) = (#(?:ttg|ttng)\.(?:blocked|nvidia_mma|linear|tensor_memory)\w*<.*>)$", text, re.M)
    )
    found = []
    dots = r"^.*(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*$"
    for line in re.findall(dots + r"|^ *}\) : \(tensor<.*xf32.*$", text, re.M):
        operation = re.sub(r" loc\(.*|, mutable", "", line).split(" : ")[-1]
        found.append(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), operation))
    return found


@pytest.mark.parametrize(
    "architecture, dtype, head_dim",
    [
        (80, torch.bfloat16, 64),
        slow(90, torch.bfloat16, 128),
        slow(100, torch.bfloat16, 128),
        slow(90, torch.float32, 128),
    ],
    ids=str,
)
def test_every_variant_sums_in_one_order(architecture, dtype, head_dim):
    """The row rule on a GPU: a tile is folded alike in both kernels, whatever the number of nodes and the strides."""
    expected = arithmetic(compile_kernel(tree_attention.prefix_kernel, architecture, dtype, head_dim))
    assert len(expected) == 4  # keys, largest, total, values
    variants = [
        {},
        {"nodes": 1, "aligned": False},
        {"nodes": 64, "is_paged": True},
        {"nodes": 64, "options": True, "aligned": False},
    ]
    for kernel in KERNELS:
        for variant in variants:
            compiled = compile_kernel(kernel, architecture, dtype, head_dim, **variant)
            assert arithmetic(compiled) == expected, (kernel.__name__, variant)
            # Multiply-adds are never contracted, so the same expression rounds alike in both.
            assert not re.search(r"\b(mul|add|sub)\.f32", compiled.asm["ptx"])


@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_merge_attention_compiles(dtype, tmp_path):
    kernel = merge_attention.merge_kernel
    signature = dict.fromkeys(kernel.arg_names, ELEMENT[dtype]) | {"rows": "i32", "HEAD_DIM": "constexpr"}
    signature |= {"lse_a": "*fp32", "lse_b": "*fp32", "lse": "*fp32"}
    source = ASTSource(kernel, signature, {"HEAD_DIM": 80})
    for architecture in ARCHITECTURES:
        target = GPUTarget("cuda", architecture, 32)
        used = resources(triton.compile(source, target=target, options={"enable_fp_fusion": False}), tmp_path)
        assert used["REG"] <= 128 and used["STACK"] == 0


# ==== linear ====

LINEAR = [linear.float_kernel, linear.int8_kernel]
TENSOR_CORES = {80: r"mma\.sync\S*\.f32\.bf16\.bf16\.f32", 90: r"wgmma\.mma_async\S*\.bf16", 100: r"tcgen05\.mma\S*f16"}


def compile_linear(kernel, architecture, x_dtype, is_whole=False, aligned=True):
    """As the launcher compiles it; aligned: inputs, outputs and strides of 16s."""
    is_int8 = kernel is linear.int8_kernel
    constants = {**linear.tile_of(torch.uint8 if is_int8 else x_dtype), "IS_WHOLE": is_whole}
    constants |= {} if is_int8 else {"UPCAST": False}
    constants |= {} if is_whole else {"bias": None}
    types = {
        "x": ELEMENT[x_dtype],
        "weight": "*i8" if is_int8 else ELEMENT[x_dtype],
        "scales": "*fp16",
        "bias": "*fp32",
    }
    types["out"] = ELEMENT[x_dtype] if is_whole else "*fp32"
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # Of 16 bytes: what was packed or allocated; of 16s: sizes and strides.
    known = {"weight", "scales", "bias", "out"} | ({"x", "outputs", "inputs", "stride_x"} if aligned else set())
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in known and signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature, constants, divisible)
    options = linear.INT8_OPTIONS if is_int8 else linear.OPTIONS
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
@pytest.mark.parametrize("kernel", LINEAR, ids=lambda kernel: kernel.__name__)
def test_linear_fits_the_machine(kernel, dtype, architecture, tmp_path):
    compiled = compile_linear(kernel, architecture, dtype)
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= 2 and used["STACK"] == used["LOCAL"] == 0
    assert compiled.metadata.shared <= SHARED_LIMIT
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx and "cp.async" in ptx  # the weight is on its way while others are summed
    if kernel is linear.int8_kernel:
        assert re.search(r"mma\.sync\S*m16n8k32\S*\.s32\.s8\.s8\.s32", ptx)
        assert "tt.load" not in compiled.asm["ttgir"]  # scales are copied ahead like the rest
    else:
        assert bool(re.search(TENSOR_CORES[architecture], ptx)) == (dtype == torch.bfloat16)
        expected = 0 if dtype == torch.bfloat16 else 64 * 64 * 16 // 256  # a tile's, of each thread
        assert len(re.findall(r"fma\.rn\.f32", ptx)) + len(re.findall(r"fma\.rn\.f32x2", ptx)) == expected


@pytest.mark.parametrize(
    "kernel, architecture, dtype",
    [slow(linear.float_kernel, architecture, dtype) for architecture in ARCHITECTURES for dtype in ELEMENT]
    + [(linear.int8_kernel, 90, torch.bfloat16)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_variant_of_linear_sums_in_one_order(kernel, architecture, dtype, tmp_path):
    """Whatever is aligned. A row's place and the splits choose no variant that sums otherwise."""
    expected = set(arithmetic(compile_linear(kernel, architecture, dtype)))
    assert len(expected) == (2 if kernel is linear.int8_kernel else 1)  # the dot, and the sum of lanes
    compiled = compile_linear(kernel, architecture, dtype, is_whole=True, aligned=False)
    assert set(arithmetic(compiled)) == expected
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= 1 and used["STACK"] == used["LOCAL"] == 0


def test_sum_of_splits_compiles(tmp_path):
    kernel = linear.sum_kernel
    signature = {
        "sums": "*fp32",
        "bias": "*fp32",
        "out": "*bf16",
        "size": "i32",
        "outputs": "i32",
        "SPLITS": "constexpr",
    }
    source = ASTSource(kernel, signature, {"SPLITS": linear.MOST_SPLITS})
    for architecture in ARCHITECTURES:
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=linear.OPTIONS)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= 128 and used["STACK"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=str)
def test_row_statistics_compiles(dtype, tmp_path):
    kernel = row_statistics.row_statistics_kernel
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"logits": ELEMENT[dtype]}
    signature |= {"tokens": "*i64", "out_tokens": "*i64", "vocab": "i32", "count": "i32", "stride": "i32"}
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, {})
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=row_statistics.OPTIONS)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= 128 and used["STACK"] == 0 and used["LOCAL"] == 0


# ==== the small ops of a layer ====

SMALL = {
    rms_norm.rms_norm_kernel: ({"BLOCK": 8192}, rms_norm.compile_options(8192)),
    rotary_write.rotary_write_kernel: (
        {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK": 64},
        rotary_write.OPTIONS,
    ),
    swiglu.swiglu_kernel: ({}, swiglu.OPTIONS),
}


@pytest.mark.parametrize("kernel", SMALL, ids=lambda kernel: kernel.__name__)
def test_the_small_ops_compile(kernel, tmp_path):
    constants, options = SMALL[kernel]
    types = {name: "*i32" for name in ("positions", "sequences", "slots")}
    types |= {name: "*bf16" for name in ("out", "q", "keys", "values")}
    types |= {name: "*fp32" for name in ("hidden", "delta", "weight", "qkv", "cos_sin", "gate_up")}
    types |= {"epsilon": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0


# ==== block_masked_attention ====


def compile_block_masked(architecture, dtype, head_dim, words=2, group=1, permuted=False):
    """As the launcher compiles it for a mask of all batch entries and heads."""
    kernel = block_masked_attention.block_masked_attention_kernel
    rows = block_masked_attention.program_rows(words, group, 1, head_dim, dtype)
    constants = {"HEADS": 32, "GROUP": group, "ROWS": rows, "MASK_BATCH": 1, "MASK_HEADS": 1, "WORDS": words}
    constants |= {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "UPCAST": False}
    constants |= {} if permuted else {"row_order": None, "key_order": None}
    constants |= {} if permuted else {"softcap": None}
    types = {name: ELEMENT[dtype] for name in ("q", "k", "v", "out")} | {"lse": "*fp32"}
    lists = ("full_ranges", "full_tiles", "partial_ranges", "partial_tiles", "row_order", "key_order")
    types |= {name: "*i32" for name in lists} | {"bits": "*i64", "scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    options = block_masked_attention.compile_options(head_dim, dtype)
    source = ASTSource(kernel, signature, constants, divisible)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def check_hot_loops(compiled, folder: Path):
    """Over full tiles and over partial ones. What comes after them is for values that are not finite."""
    full, partial, *_ = hot_loops(compiled, folder)
    assert not re.search(r"\b(STL|LDL)\b", full + partial)  # values parked outside of them are read once for an item


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.bfloat16, 64), slow(torch.bfloat16, 128), (torch.float32, 64)], ids=str
)
def test_block_masked_attention_fits_the_machine(dtype, head_dim, architecture, tmp_path):
    compiled = compile_block_masked(architecture, dtype, head_dim)
    used = resources(compiled, tmp_path)
    assert used["STACK"] <= (48 if IS_OLD else 16) and used["LOCAL"] == 0
    check_hot_loops(compiled, tmp_path)
    assert compiled.metadata.shared <= SHARED_LIMIT
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx and "cp.async" in ptx  # the next tile is on its way while one is folded
    assert bool(re.search(TENSOR_CORES[architecture], ptx)) == (dtype == torch.bfloat16)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 256), slow(torch.float32, 128)], ids=str)
def test_block_masked_attention_of_wide_heads_fits(dtype, head_dim, architecture, tmp_path):
    compiled = compile_block_masked(architecture, dtype, head_dim)
    used = resources(compiled, tmp_path)
    assert used["STACK"] <= (16 if IS_OLD else 0) and used["LOCAL"] == 0
    check_hot_loops(compiled, tmp_path)
    assert compiled.metadata.shared <= SHARED_LIMIT
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx
    assert bool(re.search(TENSOR_CORES[80], ptx)) == (dtype == torch.bfloat16)  # 32 rows are too few for later ones


@pytest.mark.parametrize(
    "head_dim, variant",
    [slow(80, {}), slow(64, {"words": 1}), (64, {"words": 1, "group": 4}), slow(128, {"permuted": True})],
    ids=str,
)
def test_every_variant_of_block_masked_attention_fits(head_dim, variant, tmp_path):
    compiled = compile_block_masked(90, torch.bfloat16, head_dim, **variant)
    used = resources(compiled, tmp_path)
    assert used["STACK"] <= 32 and used["LOCAL"] == 0
    check_hot_loops(compiled, tmp_path)
    assert compiled.metadata.shared <= SHARED_LIMIT
    assert re.search(TENSOR_CORES[90], compiled.asm["ptx"])


# ==== gear ====

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


def compile_gear(kernel, architecture, dtype, head_dim, name="gear", aligned=True):
    """As the launcher compiles it. aligned: strides of 16s."""
    rank, outliers = GEAR[name][2:4]
    constants = {"KV_HEADS": 8, "GROUP_HEADS": 4, "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    constants |= gear.fold_constants(head_dim, dtype, *GEAR[name])
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"q": ELEMENT[dtype], "out": ELEMENT[dtype], "packed": "*u8", "seen": "*i32", "scale": "fp32"}
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
