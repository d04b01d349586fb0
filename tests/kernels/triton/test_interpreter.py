"""Runs this folder's kernel tests in Triton's interpreter: long files in processes of their own, the others in one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed for this platform")

LONG = ["block_masked_attention", "expert_linear", "linear_codes", "llama", "low_bits", "tree_attention"]
FILES = {
    path.stem.removeprefix("test_").removesuffix("_triton"): path for path in Path(__file__).parent.glob("*_triton.py")
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU instead")
@pytest.mark.parametrize("names", [*([name] for name in LONG), sorted(FILES.keys() - LONG)], ids=" ".join)
def test_kernels_in_the_interpreter(names, request):
    """Of the slow tests those that this run has too."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", request.config.option.markexpr]
    command += [str(FILES[name]) for name in names]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
