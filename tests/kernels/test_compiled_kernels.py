"""No kernel's machine code is worse than bench/results/compiled_kernels_*.json has it: fewer blocks a multiprocessor, a
stack, atomics that spin, longer tiles. `python bench/compiled_kernels.py --write` records what there is."""

import os

import pytest
import torch

from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
import compiled_kernels  # noqa: E402
from compiled_kernels import CALLS, measure, nvcc, record_of, recorded, worse  # noqa: E402
from machine_code import SPINNING, TENSOR_CORES, Code, blocks_at_a_time  # noqa: E402

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has better to do, and is not asked"),
]


@pytest.mark.parametrize("architecture", [slow(80), 90, slow(100)])
@pytest.mark.parametrize("name", CALLS)
def test_no_kernel_got_worse(name, architecture):
    if CALLS[name].source and nvcc() is None:
        pytest.skip("nvcc was not found")
    if not record_of(name).exists():
        pytest.skip(f"{record_of(name).name} was not recorded: it is another compiler's code")
    before = recorded(record_of(name))[name][str(architecture)]
    found = measure(name, architecture)
    assert found.keys() == before.keys()
    faults = {kernel: worse(found[kernel], before[kernel]) for kernel in found}
    assert not any(faults.values()), faults


def test_what_is_worse():
    good = {"registers": 100, "stack": 0, "blocks": 3, "spinning": 0, "tensor_cores": 16, "tiles": [90, 200]}
    good["loads"] = {"4": 1, "16": 9}
    better = {"registers": 90, "blocks": 4, "tensor_cores": 8, "tiles": [210], "loads": {"8": 2}}
    assert worse(good, good) == worse(good | better, good) == []
    for change in (
        {"registers": 120},
        {"stack": 8},
        {"blocks": 2},
        {"spinning": 1},
        {"tensor_cores": 0},
        {"tiles": [90, 230]},
        {"loads": {"2": 1, "16": 9}},
    ):
        assert len(worse(good | change, good)) == 1, change


def test_floors_are_those_of_the_arithmetic():
    """A copy-like kernel moves its bytes, and of a product the weight is what counts."""
    floor = compiled_kernels.floors("linear bf16 128256x4096")
    assert 1.0 < floor["memory"] / (2 * 128256 * 4096 / compiled_kernels.BANDWIDTH * 1e6) < 1.02
    assert floor["instructions"] < floor["memory"]


def test_blocks_of_a_multiprocessor():
    for registers, threads, shared, blocks in (
        (212, 256, 0, 1),
        (128, 256, 0, 2),
        (127, 128, 0, 4),
        (40, 64, 0, 24),
        (16, 64, 0, 32),
        (32, 1024, 0, 2),
        (32, 128, 64 * 1024, 3),
    ):
        code = Code(registers, stack=0, static_shared=0, lines={})
        assert blocks_at_a_time(code, threads, shared, 90) == blocks, (registers, threads, shared)


def test_machine_code_is_read():
    """Two loops, of which the inner one is a tile: it has the tensor cores, though the other loads too."""
    wait = ["NOP"] * 16
    text = [
        "LDG.E.U16 R4, desc[UR4][R2.64]",
        *wait,
        "LDG.E.128.CONSTANT R4, [R2]",
        "HMMA.16816.F32.BF16 R4, R8, R2, R4",
    ]
    text += ["LDGSTS.E.BYPASS.128 [R2], [R4]", "@!P0 BRA 0x10", *wait, "ATOMS.CAST.SPIN.64 R4, [R2], R4, R6"]
    text += ["LDG.E R4, [R2]", "@P1 BRA 0x0", "MUFU.EX2 R4, R4", "EXIT"]
    code = Code(40, 0, 0, {16 * place: line for place, line in enumerate(text)})
    assert code.loads() == {2: 1, 4: 1, 16: 2}
    assert code.count(SPINNING) == 1 and code.count(TENSOR_CORES) == 1
    (tile,) = code.tiles
    assert min(tile.lines) == 16 and len(tile.lines) == 20
    assert tile.clocks() == {"issue": 5.0, "tensor cores": 2.0, "shared memory": 4.0}
    assert code.clocks()["special"] == 2
