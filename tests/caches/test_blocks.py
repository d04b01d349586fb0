"""QuantisedCache: what is quantised when, that it hangs on the committed tokens alone, and what is written."""

import pytest
import torch

from pyspec.caches import GearSettings
from pyspec.ops import gear_decode, residual_vq_decode
from pyspec.ops.gear import BLOCK
from pyspec.tree import DraftTree
from tests.helpers.quantised_caches import (
    FREQUENCIES,
    HEAD_DIM,
    HEADS,
    LAYERS,
    SETTINGS,
    feed,
    numbers_of,
    start,
    text_of,
    write,
)


def decoded(settings, quantised, layer):
    """Keys and values [heads, S, D] of a layer's records, and the relative error that they may have."""
    if isinstance(settings, GearSettings):
        k, v = gear_decode(quantised[layer, None], settings, HEAD_DIM)
        return k[0], v[0], {2: 0.5, 3: 0.25, 4: 0.15}[settings.bits]
    k, v = residual_vq_decode(quantised[layer, None], settings.codebooks.tables[layer], HEAD_DIM)
    if settings.codebooks.frequencies is not None:  # by position, pairs as complex numbers
        angles = torch.arange(k.shape[2])[:, None] * FREQUENCIES
        pairs = torch.complex(*k.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
        k = torch.cat((pairs.real, pairs.imag), -1)
    return k[0], v[0], 0.75


def state(cache, sequence):
    """All that a sequence's next tree can read."""
    length = cache.lengths[sequence]
    quantised = cache.quantised[:, sequence, :, : length // BLOCK]
    return quantised, cache.keys_values[:, :, sequence, :, : length - cache.starts[sequence]]


def chunks_of(total, most, seed):
    generator = torch.Generator().manual_seed(seed)
    chunks = []
    while sum(chunks) < total:
        chunks.append(min(int(torch.randint(1, most + 1, (1,), generator=generator)), total - sum(chunks)))
    return chunks


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("tokens", [1, 127, 128, 191, 192, 193, 450])
def test_the_chunks_of_a_text_change_no_bit(name, tokens):
    settings, text = SETTINGS[name], text_of(tokens)
    caches = []
    for chunks in (
        [1] * tokens,
        chunks_of(tokens, settings.largest_tree, 0),
        chunks_of(tokens, settings.largest_tree, 1),
        chunks_of(tokens, 3, 2),
    ):
        cache = start(settings)
        feed(cache, 1, text, chunks)
        caches.append(state(cache, 1))
        assert (
            cache.lengths == [0, tokens]
            and cache.quantised[:, 0].eq(255).all()
            and cache.keys_values[:, :, 0].isnan().all()
        )
    for other in caches[1:]:
        for part, expected in zip(other, caches[0], strict=True):
            assert torch.equal(part, expected)
    quantised, exact = caches[0]
    assert torch.equal(exact, text[..., tokens - exact.shape[3] :, :])
    assert exact.shape[3] >= min(tokens, settings.window)
    for layer in range(LAYERS):
        if quantised.shape[2]:
            *sides, most = decoded(settings, quantised, layer)  # each layer by its own codebooks
            for found, x in zip(sides, text[layer], strict=True):
                x = x[:, : found.shape[1]]
                assert float((found - x).norm() / x.norm()) < most


@pytest.mark.parametrize("name", SETTINGS)
def test_a_rejected_tree_leaves_no_trace(name):
    """Any prefix of a tree may be kept: what follows is as if the rest had never been there."""
    settings, text = SETTINGS[name], text_of(300)
    for length in (122, 128, 250, 260):
        for kept in range(1, 6):
            touched, clean = start(settings), start(settings)
            for cache in (touched, clean):
                feed(cache, 0, text, chunks_of(length, settings.largest_tree, 3))
            before = [part.clone() for part in state(touched, 0)]
            nodes = torch.full((LAYERS, 2, HEADS, 6, HEAD_DIM), 55.0)
            nodes[..., :kept, :] = text[..., length : length + kept, :]
            write(touched, 0, nodes)
            for part, expected in zip(state(touched, 0), before, strict=True):
                assert torch.equal(part, expected)
            touched.commit(0, range(kept))
            for token in range(length, length + kept):
                write(clean, 0, text[..., token : token + 1, :])
                clean.commit(0, [0])
            for part, expected in zip(state(touched, 0), state(clean, 0), strict=True):
                assert torch.equal(part, expected)


def test_sequences_do_not_touch_each_other():
    settings = SETTINGS["gear"]
    both, alone = start(settings), start(settings)
    feed(both, 0, text_of(140, 1), chunks_of(140, 60, 1))
    feed(both, 1, text_of(333, 2), chunks_of(333, 60, 2))
    feed(alone, 1, text_of(333, 2), chunks_of(333, 9, 3))
    for part, expected in zip(state(both, 1), state(alone, 1), strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_nothing_outside_the_buffers_is_written(name):
    """The buffers of a cache between guard bytes."""
    settings = SETTINGS[name]
    cache, guards = start(settings), []
    for attribute in ("quantised", "keys_values"):
        buffer = getattr(cache, attribute)
        wide = torch.full((buffer.nbytes + 512,), 171, dtype=torch.uint8)
        inside = wide[256 : 256 + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
        inside.copy_(buffer)
        setattr(cache, attribute, inside)
        guards.append(wide)
    for sequence in range(2):
        feed(cache, sequence, text_of(850, sequence), chunks_of(850, settings.largest_tree, sequence))
        numbers = numbers_of(cache, sequence, DraftTree.chain([0] * 3))
        write(cache, sequence, text_of(3))
        assert cache.attend(1, torch.randn(3, 6, HEAD_DIM), numbers, None).isfinite().all()
    for wide in guards:
        assert (wide[:256] == 171).all() and (wide[-256:] == 171).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e6])
@pytest.mark.parametrize("side, what", [(0, "keys"), (1, "values")])
@pytest.mark.parametrize("name", ["gear", "codes", "pre-rope codes"])
def test_what_cannot_be_quantised_is_refused_and_named(name, value, side, what):
    cache, text = start(SETTINGS[name]), text_of(256)
    feed(cache, 1, text, [64] * 3)
    before = [part.clone() for part in state(cache, 1)]
    bad = text[..., 192:256, :].clone()
    bad[1, side, 2, 8, 33] = value
    write(cache, 1, bad)
    with pytest.raises(ValueError, match=rf"{what} must be .* layer 1, head 2, position 200, channel 33 of sequence 1"):
        cache.commit(1, range(64))
    assert cache.lengths == [0, 192]
    for part, expected in zip(state(cache, 1), before, strict=True):
        assert torch.equal(part, expected)
    write(cache, 1, text[..., 192:256, :])
    cache.commit(1, range(64))
    assert cache.lengths == [0, 256]
