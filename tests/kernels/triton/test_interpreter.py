"""Runs this folder's kernel tests in Triton's interpreter, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU instead")
@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("test_*_triton.py")), ids=lambda path: path.stem)
def test_kernels_in_the_interpreter(path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(path)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
