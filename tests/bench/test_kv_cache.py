"""The quality benchmark of quantised caches, on a small random model: its figures are those of its definitions."""

import kv_cache
import pytest
import torch

from pyspec.caches import Codebooks, GearSettings, ResidualVqSettings
from pyspec.ops.gear import BLOCK
from tests.helpers.random_llama import random_llama, random_tokens


@pytest.fixture(scope="module")
def model():
    return random_llama(dtype=torch.float32)


@pytest.fixture(scope="module")
def rows(model):
    pages = [random_tokens(kv_cache.FIRST + BLOCK, seed) for seed in range(2)]
    return {row["cache"]: row for row in kv_cache.run(model, pages, ["int8", "kivi-2bit", "gear-2bit", "int4, half"])}


def test_more_bits_are_nearer_to_the_dense_cache(rows):
    assert rows["int8"]["kl"] < rows["gear-2bit"]["kl"] < rows["kivi-2bit"]["kl"]
    assert rows["int8"]["kl"] < 1e-3 and rows["int8"]["same_top"] > 0.95
    assert abs(rows["int8"]["perplexity"] / rows["dense"]["perplexity"] - 1) < 0.01


def test_errors_are_beside_those_of_the_backbone(rows):
    for name in ("int8", "kivi-2bit"):
        assert rows[name]["key_ratio"] == rows[name]["value_ratio"] == pytest.approx(1)
    assert rows["gear-2bit"]["key_ratio"] < 1 and rows["gear-2bit"]["value_ratio"] < 1
    assert rows["int8"]["effective_bits_at_8k"] == GearSettings(8, 128).effective_bits(64, 8192)
    assert "key_error" not in rows["int4, half"] and rows["dense"]["kl"] == rows["dense"]["change"] == 0
    assert all(row["accepted"] >= 1 for row in rows.values())


@pytest.mark.parametrize("keys", ["post-rope", "pre-rope"])
def test_errors_of_codes_are_those_of_each_depth(model, keys, capsys):
    words = torch.randn(2, 2, 3, 256, 32, generator=torch.Generator().manual_seed(0))
    words *= 0.8 * 0.8 ** torch.arange(3)[:, None, None]
    frequencies = model.config.rope_frequencies() if keys == "pre-rope" else None
    books = Codebooks(words.half(), 2, 64, model.fingerprint, frequencies)
    text = random_tokens(kv_cache.FIRST + BLOCK)
    parts = kv_cache.keys_values(model, text)
    figures = kv_cache.error_figures(parts, ResidualVqSettings(books))
    assert len(figures) == 8 and figures["key_error"] == figures["key_error_depth_3"]
    for side in ("key", "value"):
        by_depth = [figures[f"{side}_error_depth_{depth}"] for depth in (1, 2, 3)]
        assert by_depth == sorted(by_depth, reverse=True) and by_depth[2] < 0.9
    kv_cache.show_depths([figures | {"cache": "rvq"}, {"cache": "int8"}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["rvq,", "by", "depth", "1", "2", "3"] and lines[2].startswith("         keys")
    assert f"{figures['value_error']:.3f}" in lines[3] and len({len(line) for line in lines[1:]}) == 1


def test_the_table_is_shown(rows, capsys):
    kv_cache.show(list(rows.values()))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and len({len(line) for line in lines}) == 1


class Words:
    """A tokenizer whose tokens are letters."""

    def encode(self, text):
        return [ord(letter) for letter in text]


def test_numbers_are_hidden_at_their_depths():
    class Model:
        tokenizer = Words()

    for (text, key), depth in zip(kv_cache.passkeys(Model, 2000), kv_cache.DEPTHS, strict=True):
        text = "".join(map(chr, text))
        assert len(key) == 5 and text.count(key) == 2 and 1900 < len(text) < 2400
        assert text.index(key) / len(text) == pytest.approx(depth, abs=0.08)
        assert text.endswith("The pass key is")


def test_peers_are_beside_their_own_dense_cache(monkeypatch):
    text = random_tokens(kv_cache.FIRST + BLOCK)
    dense = torch.randn(len(text) - 1, 50).log_softmax(-1)

    def broken():
        raise ImportError("no such package")

    def engines(model, tokens, threads):
        yield "here", lambda: (lambda text: dense, {"same": lambda text: dense, "other": lambda text: dense.roll(1, 0)})
        yield "away", broken

    monkeypatch.setattr(kv_cache.cache_peers, "engines", engines)
    (same, other), missing = kv_cache.run_peers(None, [[token % 50 for token in text]], 1)
    assert same["cache"] == "here same" and same["kl"] == same["change"] == 0 and same["same_top"] == 1
    assert other["kl"] > 0.1 and missing == {"away": "ImportError: no such package"}


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_each_cache_of_transformers_is_a_peer_or_is_missed_by_name(backend, monkeypatch):
    """On a small model: near its own dense cache with 4 bits, further with 2; or why it is not there."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    small = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr(kv_cache.cache_peers.peers, "dense_transformers", lambda model: small)
    engines = dict(kv_cache.cache_peers.engines(None, 512, 1))
    assert list(engines) == ["transformers quanto", "transformers hqq", "llama.cpp"]
    name = f"transformers {backend}"
    monkeypatch.setattr(kv_cache.cache_peers, "engines", lambda *args: [(name, engines[name])])
    rows, missing = kv_cache.run_peers(None, [[token % 50 for token in random_tokens(kv_cache.FIRST + BLOCK)]], 1)
    if missing:
        assert not rows and backend in missing[name] and missing[name].startswith("ImportError")
        pytest.skip(missing[name].splitlines()[0])
    assert [row["cache"] for row in rows] == [f"{name} 4 bits", f"{name} 2 bits"]
    assert 0 < rows[0]["kl"] < rows[1]["kl"]


def test_caches_are_found_by_their_names():
    assert kv_cache.settings_of("dense") is None
    assert kv_cache.settings_of("int4, half") == kv_cache.SETTINGS["int4, half"]
    assert type(kv_cache.settings_of("rvq")).__name__ == "ResidualVqSettings"
