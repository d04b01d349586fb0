"""pyspec bench drafters: its figures, its table, its plot."""

import json

import pytest

from pyspec.measure import drafters as drafter_bench
from pyspec.measure import machine
from tests.helpers.fake_runner import FakeRunner

PROMPTS = [("a", list(b"once upon a time")), ("b", list(b"in a hole")), ("a", list(b"it was"))]
NAMES = ["merged", "stand"]


def measure(**settings):
    return drafter_bench.measure(FakeRunner(), PROMPTS, NAMES, max_new_tokens=24, **settings)


def test_figures_are_sums_over_texts():
    called = []
    report = measure(answers=2, budget=6, advance=called.append)
    assert len(called) == drafter_bench.runs_of(PROMPTS, NAMES, drafter_bench.TEMPERATURES, 2)
    assert list(report["temperatures"]) == ["0.0", "0.8"]
    for categories in report["temperatures"].values():
        assert list(categories) == ["all", "a", "b"]
        for category, texts in (("all", 3), ("a", 2), ("b", 1)):
            rows = categories[category]
            assert list(rows) == ["plain", *NAMES]
            assert rows["plain"]["tokens_per_round"] == rows["plain"]["speedup"] == 1
            for row in rows.values():
                assert row["equal"] == row["texts"] == texts and 0 <= row["draft_share"] < 1
                assert row["speedup"] == pytest.approx(row["tokens_per_second"] / rows["plain"]["tokens_per_second"])
    assert list(report["answers"]) == ["merged", "stand", "recycling"]
    assert report["answers"]["recycling"]["over_recycling"] == 1
    json.dumps(report)


def test_answers_help_each_other_and_problems_do_not():
    problems = drafter_bench._problems(PROMPTS)
    assert problems == [PROMPTS[0][1], PROMPTS[1][1]]  # one of each category, the first
    one, four = (measure(answers=answers, temperatures=[], budget=8)["answers"]["stand"] for answers in (1, 4))
    assert four["tokens_per_round"] > 1.1 * one["tokens_per_round"]
    assert measure(answers=0, temperatures=[0.0])["answers"] == {}


def test_a_plot_and_tables(tmp_path):
    for settings in (dict(answers=1), dict(answers=0, temperatures=[0.8])):
        report = measure(**settings) | {"model": "a model", "dtype": "float32", "machine": machine()}
        drafter_bench.plot(report, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        assert len(list(drafter_bench.tables(report))) == (3 if settings["answers"] else 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(budget=0), "budget"),
        (dict(names=["medium"]), "medium"),
        (dict(names=[]), "none"),
        (dict(prompts=[]), "prompts"),
    ],
)
def test_bad_settings(settings, words):
    call = dict(prompts=PROMPTS, names=NAMES) | settings
    with pytest.raises(ValueError, match=words):
        drafter_bench.measure(FakeRunner(), **call)


def test_an_error_in_a_text_is_raised():
    class Broken(FakeRunner):
        def logits(self, context):
            return super().logits(context) * float("nan")

    with pytest.raises(RuntimeError, match="NaN"):
        drafter_bench.measure(Broken(), PROMPTS, ["merged"], max_new_tokens=4)
