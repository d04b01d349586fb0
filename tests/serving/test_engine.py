"""The engine: every text is the very text it would be alone, whatever comes, goes, fails or is cancelled beside it."""

import random
import threading

import pytest

from pyspec import DraftTree, GearSettings, Generation, generate
from pyspec.drafters.layer_skip import LayerSkipDrafter
from pyspec.drafters.model import ModelDrafter
from pyspec.serving.engine import Engine, QueueFull
from tests.helpers.fake_runner import FakeTokenizer
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.random_models import random_model

SOON = 120  # seconds, on a machine that is busy
KINDS = {
    "llama": {},
    "quantised": {"cache": GearSettings(2, 64, rank=2, outliers=2)},
    "bamba": {},
    "mamba2": {},
}


def runner_of(kind):
    runner = random_llama() if kind in ("llama", "quantised") else random_model(kind)
    runner.tokenizer = FakeTokenizer()  # of more tokens than these models have
    runner.eos_tokens = frozenset({5})
    return runner


def requests_of(walk, count):
    """Prompts, some of which begin alike, and how they are to be continued."""
    beginnings = [random_tokens(length, seed=length) for length in (1, 70, 200, 300)]
    for seed in range(count):
        prompt = [*walk.choice(beginnings), *random_tokens(walk.randrange(60), seed=walk.randrange(5))]
        settings = {"max_new_tokens": walk.randrange(1, 60), "temperature": walk.choice((0.0, 0.8)), "seed": seed}
        settings |= {"top_p": walk.choice((1.0, 0.9)), "logprobs": walk.choice((None, 2))}
        settings |= {"stop": walk.choice(((), "a", ("bc", "Q"))), "min_p": walk.choice((None, 0.05))}
        yield prompt, settings


def check(found: Generation, alone: Generation):
    """A text to its end, or its beginning where it was cancelled."""
    if found.finish_reason == "cancelled":
        assert found.tokens == alone.tokens[: len(found.tokens)] and alone.text.startswith(found.text)
    else:
        assert (found.tokens, found.text, found.logprobs) == (alone.tokens, alone.text, alone.logprobs)
        assert (found.finish_reason, found.error) == (alone.finish_reason, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix_memory", (0, 300_000))
def test_each_text_is_the_one_it_would_be_alone(kind, prefix_memory):
    walk, runner = random.Random(prefix_memory), runner_of(kind)
    asked = list(requests_of(walk, 24))
    alone = [generate(runner, prompt, budget=6, **KINDS[kind], **settings) for prompt, settings in asked]
    with Engine(runner, slots=3, budget=6, prefix_memory=prefix_memory, capacity=500, **KINDS[kind]) as engine:
        answers = []
        for prompt, settings in asked:
            answers.append(engine.submit(prompt, **settings))
            if walk.random() < 0.4:
                next(iter(walk.choice(answers)), None)
            if walk.random() < 0.2:
                walk.choice(answers).cancel()
        results = [answer.result(SOON) for answer in answers]
        for found, expected in zip(results, alone, strict=True):
            check(found, expected)
        state = engine.state()
    assert (state["running"], state["queued"], state["free"]) == (0, 0, 3)
    assert sum(state[f"finished_{reason}"] for reason in ("eos", "stop", "length", "cancelled")) == 24
    assert state["prefix_bytes"] <= prefix_memory and (state["prefix_hits"] > 0) == (prefix_memory > 0)
    assert state["new_tokens"] == sum(len(found.tokens) for found in results)


def test_pieces_make_up_the_answer():
    runner = runner_of("llama")
    with Engine(runner) as engine:
        answer, given = engine.submit(random_tokens(30), logprobs=1, seed=1, temperature=1.0, stop="~"), []
        called = engine.submit(random_tokens(30), logprobs=1, seed=1, temperature=1.0, stop="~", on_piece=given.append)
        pieces, result = list(answer), answer.result(SOON)
        assert "".join(piece.text for piece in pieces) == result.text
        assert [token for piece in pieces for token in piece.tokens] == result.tokens
        assert [each for piece in pieces for each in piece.logprobs] == result.logprobs
        assert called.result(SOON).tokens == result.tokens and list(called) == list(answer) == []
        assert [token for piece in given[:-1] for token in piece.tokens] == result.tokens and given[-1] is None


class Failing:
    """A drafter that raises at some of its calls in one text, the one that begins so."""

    proposal = "deterministic"

    def __init__(self, when):
        self.when, self.bad = when, False

    def start(self, prompt):
        drafter = Failing(self.when)
        drafter.bad = prompt[:3] == [7, 7, 7]
        return drafter._at("start")

    def _at(self, call):
        if self.bad and call == self.when:
            raise LookupError(f"cannot {call}")
        return self

    def propose(self, context, budget):
        self._at("propose")
        return DraftTree.chain([context[-1], *context[: budget - 1]])

    def observe(self, tree, verified, path):
        self._at("observe")


@pytest.mark.parametrize("when", ("start", "propose", "observe", "on_piece", "verify", "commit", "read"))
def test_a_failing_request_fails_alone(when, monkeypatch):
    runner = runner_of("llama")
    prompts = [[7, 7, 7, *random_tokens(38)], *(random_tokens(20 + 9 * number, seed=number) for number in range(3))]
    alone = [generate(runner, prompt, drafter=None, max_new_tokens=20) for prompt in prompts]

    def fails(*_):
        raise LookupError(f"cannot {when}")

    if when in ("verify", "commit", "read"):  # of a call for several texts, of which one is to blame
        call = getattr(runner, when)

        def calls(given, *more):
            if any(prompts[0] == text.context[:41] for text in _texts(engine, given)):
                fails()
            return call(given, *more)

        monkeypatch.setattr(runner, when, calls)
    with Engine(runner, slots=4, drafter=Failing(when), budget=4) as engine:
        answers = [
            engine.submit(prompt, max_new_tokens=20, on_piece=fails if (when, number) == ("on_piece", 0) else None)
            for number, prompt in enumerate(prompts)
        ]
        failed, *others = [answer.result(SOON) for answer in answers]
        assert (failed.finish_reason, failed.error) == ("error", f"LookupError: cannot {when}")
        for found, expected in zip(others, alone[1:], strict=True):
            check(found, expected)
        assert engine.submit(prompts[1], max_new_tokens=20).result(SOON).tokens == alone[1].tokens
        assert engine.state()["free"] == 4


def _texts(engine, slots):
    return [engine._slots.texts[slot] for slot in slots]


def test_a_draft_model_reads_each_text_once(monkeypatch):
    runner, draft, read = runner_of("llama"), runner_of("llama"), []
    prompts = [random_tokens(20 + number, seed=number) for number in range(6)]
    alone = [generate(runner, prompt, drafter=None, max_new_tokens=20) for prompt in prompts]
    prefill = type(draft).prefill
    monkeypatch.setattr(
        type(draft), "prefill", lambda self, *given, **more: read.append(1) or prefill(self, *given, **more)
    )
    with Engine(runner, slots=2, drafter=ModelDrafter(draft, runner), budget=4) as engine:
        for found, expected in zip([engine.submit(each, max_new_tokens=20) for each in prompts], alone, strict=True):
            check(found.result(SOON), expected)
    assert len(read) <= len(prompts)


def test_lost_slots_are_opened_again(monkeypatch):
    runner, prompts = runner_of("bamba"), [random_tokens(20), random_tokens(150, seed=1)]
    alone = [generate(runner, prompt, max_new_tokens=20) for prompt in prompts]
    verify, times = runner.verify, []

    def loses(trees):
        times.append(len(trees))
        if len(times) == 6:
            runner._cache = None
            raise MemoryError("no room")
        return verify(trees)

    monkeypatch.setattr(runner, "verify", loses)
    with Engine(runner, slots=2) as engine:
        answers = [engine.submit(prompt, max_new_tokens=20) for prompt in prompts]
        for answer, expected in zip(answers, alone, strict=True):
            check(answer.result(SOON), expected)


def test_the_queue_has_an_end_and_closing_ends_all():
    runner, block = runner_of("llama"), threading.Event()
    with Engine(runner, slots=1, queue=2) as engine:
        running = engine.submit([1, 2], max_new_tokens=2000, on_piece=lambda piece: block.wait(SOON))
        while engine.state()["running"] == 0:
            pass
        waiting = [engine.submit([3], max_new_tokens=4) for _ in range(2)]
        with pytest.raises(QueueFull, match="2 requests wait") as refused:
            engine.submit([4])
        assert refused.value.retry_after >= 1
        waiting[0].cancel()
        assert waiting[0].result(0).finish_reason == "cancelled" and engine.state()["queued"] == 1
        with pytest.raises(TimeoutError):
            running.result(0.001)
        block.set()
        engine.close()
        assert {running.result(0).finish_reason, waiting[1].result(0).finish_reason} == {"cancelled"}
        with pytest.raises(RuntimeError, match="closed"):
            engine.submit([1])
    assert generate(runner, [1, 2], max_new_tokens=3).finish_reason == "length"


def test_closing_lets_texts_end_within_the_grace():
    with Engine(runner_of("llama"), slots=1) as engine:
        answer = engine.submit([1, 2], max_new_tokens=30)
        next(iter(answer))
        engine.close(grace=SOON)
        assert answer.result(0).finish_reason == "length"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt": []}, "prompt must not be empty"),
        ({"prompt": [97]}, "prompt must hold tokens"),
        ({"prompt": [[1], [2]]}, "prompt must be one prompt"),
        ({"prompt": [1] * 40}, "prompt must leave room in 40"),
        ({"temperature": -1}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"logprobs": 101}, "logprobs"),
        ({"stop": ""}, "stop"),
        ({"on_piece": 3}, "on_piece"),
        ({"min_q": 3}, "min_q"),
    ],
)
def test_bad_requests_are_refused_at_once(settings, message):
    with Engine(runner_of("llama"), capacity=40) as engine:
        with pytest.raises((ValueError, TypeError), match=message):
            engine.submit(**({"prompt": [1]} | settings))
        assert engine.submit([1] * 38).result(SOON).finish_reason == "length"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"slots": 0}, "slots"),
        ({"queue": 0}, "queue"),
        ({"capacity": 1}, "capacity"),
        ({"prefix_memory": -1}, "prefix_memory"),
        ({"budget": 100, "cache": "int4"}, "budget"),
    ],
)
def test_bad_engines_are_refused(settings, message):
    runner = runner_of("llama")
    with pytest.raises(ValueError, match=message):
        Engine(runner, **settings)
    with pytest.raises(ValueError, match="drafter must not work in the model's own slots"):
        Engine(runner, drafter=LayerSkipDrafter(runner, [0]))
    assert generate(runner, [1], max_new_tokens=1).finish_reason == "length"
