"""on_gpu.py, whose GPU is a fake one where there is none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.on_gpu import assert_close, to_device

CONFTEST = """
import torch
from tests.helpers import on_gpu
on_gpu.HAS_GPU, torch.cuda.is_initialized = True, lambda: True
is_lost = False
def synchronize():
    if is_lost:
        raise RuntimeError("an illegal memory access was encountered")
torch.cuda.synchronize = synchronize
"""
TESTS = """
import conftest, torch
from tests.helpers.on_gpu import assert_close
one = torch.ones(3)

def test_wrong():
    assert False

def test_illegal_access():
    conftest.is_lost = True
    assert False

def test_after_it():
    assert not conftest.is_lost
    assert_close(one + 3e-6, one, atol=1e-6)

def test_too_far():
    assert_close(one + 5e-6, one, atol=1e-6)
"""


def test_a_worker_that_lost_cuda_ends_and_errors_are_listed(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_some.py").write_text(TESTS)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.helpers.on_gpu",
        "-p",
        "no:cacheprovider",
        "-n",
        "1",
        "--rootdir",
        tmp_path,
    ]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [*command, "--rootdir", tmp_path, tmp_path],
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    text = result.stdout
    assert "worker 'gw0' crashed while running 'test_some.py::test_illegal_access'" in text
    assert "1 passed" in text and "FAILED test_some.py::test_wrong" in text, text
    lines = text[text.index("largest errors") :].splitlines()
    assert lines[1].split()[1].endswith("::test_too_far") and 4.5 < float(lines[1].split()[0]) < 5.5
    assert lines[2].split()[1].endswith("::test_after_it") and 2.5 < float(lines[2].split()[0]) < 3.5


def test_assert_close():
    inf, nan = torch.inf, torch.nan
    assert_close(torch.tensor([inf, nan, 0.0]), torch.tensor([inf, nan, 0.0]), atol=0.0, equal_nan=True)
    assert_close(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 1.0]), atol=torch.tensor([100.0, 200.0]))
    assert_close(torch.zeros(0), torch.zeros(0), atol=0.0)
    for found, expected in ((nan, nan), (inf, 1.0), (1.0, inf), (inf, -inf), (1.0, nan), (nan, 1.0), (1.0, 200.0)):
        with pytest.raises(pytest.fail.Exception):
            assert_close(torch.tensor([0.0, found]), torch.tensor([0.0, expected]), atol=1.0, rtol=0.1)
    with pytest.raises(AssertionError):
        assert_close(torch.zeros(2), torch.zeros(2).double(), atol=1.0)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_copy_keeps_its_strides(device):
    memory = torch.arange(60.0)
    for tensor in (memory[1:].view(59), memory.view(5, 12)[1:, 3:7], memory.view(12, 5).T, memory[:4].expand(3, 4)):
        found = to_device(tensor, device)
        assert found.device.type == device and found.shape == tensor.shape and found.stride() == tensor.stride()
        assert found.storage_offset() == tensor.storage_offset()
        assert device == "meta" or torch.equal(found, tensor)
