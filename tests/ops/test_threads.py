"""Threads that share a machine: nobody is waited for who does not come, in C++ alone and in ops that Python calls."""

import multiprocessing
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from pyspec.ops import lay_out_weight, linear
from pyspec.ops._library import compiled_library
from pyspec.runners.tape import Arena, Tape

ROOT = Path(__file__).parents[2]
CHECKS = ("items", "loops", "failures", "together", "forked", "region", "without_helpers")
TRACED = ("items", "loops", "failures", "together", "region")  # that ThreadSanitizer can follow

has_parts = shutil.which("g++") is not None and (ROOT / "csrc").is_dir()  # beside a wheel there are no sources
needs_compiler = pytest.mark.skipif(not has_parts, reason="needs g++ and the sources")
needs_library = pytest.mark.skipif(compiled_library()[0] is None, reason="the compiled kernels are not there")


def driver(folder: Path, *flags: str) -> Path:
    program = folder / "driver"
    processor = "PYSPEC_ARM" if platform.machine() in ("aarch64", "arm64") else "PYSPEC_X86"
    sources = [ROOT / "csrc/cpu/threads.cpp", ROOT / "tests/ops/threads_driver.cpp"]
    options = ["-std=c++17", "-O1", "-pthread", f"-D{processor}=1", f"-I{ROOT}/kernels", f"-I{ROOT}/csrc/cpu"]
    subprocess.run(["g++", *options, *flags, *sources, "-o", program], check=True, capture_output=True, text=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return driver(tmp_path_factory.mktemp("threads"))


@needs_compiler
@pytest.mark.parametrize("check", CHECKS)
def test_whoever_comes(program, check):
    done = subprocess.run([program, check], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_compiler
@pytest.mark.slow
def test_without_races(tmp_path):
    try:
        program = driver(tmp_path, "-g", "-fsanitize=thread")
    except subprocess.CalledProcessError:
        pytest.skip("g++ has no ThreadSanitizer")
    for check in TRACED:
        done = subprocess.run(["setarch", "-R", program, check], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]


WEIGHT = lay_out_weight(torch.randn(96, 64, generator=torch.Generator().manual_seed(0)))
EYE = lay_out_weight(torch.eye(96))
X = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))


def result(_=None) -> torch.Tensor:
    """By an op alone and by a tape, which agree."""
    found = linear(X, WEIGHT)
    with torch.inference_mode():
        (again,) = Tape(lambda: [linear(linear(X, WEIGHT), EYE)], Arena()).run()
        assert torch.equal(again, found)
    return found


def in_a_child(expected, queue) -> None:
    queue.put(all(torch.equal(result(), expected) for _ in range(3)))


@needs_library
def test_several_python_threads_at_once():
    expected = result()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(result, range(40)))


@needs_library
def test_the_number_of_threads_may_change():
    before, expected = torch.get_num_threads(), result()
    try:
        for threads in (1, 4, 2, 7, 1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(result(), expected)
    finally:
        torch.set_num_threads(before)


@needs_library
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
def test_a_child_of_a_fork_has_threads_of_its_own():
    expected, context = result(), multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=in_a_child, args=(expected, queue))
    child.start()
    try:
        assert queue.get(timeout=120)
    finally:
        child.kill()
        child.join()
