"""What differs where kernels are tested on a GPU: copies, tolerances, and what becomes of a process that lost its CUDA.

A pytest plugin too, which tests/conftest.py loads.
"""

import os

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()
# A GPU's exp2, log2 and division are right to 2 units in the last place, and its tensor cores do not round each sum.
LOOSER = 4.0
SHOWN = 10
_errors: list[float] = []  # of the running test's comparisons


def to_device(tensor: Tensor, device: str) -> Tensor:
    """tensor.to(device), but with its strides and where it begins: a plain copy would join what lies apart."""
    elements = tensor.untyped_storage().nbytes() // tensor.itemsize
    memory = torch.as_strided(tensor, (elements,), (1,), 0).to(device)
    return torch.as_strided(memory, tensor.shape, tensor.stride(), tensor.storage_offset())


def assert_close(found: Tensor, expected: Tensor, *, atol: float | Tensor, rtol: float = 0.0, equal_nan: bool = False):
    """Within atol + rtol * abs(expected); on a GPU within LOOSER times that, and the largest are shown at the end.

    Args:
        atol: one for all elements or, as a tensor, one for each.
    """
    assert found.dtype == expected.dtype and found.shape == expected.shape and found.device == expected.device
    same = found == expected
    if equal_nan:
        same |= found.isnan() & expected.isnan()
    error = (found.double() - expected.double()).abs() / (atol + rtol * expected.double().abs())
    error = torch.where(same, 0.0, error.nan_to_num(torch.inf, torch.inf))  # as a part of what is allowed
    largest = float(error.max()) if error.numel() else 0.0
    _errors.append(largest)
    if largest > (LOOSER if HAS_GPU else 1.0):
        place = tuple((error == largest).nonzero()[0].tolist())
        pytest.fail(f"{largest:.3g} times the error that is allowed at {place}: {found[place]} for {expected[place]}")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    if call.when == "call" and _errors:
        item.user_properties.append(("largest error", max(_errors)))
        _errors.clear()


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    """After an illegal access all of CUDA fails in its process: a worker of xdist ends, once its report is sent.

    Another takes its place.
    """
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


def pytest_terminal_summary(terminalreporter):
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    errors = [(dict(report.user_properties).get("largest error"), report.nodeid) for report in reports]
    errors = sorted((error for error in errors if error[0] is not None), reverse=True)[:SHOWN]
    if errors and HAS_GPU:
        terminalreporter.section(f"largest errors, as parts of the tolerance; up to {LOOSER:g} is allowed")
        for error, name in errors:
            terminalreporter.write_line(f"{error:8.3f} {name}")
