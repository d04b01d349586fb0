"""Kept beginnings of texts: the same bits as without, for every kind of cache; bounded memory, the oldest go first."""

import random

import pytest
import torch

from pyspec import GearSettings, generate
from pyspec.caches.prefixes import Prefixes
from tests.helpers.quantised_caches import random_codes
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, root_path
from tests.helpers.random_models import random_model

PLENTY = 2**30
CACHES = {
    "llama": None,
    "gemma3": None,
    "mixture": None,
    "mamba": None,
    "mamba2": None,
    "bamba": None,
    "lfm2": None,
    "gear": GearSettings(2, 64, rank=2, outliers=2),
    "long window": GearSettings(4, 64, window=200),
    "some tokens": GearSettings(4, 64, keep=0.5, whole_layers=1),
    "some channels": GearSettings(4, 64, key_channels=48),
    "rvq": random_codes(pre_rope=False),
    "rvq pre-rope": random_codes(pre_rope=True),
}


def runner_of(name):
    return random_model(name) if CACHES[name] is None else random_llama(dtype=torch.float32)


def after(runner, prompts, settings):
    """All that the model says after prompts, after a tree below them, and after one of its paths."""
    said = runner.prefill(prompts, capacity=1200, **settings)
    tree = random_tree(20)
    slots = range(len(prompts))
    said += [each.logits for each in runner.verify(dict.fromkeys(slots, tree)).values()]
    runner.commit(dict.fromkeys(slots, root_path(tree, 19)))
    return said + [each.logits for each in runner.verify(dict.fromkeys(slots, tree)).values()]


@pytest.mark.parametrize("name", CACHES)
def test_bits_are_those_of_reading_all(name):
    runner, settings = runner_of(name), {} if CACHES[name] is None else {"cache": CACHES[name]}
    text, rest = random_tokens(700), random_tokens(90, seed=1)
    # one goes on behind what was kept, one parts from it on the way, one knows none of it, one is all of it
    prompts = [[*text, *rest], [*text[:530], *rest], [*rest, *text[:200]], text]
    expected = after(runner.fork(), prompts, settings)
    runner.keep_prefixes(PLENTY)
    runner.prefill([text], **settings)
    assert runner.prefixes.spared == 0
    found = after(runner, prompts, settings)
    size = runner.cache.block
    assert runner.prefixes.spared == sum(count // size * size for count in (700, 530, 0, 699))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", ("llama", "gear", "bamba"))
def test_the_next_turn_of_a_chat_begins_with_the_last(name):
    runner, cache = runner_of(name), CACHES[name] or "dense"
    settings = {"temperature": 0.7, "seed": 3, "max_new_tokens": 150, "cache": cache}
    prompt = random_tokens(300)
    first = generate(runner, prompt, prefix_memory=PLENTY, **settings)
    turn = [*prompt, *first.tokens, *random_tokens(20, seed=2)]
    second = generate(runner, turn, prefix_memory=PLENTY, **settings)
    assert second.stats.prefix_tokens == {"llama": 448, "gear": 384, "bamba": 256}[name]
    assert second.tokens == generate(runner.fork(), turn, **settings).tokens
    assert generate(runner, turn, **settings).stats.prefix_tokens == 0 == runner.prefixes.nbytes


def test_prompts_of_one_call_share_and_are_spared():
    runner = random_llama()
    runner.keep_prefixes(PLENTY)
    text = random_tokens(200)
    prompts = [[*text, 1, 2], [*text, 3], text[:100]]
    expected = after(runner.fork(), prompts, {})
    for _ in range(2):
        found = after(runner, prompts, {})
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert runner.prefixes.spared == 192 + 192 + 64


def test_who_reads_layers_sees_the_whole_prompt():
    runner, seen = random_llama(), []
    runner.keep_prefixes(PLENTY)
    prompt = random_tokens(200)
    for _ in range(2):
        runner.prefill([prompt], taps=(0, 1), observe=lambda slot, chain, verified: seen.append(len(chain)))
    assert sum(seen) == 400 and runner.prefixes.spared == 0


class Shelf:
    """A cache of one slot whose blocks are the tokens themselves, all before them included."""

    block, angles = 4, None

    def __init__(self):
        self.lengths, self.text = [0], []

    def read(self, text):
        self.lengths[0], self.text = len(text), list(text)

    def block_of(self, slot, start):
        return [torch.tensor(self.text[: start + self.block], dtype=torch.uint8)]

    def begin_with(self, slot, blocks):
        assert [part.numel() for (part,) in blocks] == [4 * (1 + number) for number in range(len(blocks))]
        self.read(blocks[-1][0].tolist())


def test_memory_is_bounded_and_what_is_found_is_true():
    walk, cache = random.Random(0), Shelf()
    prefixes = Prefixes(150)
    texts = [[walk.randrange(2) for _ in range(walk.randrange(1, 33))] for _ in range(12)]
    hits = 0
    for _ in range(3000):
        text = walk.choice(texts)
        cache.read([])
        count = prefixes.begin(cache, 0, text)
        assert cache.text == text[:count] and count % 4 == 0 and count < len(text)
        hits += count > 0
        cache.read(text)
        prefixes.keep(cache, 0, text)
        blocks = prefixes._blocks.values()
        assert prefixes.nbytes == sum(block.nbytes for block in blocks) <= 150
        numbers = {block.number for block in blocks}
        assert all(before in numbers for before, _ in prefixes._blocks if isinstance(before, int))
    assert 500 < hits < 2500


def known(prefixes, cache, text):
    """Tokens of a text that are known; it counts as used."""
    cache.read([])
    return prefixes.begin(cache, 0, text)


def test_the_least_recently_used_goes_first():
    cache, prefixes = Shelf(), Prefixes(12)
    texts = [[number] * 5 for number in range(4)]
    for number in (0, 1, 2, 0, 3):  # room for three
        known(prefixes, cache, texts[number])
        cache.read(texts[number])
        prefixes.keep(cache, 0, texts[number])
    assert [known(prefixes, cache, text) for text in texts] == [4, 0, 4, 4]


def test_a_text_too_long_for_the_memory_keeps_its_beginning():
    cache, prefixes = Shelf(), Prefixes(15)
    text = list(range(40))
    for _ in range(2):
        known(prefixes, cache, text)
        cache.read(text)
        prefixes.keep(cache, 0, text)
    assert known(prefixes, cache, text) == 8 and prefixes.nbytes == 12


@pytest.mark.parametrize("memory, error", [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_memory_is_a_number_of_bytes(memory, error):
    with pytest.raises(error, match="prefix_memory must be a number of bytes"):
        generate(random_llama(), [1], prefix_memory=memory)
