"""Quantised caches of every kind, and texts that are fed to them as a runner does."""

import torch

from pyspec.caches import Codebooks, GearSettings, ResidualVqSettings, cache_from_name
from pyspec.runners.numbers import Numbers
from tests.helpers.random_llama import random_llama

LAYERS, HEADS, HEAD_DIM = 2, 3, 64
FREQUENCIES = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def codebooks(depth=4, codes=256, layers=LAYERS, heads=HEADS, name="toy", frequencies=None):
    words = torch.randn(layers, 2, depth, codes, 32, generator=torch.Generator().manual_seed(depth))
    words *= 0.8 * 0.8 ** torch.arange(depth)[:, None, None]
    return Codebooks(words.half(), heads, HEAD_DIM, name, frequencies)


SETTINGS = {
    "gear": GearSettings(2, 64, rank=2, outliers=2),
    "int4": cache_from_name("int4"),
    "narrow": GearSettings(3, 32, window=5),
    "codes": ResidualVqSettings(codebooks()),
    "pre-rope codes": ResidualVqSettings(codebooks(frequencies=FREQUENCIES)),
}


def random_codes(pre_rope: bool, **options) -> ResidualVqSettings:
    """Of the keys of random_llama(**options), as they are cached or as they were before rotary embedding."""
    runner = random_llama(**options)
    frequencies = runner.config.rope_frequencies() if pre_rope else None
    return ResidualVqSettings(codebooks(8, heads=2, name=runner.fingerprint, frequencies=frequencies))


def text_of(tokens, seed=0):
    """Keys and values [layers, 2, heads, tokens, D] of a text."""
    return torch.randn(LAYERS, 2, HEADS, tokens, HEAD_DIM, generator=torch.Generator().manual_seed(seed))


def start(settings, capacity=900, sequences=2):
    cache = settings.start(LAYERS, sequences, HEADS, capacity, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.keys_values.fill_(torch.nan)  # what is read must have been written
    cache.quantised.fill_(255)
    return cache


def write(cache, sequence, parts):
    """Puts the keys and values of a tree's nodes behind the committed ones, as a runner does."""
    slot = cache.lengths[sequence] - cache.starts[sequence]
    cache.keys_values[:, :, sequence, :, slot : slot + parts.shape[3]] = parts


def numbers_of(cache, sequence, tree):
    """What a round of one tree behind a sequence tells `attend`."""
    count = len(cache.lengths)
    numbers = Numbers(range(count), len(tree), (len(tree) + 31) // 32, 0, cache.device)
    numbers.fill({sequence: tree}, cache.lengths, cache.starts, blocks=cache.blocks)
    cache.plan({sequence: tree}, ())
    return numbers


def feed(cache, sequence, text, chunks):
    """Commits a text in chunks, each written as a tree with wrong nodes between the right ones."""
    done = 0
    for count in chunks:
        right = text[..., done : done + count, :]
        if 2 * count <= cache.settings.largest_tree:
            nodes = torch.full((LAYERS, 2, HEADS, 2 * count, HEAD_DIM), 77.0)
            nodes[..., ::2, :] = right
            write(cache, sequence, nodes)
            cache.commit(sequence, list(range(0, 2 * count, 2)))
        else:
            write(cache, sequence, right)
            cache.commit(sequence, range(count))
        done += count
    assert cache.lengths[sequence] == done
