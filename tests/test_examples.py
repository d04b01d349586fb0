"""The examples run, and say what they should."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command) -> str:
    found = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_torch_ops():
    assert "topk: the same eight" in run(sys.executable, EXAMPLES / "torch_ops.py")


@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="needs cmake and a compiler")
def test_cpu_kernels_link_without_torch(tmp_path):
    run("cmake", "-S", EXAMPLES / "cpu_kernels", "-B", tmp_path, "-DCMAKE_BUILD_TYPE=Release")
    run("cmake", "--build", tmp_path)
    if "avx2" in Path("/proc/cpuinfo").read_text():
        assert "largest difference from the formula" in run(tmp_path / "example")
    libraries = run("ldd", tmp_path / "example")
    assert "torch" not in libraries and "python" not in libraries
