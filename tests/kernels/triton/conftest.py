"""Triton kernels run on a GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when triton is first imported, so it needs processes of its own:
test_interpreter.py starts them with TRITON_INTERPRET=1 and runs the tests of this folder there.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or INTERPRETED:
        return
    for item in items:
        if "kernel_device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="run by test_interpreter.py"))


@pytest.fixture
def kernel_device() -> str:
    """Where tensors for a Triton kernel live."""
    return "cuda" if torch.cuda.is_available() else "cpu"
