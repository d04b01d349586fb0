"""GearSettings(key_channels=...): which channels of the keys stay, and that committed tokens alone decide it."""

import pytest
import torch

from pyspec.caches import GearSettings, load_quantised, save_quantised
from pyspec.caches.blocks import RECENT
from pyspec.ops import gear_decode
from pyspec.ops.gear import BLOCK
from pyspec.tree import DraftTree
from tests.helpers.quantised_caches import numbers_of

LAYERS, HEADS, GROUP, HEAD_DIM = 2, 2, 3, 64
SETTINGS = {
    "half": GearSettings(8, 64, key_channels=32),
    "gear": GearSettings(2, 64, rank=2, outliers=2, fitted=True, key_channels=48),
    "evicting": GearSettings(4, 64, key_channels=48, keep=0.5, whole_layers=1),
}


def text_of(tokens):
    """Keys, values [layers, 2, heads, tokens, D] and queries [layers, tokens, heads * group, D], of unlike channels."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(LAYERS, 2, HEADS, tokens, HEAD_DIM, generator=generator)
    queries = torch.randn(LAYERS, tokens, HEADS * GROUP, HEAD_DIM, generator=generator)
    queries *= torch.rand(LAYERS, tokens, 1, HEAD_DIM, generator=generator).exp()
    return text * torch.rand(HEADS, 1, HEAD_DIM, generator=generator).exp(), queries


def filled(settings, text, queries, chunks):
    """A cache that a text was committed to in chunks, each verified with a wrong node behind every right one."""
    tokens = text.shape[3]
    cache = settings.start(LAYERS, 1, HEADS, tokens + 80, HEAD_DIM, torch.float32, torch.device("cpu"))
    done = 0
    while done < tokens:
        count = min(next(chunks), tokens - done)
        nodes = torch.full((LAYERS, 2, HEADS, 2 * count, HEAD_DIM), 9.0)
        nodes[..., ::2, :] = text[..., done : done + count, :]
        asked = torch.full((LAYERS, 2 * count, HEADS * GROUP, HEAD_DIM), 99.0)
        asked[:, ::2] = queries[:, done : done + count]
        slot = done - cache.starts[0]
        cache.keys_values[:, :, 0, :, slot : slot + 2 * count] = nodes
        tree = DraftTree.chain([0] * (2 * count))
        numbers = numbers_of(cache, 0, tree)
        for layer in range(LAYERS):
            cache.attend(layer, asked[layer], numbers, None)
        cache.commit(0, range(0, 2 * count, 2))
        done += count
    return cache


def endless(*chunks):
    while True:
        yield from chunks


def state(cache):
    blocks = cache.lengths[0] // cache.span
    whole = cache.whole[:, 0, :, : blocks * cache.settings.records]
    return cache.quantised[:, 0, :, :blocks], whole, cache.queries[:, 0, :, : min(RECENT, cache.lengths[0])]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [128, 300, 520])
def test_the_chunks_of_a_text_change_no_bit(name, tokens):
    text, queries = text_of(tokens)
    expected = state(filled(SETTINGS[name], text, queries, endless(1)))
    for chunks in (endless(32), endless(3, 11, 1)):
        found = state(filled(SETTINGS[name], text, queries, chunks))
        for part, right in zip(found, expected, strict=True):
            assert torch.equal(part, right)


def test_the_channels_that_recent_queries_ask_for_stay():
    text, queries = text_of(300)
    settings = SETTINGS["half"]
    quantised, _, _ = state(filled(settings, text, queries, endless(20)))
    for layer in range(LAYERS):
        keys, values = gear_decode(quantised[layer, None], settings, HEAD_DIM)
        for head in range(HEADS):
            for block in range(2):
                tokens = slice(block * BLOCK, (block + 1) * BLOCK)
                asked = queries[layer, tokens, head * GROUP : (head + 1) * GROUP][-RECENT:]
                k = text[layer, 0, head, tokens]
                kept = (asked.square().mean((0, 1)) * k.square().mean(0)).topk(32).indices
                expected = torch.zeros_like(k)
                expected[:, kept] = k[:, kept]
                torch.testing.assert_close(keys[0, head, tokens], expected, atol=0.05, rtol=0)
    torch.testing.assert_close(values[0], text[1, 1, :, :256], atol=0.05, rtol=0)


def test_records_are_smaller():
    whole, half = GearSettings(4, 64), GearSettings(4, 64, key_channels=32)
    assert half.record_bytes(64) <= 0.78 * whole.record_bytes(64)
    assert half.effective_bits(64, 65536) < 0.8 * whole.effective_bits(64, 65536)
    cache = half.start(1, 1, 1, 1000, 64, torch.bfloat16, torch.device("cpu"))
    assert whole.start(1, 1, 1, 1000, 64, torch.bfloat16, torch.device("cpu")).queries.nbytes == 0
    cache.lengths = [1000]
    held = cache.quantised.nbytes + 4 * RECENT * 64 + 2 * 2 * 64 * (1000 - cache.starts[0])
    assert half.effective_bits(64, 1000) == pytest.approx(8 * held / (2 * 64 * 1000), rel=1e-3)


def test_recent_queries_are_saved_too(tmp_path):
    text, queries = text_of(300)
    settings = SETTINGS["gear"]
    cache = filled(settings, text[..., :250, :], queries[:, :250], endless(30))
    save_quantised(cache, tmp_path / "cache", "model")
    found = load_quantised(tmp_path / "cache", "model", capacity=400, device="cpu")
    for part, right in zip(state(found), state(cache), strict=True):
        assert torch.equal(part, right)
