"""flash-attn is a peer in benchmarks of attention wherever it can run and has the mask, with the same values."""

import sys

import bench_block_masked_attention
import bench_tree_attention
import pytest
import torch

from pyspec import DraftTree
from pyspec.measure import cases
from pyspec.ops import tree_attention
from pyspec.runners import flash_attn
from tests.helpers import fake_flash_attn

SHAPE = cases.Attention(64, 96, 4, 2, 64, 200)


@pytest.fixture
def fake(monkeypatch):
    """A fake of the package takes its place, on the CPU."""
    monkeypatch.setitem(sys.modules, "flash_attn", fake_flash_attn)
    monkeypatch.setattr(flash_attn, "DEVICE", "cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cases, "CONTEXT", 300)
    monkeypatch.setattr(cases, "PROMPT", 256)


def assert_close(found, expected):
    torch.testing.assert_close(found.float(), expected.float(), atol=2e-2, rtol=2e-2)


def test_the_cases_of_kernels(fake):
    documents = cases._block_masked_attention(SHAPE, "cpu")
    assert_close(documents.peers["flash-attn"]().transpose(0, 1)[None], documents.call())
    for quantised in (cases._gear(SHAPE, "cpu"), cases._residual_vq(SHAPE, "cpu")):
        assert_close(quantised.peers["dense flash-attn"](), quantised.peers["dense tree_attention"]())
    assert "flash-attn, a chain" in cases._tree_attention(SHAPE, "cpu").peers


def test_the_benchmark_of_trees_gives_it_a_chain(fake, monkeypatch):
    monkeypatch.setattr(bench_tree_attention, "SHAPES", ((1, 70), (5, 70)))
    monkeypatch.setattr(bench_tree_attention.measure, "read_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(bench_tree_attention.measure, "multiply_rate", lambda dtype, device: 1e11)
    results = []
    monkeypatch.setattr(
        bench_tree_attention,
        "milliseconds",
        lambda calls, p, device: results.append((p, calls)) or dict.fromkeys(calls, 1),
    )
    bench_tree_attention.run("cpu", with_flex=False)
    assert len(results) == 4
    for problem, calls in results:
        assert ("flash-attn, a chain" in calls) == (problem.dtype == torch.bfloat16)
        if problem.dtype == torch.bfloat16:
            bits = torch.from_numpy(DraftTree.chain([0] * problem.nodes).ancestor_bits)[None]
            chain = tree_attention(problem.q, problem.k, problem.v, bits, problem.prefix_lens)
            assert_close(calls["flash-attn, a chain"](problem), chain)


@pytest.mark.parametrize("pattern", ["causal", "all ones", "window", "documents", "tree"])
def test_the_benchmark_of_masks(fake, pattern):
    problem = bench_block_masked_attention.Problem(pattern, 64, torch.bfloat16)
    peers = problem.peers()
    assert ("flash-attn" in peers) == (pattern != "tree")
    if pattern != "tree":
        found = peers["flash-attn"]()
        assert_close(found.transpose(0, 1)[None] if pattern == "documents" else found, problem.pyspec(problem.mask)())
