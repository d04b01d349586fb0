"""A sum whose order depends on the number of rows, on every machine: what breaks the row rule, for tests to notice."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from pyspec.ops import linear
from pyspec.runners.replay import launch_by_launch


def order_dependent_linear(x, weight, bias=None, *, out_dtype=None) -> torch.Tensor:
    """linear; of rows in company, the sums go by way of 1, which rounds them otherwise than those of a row alone."""
    total = linear(x, weight, out_dtype=torch.float32)
    if x.numel() > x.shape[-1]:
        total = total + 1 - 1
    return (total if bias is None else total + bias).to(out_dtype or x.dtype)


@contextmanager
def order_dependent_llamas() -> Iterator[None]:
    """Llamas compute with order_dependent_linear, launch by launch: what is recorded is the compiled kernel alone."""
    names = ("pyspec.architectures.weights", "pyspec.architectures.blocks")
    weights, blocks = map(importlib.import_module, names)
    with (
        launch_by_launch(),
        mock.patch.object(weights, "linear", order_dependent_linear),
        mock.patch.object(blocks, "linear", order_dependent_linear),
    ):
        yield
