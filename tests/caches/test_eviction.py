"""GearSettings(keep=...): which tokens stay, that committed tokens alone decide it, and what a row sees."""

import pytest
import torch

from pyspec.caches import GearSettings
from pyspec.ops import gear_decode, tree_attention
from pyspec.ops.gear import BLOCK
from pyspec.tree import DraftTree
from tests.helpers.quantised_caches import numbers_of

LAYERS, HEADS, HEAD_DIM = 3, 2, 64
HALF = GearSettings(8, 64, keep=0.5, whole_layers=1)
SETTINGS = {
    "half": HALF,
    "eighth": GearSettings(8, 64, keep=0.125, whole_layers=0, window=20),
    "gear": GearSettings(2, 64, rank=2, outliers=2, keep=0.25, fitted=True),
}


def text_of(tokens, seed=0):
    """Keys and values [layers, 2, heads, tokens, D]; keys of all lengths."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(LAYERS, 2, HEADS, tokens, HEAD_DIM, generator=generator)
    text[:, 0] *= torch.rand(LAYERS, HEADS, tokens, 1, generator=generator) + 0.5
    return text


def filled(settings, text, chunks, sequences=1):
    """A cache that a text was committed to in chunks, with a wrong node behind each."""
    tokens = text.shape[3]
    cache = settings.start(LAYERS, sequences, HEADS, tokens + 80, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.keys_values.fill_(torch.nan)
    done = 0
    while done < tokens:
        count = min(next(chunks), tokens - done)
        slot = done - cache.starts[0]
        cache.keys_values[:, :, 0, :, slot : slot + count] = text[..., done : done + count, :]
        cache.keys_values[:, :, 0, :, slot + count] = 55.0
        cache.commit(0, range(count))
        done += count
    return cache


def endless(*chunks):
    while True:
        yield from chunks


def state(cache):
    length = cache.lengths[0]
    exact = cache.keys_values[:, :, 0, :, : length - cache.starts[0]]
    blocks = length // cache.span
    return cache.quantised[:, 0, :, :blocks], cache.whole[:, 0, :, : blocks * cache.span // BLOCK], exact


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [100, 255, 256, 320, 1100])
def test_the_chunks_of_a_text_change_no_bit(name, tokens):
    settings, text = SETTINGS[name], text_of(tokens)
    most = settings.window
    expected = state(filled(settings, text, endless(1)))
    for chunks in (endless(most), endless(3, 11, 1)):
        for part, right in zip(state(filled(settings, text, chunks)), expected, strict=True):
            assert torch.equal(part, right)
    assert torch.equal(expected[2], text[..., tokens - expected[2].shape[3] :, :])
    assert expected[2].shape[3] >= min(tokens, settings.window)


def test_the_shortest_keys_of_a_head_stay_with_their_values():
    text = text_of(600)
    quantised, whole, _ = state(filled(HALF, text, endless(60)))
    assert quantised.shape[2] == 2 and whole.shape[2] == 4 and len(whole) == 1
    for block in range(2):
        span = text[..., block * 256 : (block + 1) * 256, :]
        for layer in (1, 2):
            decoded = gear_decode(quantised[layer - 1, None, :, block : block + 1], HALF, HEAD_DIM)
            for head in range(HEADS):
                kept = span[layer, 0, head].norm(dim=-1).topk(128, largest=False).indices.sort().values
                for found, x in zip(decoded, span[layer], strict=True):
                    torch.testing.assert_close(found[0, head], x[head, kept], atol=0.03, rtol=0)
    k, _ = gear_decode(whole[0, None], HALF, HEAD_DIM)
    torch.testing.assert_close(k[0], text[0, 0, :, :512], atol=0.03, rtol=0)


def test_rows_see_what_is_kept_and_then_everything():
    """A chain across the place where a block turns: its first nodes see it whole, the others what is left of it."""
    text, nodes = text_of(340), 25
    cache = filled(HALF, text[..., :310, :], endless(64))
    tree = DraftTree.chain([0] * nodes)
    cache.keys_values[:, :, 0, :, 310 : 310 + nodes] = text[..., 310 : 310 + nodes, :]
    q = torch.randn(nodes, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    span = text[..., :256, :]
    for layer in range(LAYERS):
        found = cache.attend(layer, q, numbers_of(cache, 0, tree), None)
        for node in range(nodes):
            k, v = text[layer, :, :, : 311 + node]
            if 310 + node >= 256 + HALF.window and layer >= HALF.whole_layers:
                kept = span[layer, 0].norm(dim=-1).topk(128, -1, largest=False).indices.sort(-1).values
                at = torch.cat((kept, torch.arange(256, 311 + node).expand(HEADS, -1)), 1)[..., None]
                k, v = (x.gather(1, at.expand(-1, -1, HEAD_DIM)) for x in (k, v))
            lens = torch.tensor([k.shape[1] - 1], dtype=torch.int32)
            bits = torch.ones(1, 1, 1, dtype=torch.int32)
            expected = tree_attention(q[None, node, :, None], k[None], v[None], bits, lens)[0, :, 0]
            torch.testing.assert_close(found[node], expected, atol=0.02, rtol=0)


def test_a_share_of_the_memory():
    """Records are fewer, not emptier."""

    def held(settings):
        return settings.start(2, 1, 1, 8192, HEAD_DIM, torch.bfloat16, torch.device("cpu")).quantised.nbytes

    whole = GearSettings(4, 64)
    for keep in (0.5, 0.25, 0.125):
        evicted = GearSettings(4, 64, keep=keep, whole_layers=0)
        assert held(evicted) == keep * held(whole)
        assert evicted.effective_bits(64, 65536) < keep * whole.effective_bits(64, 65536) + 0.25
    assert held(GearSettings(4, 64, keep=0.5, whole_layers=9)) == 0


def test_what_cannot_be_quantised_is_named_by_its_position():
    text = text_of(600)
    text[2, 1, 1, 300, 7] = torch.inf
    with pytest.raises(ValueError, match="values must be .* inf in layer 2, head 1, position 300, channel 7"):
        filled(HALF, text, endless(60))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"keep": 0.3}, r"keep must be one of \(1.0, 0.5, 0.25, 0.125\), got 0.3"),
        ({"keep": 0}, "keep must be one of"),
        ({"whole_layers": -1}, "whole_layers must be an integer of at least 0, got -1"),
        ({"whole_layers": 1.5}, "whole_layers must be an integer"),
    ],
)
def test_settings_that_do_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        GearSettings(**fields)
