"""The Triton kernels compiled ahead of time for three GPU generations: registers, spills, tensor cores, layouts.

No GPU is needed: Triton compiles for a named target and brings ptxas and cuobjdump. Limits are what was measured with
Triton 3.9 and, where other code came of it, with 3.6.
"""

import os
import re
from pathlib import Path

import pytest
import torch

from tests.helpers.slow import slow

triton = pytest.importorskip("triton", reason="Triton is not installed for this platform")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pyspec.kernels import (  # noqa: E402
    linear,
    merge_attention,
    rms_norm,
    rotary_write,
    row_statistics,
    swiglu,
    take_columns,
    tree_attention,
)
from tests.helpers.triton_code import (  # noqa: E402
    ARCHITECTURES,
    EACH_ARCHITECTURE,
    ELEMENT,
    SHARED,
    SHARED_LIMIT,
    TENSOR_CORES,
    arithmetic,
    hot_loops,
    programs_at_a_time,
    resources,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


# ==== tree_attention ====

TREE = [tree_attention.fold_kernel, tree_attention.finish_kernel]


def compile_tree(kernel, architecture, dtype, head_dim, nodes=32, is_paged=False, options=False, aligned=True):
    """The kernel as the launcher compiles it. options: with a window, a softcap and sinks; aligned: strides of 16s."""
    constants = {
        "KV_HEADS": 8,
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "ROWS": tree_attention.program_rows(head_dim, dtype),
        "WORDS": (nodes + 31) // 32,
        "PAGE": 16 if is_paged else None,
        "UPCAST": False,
        "CHUNKED": False,
        "IS_EARLY": architecture >= 90,
    }
    if not is_paged:
        constants["block_table"] = None
    if not options:
        constants["softcap"] = constants["window"] = constants["sinks"] = None
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {name: ELEMENT[dtype] for name in ("q", "k", "v", "out")}
    types |= {name: "*i32" for name in ("ancestor_bits", "prefix_lens", "block_table")}
    types |= {name: "*fp32" for name in ("chunk_largest", "chunk_total", "chunk_weighted", "sinks", "lse")}
    types |= {"scale": "fp32", "softcap": "fp32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name.startswith("stride") and aligned)
    }
    source = ASTSource(kernel, signature, constants, divisible)
    fold_options, finish_options = tree_attention.compile_options(head_dim, dtype, is_paged)
    launch_options = fold_options if kernel is tree_attention.fold_kernel else finish_options
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=launch_options)


def check_fold(compiled, architecture, folder: Path, at_a_time=2):
    """Two programs at a time hide each other's waiting; the two loops over tiles spill nothing."""
    used = resources(compiled, folder)
    assert programs_at_a_time(compiled, used) >= at_a_time and used["LOCAL"] == 0
    assert compiled.metadata.shared <= {80: SHARED_LIMIT, 90: 227 * 1024 // 2, 100: 227 * 1024 // 2}[architecture]
    in_place, gathered, *_ = hot_loops(compiled, folder)
    assert not re.search(r"\b(STL|LDL)\b", in_place + gathered)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize(
    "dtype, head_dim",
    [
        (torch.bfloat16, 128),
        (torch.float32, 128),
        slow(torch.bfloat16, 64),
        slow(torch.bfloat16, 256),
        slow(torch.float32, 64),
    ],
    ids=str,
)
def test_tree_attention_fits_the_machine(dtype, head_dim, architecture, tmp_path):
    compiled = compile_tree(tree_attention.fold_kernel, architecture, dtype, head_dim)
    if dtype == torch.float32 and head_dim == 128 and triton.__version__ < "3.9":  # known to spill: docs/gpu.md
        assert resources(compiled, tmp_path)["STACK"] <= 400
    else:
        check_fold(compiled, architecture, tmp_path, at_a_time=2 if head_dim <= 128 else 1)
    ptx = compiled.asm["ptx"]
    assert "tf32" not in ptx and "cp.async" in ptx  # the next tile is on its way while one is folded
    newest = 80 if head_dim > 128 else architecture  # 16 rows are too few for later tensor cores
    assert bool(re.search(TENSOR_CORES[newest], ptx)) == (dtype == torch.bfloat16)
    finish = compile_tree(tree_attention.finish_kernel, architecture, dtype, head_dim)
    used = resources(finish, tmp_path)
    assert (
        programs_at_a_time(finish, used) >= (2 if dtype == torch.bfloat16 and head_dim <= 128 else 1)
        and used["LOCAL"] == 0
    )


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_tree_attention_of_the_widest_heads_fits(architecture, tmp_path):
    """512 dimensions, in bf16 alone: a tile of keys and one of values lie in shared memory; few registers spill."""
    most = 96 if triton.__version__ >= "3.9" else 112
    for kernel in TREE:
        compiled = compile_tree(kernel, architecture, torch.bfloat16, 512)
        assert compiled.metadata.shared <= 163 * 1024 and resources(compiled, tmp_path)["STACK"] <= most


def test_tree_attention_with_pages_and_options_fits(tmp_path):
    check_fold(compile_tree(tree_attention.fold_kernel, 90, torch.bfloat16, 128, 64, True, True), 90, tmp_path)


def test_tree_attention_of_a_prompt_fits(tmp_path):
    check_fold(compile_tree(tree_attention.fold_kernel, 90, torch.bfloat16, 128, nodes=512), 90, tmp_path)


@pytest.mark.parametrize(
    "architecture, dtype, head_dim",
    [
        (90, torch.bfloat16, 128),
        slow(80, torch.bfloat16, 64),
        slow(100, torch.bfloat16, 128),
        slow(90, torch.float32, 128),
        slow(90, torch.bfloat16, 256),
    ],
    ids=str,
)
def test_every_variant_of_tree_attention_sums_in_one_order(architecture, dtype, head_dim):
    """The row rule on a GPU: tiles in place and gathered ones are folded alike, whatever the nodes and the strides."""
    sums = [set(arithmetic(compile_tree(kernel, architecture, dtype, head_dim))) for kernel in TREE]
    assert all(2 <= len(each) <= 3 for each in sums)  # keys, the reductions of a row, values (with D = 64 like keys)
    variants = [
        {"nodes": 1, "aligned": False},
        {"nodes": 64, "is_paged": True},
        {"nodes": 64, "options": True, "aligned": False},
    ]
    for kernel, expected in zip(TREE, sums, strict=True):
        for variant in variants:
            compiled = compile_tree(kernel, architecture, dtype, head_dim, **variant)
            assert set(arithmetic(compiled)) == expected, (kernel.__name__, variant)
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


def check_waits_first(compiled, architecture):
    """A kernel whose programs are there early touches no memory before those in front of it are finished.

    But rms_norm reads its weight, which nobody writes.
    """
    ptx = compiled.asm["ptx"]
    touches = r"st\.global" if "rms_norm_kernel" in ptx else r"(?:ld|st)\.global|cp\.async"
    first = re.search(rf"griddepcontrol\.wait|\b(?:{touches})", ptx)[0]
    assert (first == "griddepcontrol.wait") == ("griddepcontrol.launch_dependents" in ptx) == (architecture >= 90)


def compile_linear(kernel, architecture, x_dtype, is_whole=False, aligned=True, rows=64):
    """As the launcher compiles it; aligned: inputs, outputs and strides of 16s."""
    is_int8 = kernel is linear.int8_kernel
    constants = {**linear.tile_of(torch.uint8 if is_int8 else x_dtype, rows), "IS_WHOLE": is_whole}
    constants |= {"IS_EARLY": architecture >= 90, "UPCAST": False}
    constants |= dict.fromkeys(("order", "experts", "choices", "x_rows"))  # of experts
    constants |= {"parts": None, "tickets": None} if is_whole else {}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    types = {"x": ELEMENT[x_dtype], "weight": ELEMENT[x_dtype], "bias": "*fp32"}
    types |= {"x": "*i8", "weight": "*i8", "x_scales": "*fp32", "scales": "*i64"} if is_int8 else {}
    types |= {"out": ELEMENT[x_dtype], "parts": "*fp32", "tickets": "*i32"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    # Of 16 bytes: what was packed or allocated; of 16s: sizes and strides.
    known = {name for name in types if is_int8 or name != "x"} | (
        {"x", "outputs", "inputs", "stride_x"} if aligned else set()
    )
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in known and signature[name] != "constexpr"
    }
    source = ASTSource(kernel, signature, constants, divisible)
    options = linear.compile_options(torch.uint8 if is_int8 else x_dtype, constants["ROWS"])
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("dtype", ELEMENT, ids=str)
def test_linear_fits_the_machine(dtype, architecture, tmp_path):
    compiled = compile_linear(linear.float_kernel, architecture, dtype)
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= (3 if dtype == torch.float32 and architecture == 80 else 4)
    assert used["STACK"] == used["LOCAL"] == 0 and compiled.metadata.shared <= SHARED_LIMIT // 2
    check_waits_first(compiled, architecture)
    ptx = compiled.asm["ptx"]
    assert "cp.async" in ptx  # the weight is on its way while others are summed
    in_bf16 = TENSOR_CORES[architecture]
    products = in_bf16 if dtype == torch.bfloat16 else in_bf16.replace(r"\.bf16", r"\.tf32").replace("f16", "tf32")
    assert re.search(products, ptx)
    if dtype == torch.float32 and architecture == 90:  # three products of each value
        loop, *_ = hot_loops(compiled, tmp_path)  # behind it the splits are added
        assert len(re.findall(r"\bHGMMA\S*TF32", loop)) == 3 * 32 // 8 and len(loop.splitlines()) <= 300


@pytest.mark.parametrize("rows", [16, 32])
def test_linear_of_few_rows_fits(rows, tmp_path):
    """Four programs and no more, of as many tiles as there is memory for."""
    compiled = compile_linear(linear.float_kernel, 90, torch.bfloat16, rows=rows)
    used, bytes_ = resources(compiled, tmp_path), compiled.metadata.shared + 1024
    assert programs_at_a_time(compiled, used) >= 4 and used["STACK"] == used["LOCAL"] == 0
    assert 4 * bytes_ <= SHARED[90] + 1024 < 5 * bytes_
    check_waits_first(compiled, 90)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
@pytest.mark.parametrize("rows", [16, 64])
def test_int8_linear_fits_the_machine(rows, architecture, tmp_path):
    """Four programs at a time, three of few rows on sm_80, for each of which tiles of 8.5 KB are on their way."""
    compiled = compile_linear(linear.int8_kernel, architecture, torch.bfloat16, rows=rows)
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= 4 and used["LOCAL"] == 0
    programs = 3 if rows == 16 and architecture == 80 else 4
    assert programs * (compiled.metadata.shared + 1024) <= SHARED[architecture] + 1024
    check_waits_first(compiled, architecture)
    tensor_cores = {
        80: r"mma\.sync\S*k32\S*\.s8",
        90: r"wgmma\S*\.s8",
        100: r"(mma\.sync\S*k32\S*\.s8|tcgen05\.mma\S*i8)",
    }
    assert re.search(tensor_cores[architecture], compiled.asm["ptx"])
    assert "tt.load" not in compiled.asm["ttgir"].split("tt.atomic_rmw")[0]  # scales are copied ahead like the rest
    if architecture == 90:  # its loop does what four programs hide behind reading the tile
        loop, *_ = hot_loops(compiled, tmp_path)
        assert not re.search(r"\b(STL|LDL)\b", loop) and used["STACK"] <= 8
        assert len(re.findall(r"\bLDGSTS\S*128", loop)) >= linear.TILE.value
        assert len(loop.splitlines()) <= {16: 330, 64: 760}[rows]


@pytest.mark.parametrize(
    "architecture, dtype",
    [slow(architecture, dtype) for architecture in ARCHITECTURES for dtype in ELEMENT],
    ids=str,
)
def test_every_variant_of_linear_sums_in_one_order(architecture, dtype, tmp_path):
    """Whatever is aligned. A row's place and the splits choose no variant that sums otherwise."""
    expected = set(arithmetic(compile_linear(linear.float_kernel, architecture, dtype)))
    assert len(expected) == 1
    compiled = compile_linear(linear.float_kernel, architecture, dtype, is_whole=True, aligned=False)
    assert set(arithmetic(compiled)) == expected
    used = resources(compiled, tmp_path)
    assert programs_at_a_time(compiled, used) >= 1 and used["STACK"] == used["LOCAL"] == 0


@pytest.mark.parametrize("aligned", [True, False])
def test_rounding_of_x_compiles(aligned, tmp_path):
    kernel = linear.round_kernel
    types = {"x": "*bf16", "integers": "*i8", "scales": "*fp32"}
    constants = {"GROUPS": linear.ROUND_GROUPS}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(("GROUPS", "IS_EARLY"), "constexpr")
    divisible = {(i,): [["tt.divisibility", 16]] for i in range(6)} if aligned else {}
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, {**constants, "IS_EARLY": architecture >= 90}, divisible)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=linear.OPTIONS)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= 64 and used["STACK"] == used["LOCAL"] == 0
        check_waits_first(compiled, architecture)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", ["group_kernel", "row_kernel"])
def test_row_statistics_compiles(name, dtype, tmp_path):
    kernel = getattr(row_statistics, name)
    options = row_statistics.GROUP_OPTIONS if name == "group_kernel" else row_statistics.OPTIONS
    constants = {"IS_EARLY": True, **({"GROUPS": 512} if name == "row_kernel" else {})}
    signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"logits": ELEMENT[dtype]}
    signature |= {"tokens": "*i64", "out_tokens": "*i64", "vocab": "i32", "count": "i32", "stride": "i32"}
    signature = {each: "constexpr" if each in constants else signature[each] for each in kernel.arg_names}
    for architecture in ARCHITECTURES:
        source = ASTSource(kernel, signature, {**constants, "IS_EARLY": architecture >= 90})
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= (48 if name == "group_kernel" else 255)  # 40 groups on a multiprocessor at a time
        assert used["STACK"] + used["LOCAL"] <= (0 if name == "group_kernel" else 16)


# ==== the small ops of a layer ====

HEADS = {"HEADS": 32, "KV_HEADS": 8, "HEAD_DIM": 128, "BLOCK": 64}
_ACTIVATIONS = ("IS_GELU", "IS_CLAMPED", "IS_SIGMOID", "IS_RELU", "IS_NONE", "IS_ERF")
SMALL = [
    (rms_norm.rms_norm_kernel, {"BLOCK": 8192, "delta_weight": None, "CENTRED": True}, rms_norm.compile_options(8192)),
    (rms_norm.rms_norm_kernel, {"BLOCK": 4096, "bias": None, "CENTRED": False}, rms_norm.compile_options(4096)),
    (rotary_write.rotary_write_kernel, {**HEADS, "norm": None, "query_scales": None, "WIDTH": 128, "REST": 0,
                                         "IS_WHOLE": False, "NORMS_VALUES": False}, rotary_write.OPTIONS),
    (rotary_write.rotary_write_kernel, {**HEADS, "WIDTH": 96, "REST": 32, "IS_WHOLE": True, "NORMS_VALUES": True},
     rotary_write.OPTIONS),
    (rotary_write.rotary_write_kernel, {**HEADS, "HEAD_DIM": 512, "BLOCK": 256, "WIDTH": 512, "REST": 0,
                                        "IS_WHOLE": False, "NORMS_VALUES": True}, rotary_write.OPTIONS),
    *(
        (swiglu.swiglu_kernel, {name: name == chosen for name in _ACTIVATIONS}, swiglu.OPTIONS)
        for chosen in _ACTIVATIONS
    ),
    (take_columns.take_columns_kernel, {}, take_columns.OPTIONS),
]  # fmt: skip


@pytest.mark.parametrize("kernel, constants, options", SMALL, ids=lambda value: getattr(value, "__name__", ""))
def test_the_small_ops_compile(kernel, constants, options, tmp_path):
    types = {name: "*i32" for name in ("positions", "sequences", "slots", "order")}
    types |= {name: "*bf16" for name in ("out", "q", "keys", "values", "x")}
    weights = (
        "hidden",
        "delta",
        "delta_weight",
        "weight",
        "bias",
        "qkv",
        "cos_sin",
        "norm",
        "query_scales",
        "gates",
        "ups",
    )
    types |= dict.fromkeys(weights, "*fp32")
    types |= dict.fromkeys(("epsilon", "hidden_scale"), "fp32")
    for architecture in ARCHITECTURES:
        constants = {**constants, "IS_EARLY": architecture >= 90}
        signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        used = resources(compiled, tmp_path)
        assert used["REG"] <= 120 and used["STACK"] <= 16 and used["LOCAL"] == 0  # rows of 8192
        check_waits_first(compiled, architecture)
