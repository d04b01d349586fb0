"""The CUDA kernels compiled by nvcc for three GPU generations: no spills, no stack, and shared memory that fits; and
their library built and loaded, with or without a GPU."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.slow import slow

ROOT = Path(__file__).parents[3]
SOURCES = [*sorted((ROOT / "kernels/cuda").glob("*.cu")), ROOT / "tests/cuda_on_host/examples.cu"]
ARCHITECTURES = [slow(80), 90, slow(100)]
SHARED_LIMIT = 48 * 1024  # bytes of static shared memory; what is dynamic is asked for at the launch
FOLDERS = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(FOLDERS))

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc was not found on PATH, in CUDA_HOME or in /usr/local/cuda")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A function: the code of a source for an architecture, and what ptxas says of it."""

    @functools.cache
    def compile(source, architecture):
        cubin = tmp_path_factory.mktemp("nvcc") / "kernel.cubin"
        command = [NVCC, "-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
        command += [f"-I{ROOT / 'kernels'}", str(source), "-o", str(cubin)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return cubin, result.stderr

    return compile


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_fits_the_machine(source, architecture, compiled):
    _, report = compiled(source, architecture)
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert kernels and len(stacks) >= len(kernels)
    assert set(stacks) == {("0", "0", "0")}, report
    assert all(int(size) <= SHARED_LIMIT for size in re.findall(r"(\d+) bytes smem", report))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_residual_vq_is_on_tensor_cores(architecture, compiled):
    """Codebooks of 256 are copied to shared memory and read there in 16 and 8 bytes; nothing is atomic."""
    triton = pytest.importorskip("triton", reason="triton brings cuobjdump")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin, _ = compiled(ROOT / "kernels/cuda/residual_vq.cu", architecture)
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    folds = [set(re.findall(r"[A-Z]\w*(?:\.\w+)*", part)) for part in text.split("Function : ") if "4fold" in part[:99]]
    copying = [instructions for instructions in folds if "LDGSTS.E.BYPASS.128" in instructions]
    assert folds and copying
    assert all("HMMA.16816.F32" in instructions for instructions in folds)
    assert not any(name.startswith(("ATOM", "RED.", "LD.")) for instructions in folds for name in instructions)
    assert all({"LDS.128", "LDS.64"} <= instructions for instructions in copying)


@pytest.mark.slow
def test_the_library_loads_beside_any_torch(tmp_path):
    """Built as PYSPEC_CUDA=1 asks for it, for one architecture; without CUDA in torch its ops are registered only."""
    pybind11 = pytest.importorskip("pybind11")
    environment = os.environ | {"CUDAARCHS": "90", "CUDACXX": NVCC}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if not all(shutil.which(tool, path=environment["PATH"]) for tool in ("cmake", "ninja")):
        pytest.skip("cmake and ninja build the library")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": tmp_path,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "TORCH_DIR": Path(torch.__file__).parent,
        "PYSPEC_CUDA": "1",
    }
    configure = ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    for command in (configure, ["cmake", "--build", tmp_path / "build", "--target", "pyspec_cuda"]):
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr

    script = f"""
import ctypes, torch
path = {str(tmp_path / "lib/libpyspec_cuda.so")!r}
library = ctypes.CDLL(path)
torch.ops.load_library(path)
library.pyspec_cuda_architectures.restype = ctypes.c_char_p
print(library.pyspec_cuda_architectures().decode())
for name in {[source.stem for source in (ROOT / "kernels/cuda").glob("*.cu")]!r}:
    print(name, torch._C._dispatch_has_kernel_for_dispatch_key("pyspec::" + name, "CUDA"))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("90\n") and "topk True" in result.stdout and "False" not in result.stdout
    needed = subprocess.run(["ldd", tmp_path / "lib/libpyspec_cuda.so"], capture_output=True, text=True).stdout
    assert "libcudart" not in needed  # linked in: no lock to one version of CUDA
