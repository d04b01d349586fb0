"""cuda_on_host.h: what it implements does what CUDA says, and mistakes are reported."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.cuda_on_host import HostLibrary, Launch, build_on_host, fenced_memory

EXAMPLES = Path(__file__).parent / "examples.cu"
# the device: one block at a time in order; in another order; three at a time
SETTINGS = [{}, {"seed": 1}, {"seed": 2}, {"blocks_in_flight": 3, "seed": 3}]


@pytest.fixture(scope="module")
def library():
    return HostLibrary(build_on_host(EXAMPLES))


@pytest.fixture(params=SETTINGS, ids=str)
def device(library, request):
    library.set(**request.param)
    yield library
    library.set()


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def random_ints(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(-1000, 1000, size, dtype=np.int32)


@pytest.mark.parametrize("n, threads", [(1, 1), (1000, 64), (5000, 1024)])
def test_block_sums(device, n, threads):
    x, blocks = random_ints(n), -(-n // threads)
    sums = np.zeros(blocks, np.int32)
    device.call("example_block_sums", pointer(x), pointer(sums), n, blocks, threads)
    padded = np.pad(x, (0, blocks * threads - n)).reshape(blocks, threads)
    assert np.array_equal(sums, padded.sum(1, dtype=np.int32))


@pytest.mark.parametrize("threads", [32, 96, 1024])
def test_scan(device, threads):
    x, out = random_ints(threads), np.zeros(threads, np.int32)
    device.call("example_scan", pointer(x), pointer(out), threads)
    assert np.array_equal(out, np.cumsum(x, dtype=np.int32))


def test_warp_operations(device):
    x, lanes = random_ints(32), np.arange(32)
    out = np.zeros((12, 32), np.int32)
    device.call("example_warp_operations", pointer(x), pointer(out))
    bits = int(sum(1 << int(i) for i in lanes[x > 0]))
    same = [sum(1 << int(i) for i in lanes[(x & 3) == (value & 3)]) for value in x]
    half = np.where(lanes < 16, x[lanes ^ 1], np.array(bits & 0xFFFF0000, np.uint32).astype(np.int32))
    expected = [
        x[31 - lanes],
        x[lanes // 8 * 8 + 3],
        np.where(lanes % 16 >= 2, x[lanes - 2], x),
        np.where(lanes < 27, x[(lanes + 5) % 32], x),
        x[lanes ^ 16],
        np.full(32, np.array(bits, np.uint32).astype(np.int32)),
        np.full(32, 1),
        np.full(32, int((x == x[7]).all())),
        np.array(same, np.uint32).astype(np.int32),
        np.full(32, x.max()),
        half,
        np.full(32, np.array((1 << 40 | 9) >> 8 & 0xFFFFFFFF, np.uint32).astype(np.int32)),
    ]
    assert np.array_equal(out, np.stack(expected))


def test_last_block(device):
    blocks, threads = 37, 64
    x, partial = random_ints(blocks * threads), np.zeros(blocks, np.int32)
    finished, total = np.zeros(1, np.uint32), np.zeros(1, np.int32)
    arguments = [pointer(array) for array in (x, partial, finished, total)]
    device.call("example_last_block_sum", *arguments, blocks, threads)
    assert total[0] == x.sum() and finished[0] == 0


def test_a_thread_that_waits_lets_others_run(device):
    out = np.zeros(2, np.int32)
    device.call("example_wait_for_flag", pointer(out))
    assert out.tolist() == [7, 8]


def test_every_half_and_bfloat16_becomes_a_float_and_comes_back(library):
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = torch.from_numpy(bits.copy().view(np.int16))
    out, half, bfloat16 = np.zeros((1 << 16, 2), np.float32), np.zeros_like(bits), np.zeros_like(bits)
    library.call("example_to_float", *map(pointer, (bits, bits, out, half, bfloat16)), 256)
    for column, (again, dtype) in enumerate([(half, torch.float16), (bfloat16, torch.bfloat16)]):
        expected = x.view(dtype).float().numpy()
        assert np.array_equal(out[:, column], expected, equal_nan=True)
        number = ~np.isnan(expected)
        assert np.array_equal(again[number], bits[number])
        assert torch.from_numpy(again.view(np.int16)).view(dtype).isnan().numpy()[~number].all()


@pytest.mark.parametrize(
    "which, report",
    [
        (0, "deadlock: threads 0-4 at __syncthreads (examples.cu:"),
        (1, "threads meet at different barriers"),
        (2, "deadlock: threads 0-2 at __syncwarp with mask 0xffffffff (examples.cu:"),
        (3, "__shfl_sync asks a lane that is not in the mask"),
        (4, "wrote behind its dynamic shared memory"),
        (7, "thread 9 touches memory that is not there"),
    ],
)
def test_mistakes_are_reported(device, which, report):
    out = np.zeros(64, np.int32)
    with pytest.raises(RuntimeError) as error:
        device.call("example_mistake", which, pointer(out))
    assert str(error.value).startswith("block (0, 0, 0): ") and report in str(error.value)
    device.call("example_mistake", -1, pointer(out))  # and the next launch is a good one


def test_fenced_memory(device):
    memory, before = fenced_memory(400)
    x, sums = memory.view(torch.int32).fill_(1), np.zeros(1, np.int32)
    arguments = [ctypes.c_void_p(x.data_ptr()), pointer(sums)]
    device.call("example_block_sums", *arguments, 100, 1, 128)
    assert sums[0] == 100 and (before == 0xA7).all()
    with pytest.raises(RuntimeError, match="thread 100 touches memory that is not there"):
        device.call("example_block_sums", *arguments, 101, 1, 128)


def test_shared_memory_starts_with_rubbish(library):
    out = np.zeros(64, np.int32)
    library.call("example_mistake", 5, pointer(out))
    assert (out == np.int32(0xA7A7A7A7 - (1 << 32))).all()


@pytest.mark.skipif(os.environ.get("CUDA_ON_HOST") == "races", reason="where it is reported")
def test_a_missing_barrier_shows_in_another_order(library):
    results = set()
    for seed in range(4):
        library.set(seed=seed)
        out = np.zeros(64, np.int32)
        library.call("example_mistake", 6, pointer(out))
        results.add(out.tobytes())
    library.set()
    assert len(results) > 1


@pytest.mark.parametrize("blocks, threads", [(0, 32), (1, 0), (1, 1025)])
def test_launches_that_no_gpu_takes(library, blocks, threads):
    array = np.zeros(1, np.int32)
    with pytest.raises(RuntimeError, match="grid is empty|1 to 1024 threads"):
        library.call("example_block_sums", pointer(array), pointer(array), 1, blocks, threads)


def test_launches_can_be_noted_and_not_run(library):
    x, sums = random_ints(100), np.zeros(2, np.int32)
    with library.noting() as found:
        library.call("example_block_sums", pointer(x), pointer(sums), 100, 2, 64)
        library.call("example_scan", pointer(x), pointer(sums), 64)
    assert not sums.any()
    assert found == [Launch("block_sums", (2, 1, 1), 64, 256), Launch("scan", (1, 1, 1), 64, 0)]
    library.call("example_block_sums", pointer(x), pointer(sums), 100, 2, 64)
    assert sums.sum() == x.sum()


# ==== modes ====


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "which, report",
    [
        (6, "static shared memory"),
        (8, "thread 1 writes static shared memory, which thread 0 wrote"),
        (9, "static shared memory"),
        (10, "reads static shared memory, which thread"),
    ],
)
def test_races_are_found(which, report, seed):
    library, out = HostLibrary(build_on_host(EXAMPLES, mode="races")), np.zeros(64, np.int32)
    library.set(seed=seed)
    with pytest.raises(RuntimeError, match=r"race: .*, and no barrier is between") as error:
        library.call("example_mistake", which, pointer(out))
    assert seed or report in str(error.value)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_in_order_is_no_race(seed):
    library, out = HostLibrary(build_on_host(EXAMPLES, mode="races")), np.zeros(64, np.int32)
    library.set(seed=seed)
    library.call("example_no_race", pointer(out))
    assert out[:16].tolist() == [place + sum(range(64)) for place in range(16)]


@pytest.mark.parametrize(
    "which, report", [(11, "misaligned address"), (12, "outside the range of representable values")]
)
def test_undefined_behaviour_is_found(which, report, capfd):
    library, out = HostLibrary(build_on_host(EXAMPLES, mode="undefined")), np.zeros(64, np.int32)
    library.call("example_mistake", which, pointer(out))
    assert report in capfd.readouterr().err


FOLDER = Path(__file__).parents[1] / "kernels/cuda"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU instead")
@pytest.mark.parametrize("path", sorted(FOLDER.glob("test_*_cuda.py")), ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", ["undefined", "races"])
def test_kernels_in_every_mode(mode, path, tmp_path):
    """The tests of a kernel, whose library is made otherwise, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow", str(path)]
    log = tmp_path / "undefined"
    environment = {**os.environ, "CUDA_ON_HOST": mode, "UBSAN_OPTIONS": f"log_path={log}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
    reports = "".join(part.read_text() for part in tmp_path.glob("undefined*"))
    assert not reports, reports[:5000]
