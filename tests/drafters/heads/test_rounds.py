"""What the host grows without Python between two calls of a head are the trees that Python grows."""

import gc
from random import Random

import numpy as np
import pytest
import torch

from pyspec import generate
from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.heads.eagle3_batch import HeadBatch
from pyspec.drafters.heads.eagle3_room import HeadRoom
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.host import compiled
from pyspec.runners import replay
from pyspec.runners.tape import Tape
from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens, root_path

TAPS = (2, 3, 5)

pytestmark = pytest.mark.skipif(compiled() is None, reason="the host module is not compiled")


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


@pytest.fixture(scope="module", params=["speculators", "whole vocabulary", "flat, two layers"])
def folder(request, target, tmp_path_factory):
    kind, path = request.param, tmp_path_factory.mktemp("head")
    if kind == "speculators":
        tensors = random_head(VOCABULARY, target.hidden_size, fc_norm=True, norm_output=True)
        return write_head(path, tensors, VOCABULARY, taps=TAPS, fc_norm=True, norm_output=True)
    if kind == "whole vocabulary":
        tensors = random_head(VOCABULARY, target.hidden_size, draft=VOCABULARY)
        return write_head(path, tensors, VOCABULARY, taps=TAPS)
    tensors = random_head(VOCABULARY, target.hidden_size, layers=2, biases=True)
    return write_head(path, tensors, VOCABULARY, layout="flat", taps=TAPS)


@torch.inference_mode()
@pytest.mark.parametrize("width, depth", [(1, 1), (1, 6), (2, 3), (4, 5), (8, 4)])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_trees_are_those_of_python(target, folder, monkeypatch, width, depth, least):
    """Of several texts and rounds, over random acceptance; some sequences sit out, some have read much."""
    drafters = [Eagle3(folder, target, TopPaths(width, depth), tables=()) for _ in range(2)]
    texts, random = [random_tokens(length, length) for length in (150, 2, 9)], Random(width)
    readers = [[drafter.start(text) for text in texts] for drafter in drafters]

    def observe(slot, chain, verified):
        for each in readers:
            each[slot].observe(chain, verified, range(len(chain)))

    target.prefill(texts, taps=TAPS, capacity=600, observe=observe)
    contexts, sizes = [[*text, 1] for text in texts], set()
    for number in range(12):
        slots = sorted(random.sample(range(3), random.randint(1, 3)))
        budgets = [random.choice((2, 5, 9, 40)) for _ in slots]
        found = []
        for is_recorded, each in zip((True, False), readers, strict=True):
            asked = [each[slot] for slot in slots], [contexts[slot] for slot in slots], budgets
            for reader in asked[0]:
                reader.pace = _Fixed(least * len(slots))
            with monkeypatch.context() as patch:
                patch.setattr(*((HeadBatch, "guess", None) if is_recorded else (HeadRoom, "is_recorded", False)))
                found.append(Eagle3.propose_together(*asked))
        for tree, expected in zip(*found, strict=True):
            assert tree.tokens.tolist() == expected.tokens.tolist(), number
            assert tree.parents.tolist() == expected.parents.tolist()
            np.testing.assert_allclose(tree.chances, expected.chances, rtol=1e-5)
            sizes.add(len(tree))
        trees = dict(zip(slots, found[0], strict=True))
        verified, paths = target.verify(trees), {}
        for slot, tree in trees.items():
            paths[slot] = root_path(tree, random.randrange(len(tree)))
            for each in readers:
                each[slot].observe(tree, verified[slot], paths[slot])
            contexts[slot] += [*tree.tokens[paths[slot][1:]].tolist(), random.randrange(VOCABULARY)]
        target.commit(paths)
    assert max(sizes) > (1 if least else depth)


class _Fixed:
    """A pace that knows what a level is worth."""

    def __init__(self, least):
        self.least = least

    def took_level(self, seconds):
        assert seconds > 0


def test_a_second_text_records_nothing(target, folder, monkeypatch):
    drafter, recorded = Eagle3(folder, target, TopPaths(2, 3), tables=()), []
    record = HeadRoom._record
    monkeypatch.setattr(HeadRoom, "_record", lambda self, *call: (recorded.append(call), record(self, *call)))
    prompt = random_tokens(30)
    first = generate(target, prompt, drafter=drafter, budget=7, max_new_tokens=40)
    assert recorded and len(set(recorded)) == len(recorded)
    recorded.clear()
    second = generate(target, prompt, drafter=drafter, budget=7, max_new_tokens=40)
    assert not recorded and second.tokens == first.tokens


def test_a_head_that_is_not_recorded_gives_the_same_text(target, folder, monkeypatch):
    drafter, prompt = Eagle3(folder, target), random_tokens(20)
    expected = generate(target, prompt, drafter=None, max_new_tokens=40).tokens
    assert generate(target, prompt, drafter=drafter, budget=9, max_new_tokens=40).tokens == expected
    monkeypatch.setattr(HeadRoom, "is_recorded", False)
    assert generate(target, prompt, drafter=drafter, budget=9, max_new_tokens=40).tokens == expected


def test_a_room_outlives_a_batch_that_a_cycle_held(target, folder, monkeypatch):
    """Its recorded calls serve the next batch, so the collector must not end them with the drafter. (Those that the
    host holds it cannot see.)"""
    drafter, start, ends = Eagle3(folder, target, TopPaths(2, 3), tables=()), Eagle3.start, []

    class NotedTape(Tape):
        def __init__(self, *recorded):
            super().__init__(*recorded)
            ends.append(self._free)

    def start_in_a_cycle(self, prompt):
        started = start(self, prompt)
        started.itself = started
        return started

    def write() -> list[int]:
        return generate(target, random_tokens(30), drafter=drafter, budget=7, max_new_tokens=20).tokens

    monkeypatch.setattr(HeadRoom, "is_recorded", False)
    monkeypatch.setattr(Eagle3, "start", start_in_a_cycle)
    monkeypatch.setattr(replay, "Tape", NotedTape)
    tokens = write()
    gc.collect()
    assert drafter.head.rooms and all(end.alive for end in ends)
    assert write() == tokens
