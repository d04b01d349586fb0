"""A sum whose order depends on the number of rows, on every machine: what breaks the row rule, for tests to notice."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from pyspec.ops import linear
from pyspec.ops.llama_layers import llama_layers_reference


def order_dependent_linear(x, weight, bias=None, *, out_dtype=None) -> torch.Tensor:
    """linear; of rows in company, the sums go by way of 1, which rounds them otherwise than those of a row alone."""
    total = linear(x, weight, out_dtype=torch.float32)
    if x.numel() > x.shape[-1]:
        total = total + 1 - 1
    return (total if bias is None else total + bias).to(out_dtype or x.dtype)


@contextmanager
def order_dependent_llamas() -> Iterator[None]:
    """Llamas compute with order_dependent_linear, layer by layer and op by op: the compiled program has ours inside."""

    def llama_layers(*tensors, windows, heads, intermediate, epsilon):
        return llama_layers_reference(*tensors, windows, heads, intermediate, epsilon)

    # by their full names, because pyspec.ops.llama_layers is the function
    names = ("pyspec.runners.attention", "pyspec.runners.native", "pyspec.ops.llama_layers")
    llama, runner, layers = map(importlib.import_module, names)
    with (
        mock.patch.object(llama, "llama_layers", llama_layers),
        mock.patch.object(runner, "linear", order_dependent_linear),
        mock.patch.object(layers, "linear", order_dependent_linear),
    ):
        yield
