"""The quality benchmark of packed caches, on a small random model: its figures are those of its definitions."""

import kv_cache
import pytest
import torch
from random_llama import random_llama, random_tokens

from pyspec.caches import GearCache
from pyspec.ops.gear import BLOCK


@pytest.fixture(scope="module")
def rows():
    model = random_llama(dtype=torch.float32)
    pages = [random_tokens(kv_cache.FIRST + BLOCK, seed) for seed in range(2)]
    return {row["cache"]: row for row in kv_cache.run(model, pages, ["int8", "kivi-2bit", "gear-2bit"])}


def test_more_bits_are_nearer_to_the_dense_cache(rows):
    assert rows["int8"]["kl"] < rows["gear-2bit"]["kl"] < rows["kivi-2bit"]["kl"]
    assert rows["int8"]["kl"] < 1e-3 and rows["int8"]["same_top"] > 0.95
    assert abs(rows["int8"]["perplexity"] / rows["dense"]["perplexity"] - 1) < 0.01


def test_errors_are_beside_those_of_the_backbone(rows):
    for name in ("int8", "kivi-2bit"):
        assert rows[name]["key_ratio"] == rows[name]["value_ratio"] == pytest.approx(1)
    assert rows["gear-2bit"]["key_ratio"] < 1 and rows["gear-2bit"]["value_ratio"] < 1
    assert rows["int8"]["effective_bits_at_8k"] == GearCache(8, 128).effective_bits(64, 8192)
    assert all(row["accepted"] >= 1 for row in rows.values())


def test_the_table_is_shown(rows, capsys):
    kv_cache.show(list(rows.values()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
