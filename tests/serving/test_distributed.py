"""Distributed speculative inference: exact with any delays, and as fast as its paper says by its own formula."""

import math
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from pyspec import generate
from pyspec.serving.distributed import DistributedText, Worker
from tests.helpers.simulated_time import SimulatedTime
from tests.helpers.talking_llama import END, talking_llama

# Timor et al., arXiv 2405.14105, table 2: milliseconds of target and drafter, acceptance rate, reported DSI over SI
PAPER = [
    (37.7, 2.5, 0.63, 1.47), (33.3, 2.5, 0.58, 1.41), (29.4, 2.5, 0.67, 1.29), (26.0, 2.5, 0.59, 1.70),
    (20.6, 6.8, 0.93, 1.92), (21.0, 6.8, 0.90, 1.66), (52.1, 34.0, 0.95, 1.41), (52.2, 34.3, 0.94, 1.37),
    (52.4, 34.6, 0.93, 1.39), (49.6, 33.4, 0.87, 1.60),
]  # fmt: skip


def scripted(seed, *, acceptance, target_seconds, draft_seconds, targets, lookahead, tokens, preempted=True):
    """Writes a text of scripted tokens, drafts of it right by chance; returns the seconds, and checks the text."""
    generator, time = random.Random(seed), SimulatedTime()
    truth = [generator.randrange(1000) for _ in range(tokens + 200)]
    is_right = [generator.random() < acceptance for _ in truth]

    def start(seconds, result):
        future = time.work(seconds() if callable(seconds) else seconds, result)
        if not preempted:
            future.set_running_or_notify_cancel()  # nobody can call it off
        return future

    def draft(context, count, certain):
        assert context[:certain] == truth[:certain]
        places = range(len(context), len(context) + count)
        seconds = (lambda: draft_seconds() * count) if callable(draft_seconds) else draft_seconds * count
        return start(seconds, [truth[place] if is_right[place] else -1 for place in places])

    def verify(context, count, certain):
        assert context[:certain] == truth[:certain] and 0 < count <= lookahead
        known = next((place for place, token in enumerate(context) if token != truth[place]), len(context))
        said = [truth[place] if place <= known else -2 for place in range(len(context) - count + 1, len(context) + 1)]
        return start(target_seconds, said)  # nonsense after a wrong draft

    text = DistributedText(draft, [verify] * targets, lookahead=lookahead, wait=time.wait)
    assert text.generate(truth[:3], tokens) == truth[3 : 3 + tokens]
    return time.now


def test_the_text_is_the_targets_with_any_delays():
    generator = random.Random(0)
    for seed in range(300):
        scripted(
            seed,
            acceptance=generator.choice([0, 0.3, 0.8, 1]),
            target_seconds=lambda: generator.choice([0, 1, generator.random() * 5]),
            draft_seconds=lambda: generator.choice([0, 0.1, generator.random() * 3]),
            targets=generator.randrange(1, 6),
            lookahead=generator.randrange(1, 8),
            tokens=generator.randrange(1, 60),
            preempted=generator.random() < 0.5,
        )


def formula(target, drafter, acceptance, tokens):
    """The paper's bound of the expected time: proposition 1 with the first token by the target."""
    return drafter * acceptance * (tokens - 1) + target * ((1 - acceptance) * (tokens - 1) + 1)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("target, drafter, acceptance, reported", PAPER)
def test_the_time_is_that_of_the_papers_formula(target, drafter, acceptance, reported):
    sizes = {"target_seconds": target, "draft_seconds": drafter, "acceptance": acceptance, "tokens": 50}
    targets = math.ceil(target / drafter) + 1
    found = mean(scripted(seed, targets=targets, lookahead=1, **sizes) for seed in range(60))
    assert found == pytest.approx(formula(target, drafter, acceptance, 50), rel=0.05)


def test_it_is_never_slower_than_the_target_alone():
    for acceptance in (0.0, 0.5):
        for targets in (1, 2, 4):
            sizes = {"target_seconds": 10.0, "draft_seconds": 1.0, "acceptance": acceptance, "tokens": 50}
            assert scripted(1, targets=targets, lookahead=3, **sizes) <= 10.0 * 50 * 1.0001


def test_what_a_worker_raises_is_raised():
    time = SimulatedTime()

    def fail(context, count, certain):
        future = time.work(0, None)
        future.set_exception(ValueError("the worker failed"))
        return future

    with pytest.raises(ValueError, match="the worker failed"):
        DistributedText(fail, [fail], wait=lambda futures: list(futures)[:1]).generate([1], 3)
    for wrong in ({"targets": []}, {"targets": [fail], "lookahead": 0}):
        with pytest.raises(ValueError, match="at least 1|one or more"):
            DistributedText(fail, **wrong)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}])
def test_workers_write_what_generate_writes(sampling):
    prompt = talking_llama().tokenizer.encode("Why is the sky")
    expected = generate(talking_llama(), prompt, drafter=None, max_new_tokens=40, **sampling).tokens
    worker = [Worker(talking_llama(), 200, **sampling) for _ in range(3)]
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second, ThreadPoolExecutor(1) as third:

        def draft(context, count, certain):  # every third draft is wrong
            def work():
                drafted = worker[2].draft(context, count, certain)
                places = range(len(context), len(context) + count)
                return [token if place % 3 else (token + 1) % END for place, token in zip(places, drafted, strict=True)]

            return third.submit(work)

        targets = [
            lambda *asked: first.submit(worker[0].verify, *asked),
            lambda *asked: second.submit(worker[1].verify, *asked),
        ]
        found = DistributedText(draft, targets, lookahead=3).generate(prompt, 40, ends=[END])
    assert found == expected
