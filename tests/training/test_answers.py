"""The learned rule and the router, from answers whose quality is known."""

import json

import numpy as np
import pytest

import pyspec
from pyspec.answers.learned import LearnedRule
from pyspec.measure.tasks import KINDS, tasks
from pyspec.turns.uniroute import UniRouteTurns
from tests.helpers.fake_runner import FakeRunner
from training.answers import Answered, answered, fit, main, router_of


def made(count, generator):
    """Answers that are right unless their worst token is unlikely, whatever their length; the large model's all are."""
    small = []
    for number in range(count):
        worst = -generator.uniform(0.1, 6)
        logprobs = np.append(-generator.uniform(0, 0.3, generator.integers(3, 40)), worst)
        small.append(Answered([number % 2, 5, number % 7], generator.permutation(logprobs), bool(worst > -3)))
    return small, [Answered(each.prompt, each.logprobs, True) for each in small]


def test_the_rule_learns_what_pays():
    generator = np.random.default_rng(0)
    rule = LearnedRule(fit(*made(200, generator)))
    unseen, _ = made(200, generator)
    told = [rule.defers(rule.score(each.logprobs)) != each.is_right for each in unseen]
    by_sum = [each.logprobs.sum() for each in unseen]
    best_of_sums = max(
        np.mean([(score < threshold) != each.is_right for score, each in zip(by_sum, unseen, strict=True)])
        for threshold in by_sum
    )
    assert np.mean(told) > 0.93 > best_of_sums


def test_tasks_have_one_right_answer():
    asked = tasks(8)
    assert asked == tasks(8) != tasks(8, seed=1)
    assert {task.kind for task in asked} == set(KINDS)
    for task in asked:
        assert task.is_right(f" {task.answer}\nmore") and not task.is_right(f"{task.answer} more")
        assert task.prompt.count("\n") == 3 and not task.prompt.endswith(" ")


def test_the_command_writes_what_a_cascade_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pyspec, "load", lambda source: FakeRunner())
    lines = [{"prompt": f"{number} or not", "answer": "x"} for number in range(6)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = [tmp_path / "answers.npz", tmp_path / "routes.npz"]
    asked = ["--small", "a", "--tasks", str(tmp_path / "tasks.jsonl"), "--output", str(files[0])]
    main([*asked, "--router", str(files[1])])
    assert "6 tasks, right: small 0, large 0" in capsys.readouterr().out
    for rule in (LearnedRule(files[0]), UniRouteTurns(files[1])):
        assert pyspec.cascade(FakeRunner(), FakeRunner(), [97, 98], rule=rule, max_new_tokens=5).tokens
    (tmp_path / "tasks.jsonl").write_text('{"prompt": "x"}')
    with pytest.raises(ValueError, match="line 1 must have prompt and answer"):
        main(asked)


def test_answers_are_those_of_the_model():
    (task,) = tasks(1)
    (found,) = answered(FakeRunner(), [task], max_new_tokens=9)
    expected = pyspec.generate(FakeRunner(), list(task.prompt.encode()), max_new_tokens=9, stop="\n", logprobs=0)
    assert found.logprobs.tolist() == [each.logprob for each in expected.logprobs]
    assert router_of([found], [found], 0.5).route(found.prompt, 1.0) == "small"
