"""pyspec bench controllers: its figures are of all controllers on the same rounds; table, plot and command."""

import json

import pytest

from pyspec.controllers import CONTROLLERS
from pyspec.drafters import new_drafter
from pyspec.drafters.model import ModelDrafter
from pyspec.machine import store
from pyspec.machine.costs import Costs
from pyspec.measure import controllers, machine
from tests.helpers.command_line import fake_model, run, write_prompts
from tests.helpers.fake_runner import FakeRunner

model = pytest.fixture(fake_model)
PROMPTS = [("a", list(b"once upon a time")), ("b", list(b"in a hole")), ("a", list(b"it was"))]


def measure(names=None, drafters=("merged",), **settings):
    runner = FakeRunner()
    made = {name: new_drafter(name, runner) for name in drafters}
    settings = {"costs": Costs((1, 64), (1.0, 2.0)), "max_new_tokens": 24} | settings
    return controllers.measure(runner, PROMPTS, made, names, **settings)


def test_every_controller_plays_and_none_is_better_than_the_oracle(tmp_path):
    for drafters in (("merged",), ("merged", "suffix")):
        report = measure(drafters=drafters)
        assert list(report["categories"]) == ["all", "a", "b"]
        for rows in report["categories"].values():
            assert rows["plain"]["speedup"] == 1.0
            for name, row in rows.items():
                assert 0 < row["speedup"] <= rows["oracle"]["speedup"] + 1e-9, name
            fixed = [rows[name]["speedup"] for name in rows if name == "fixed"]
            assert all(rate <= rows["best fixed"]["speedup"] + 1e-9 for rate in fixed)
        names = list(report["categories"]["all"])
        assert {"plain", "pays", "fixed", "heuristic", "throughput", "best fixed", "oracle"} <= set(names)
        assert "adaedl" not in names and ("best_arm" in names) == (len(drafters) > 1)
        json.dumps(report)
    report |= {"model": "a model", "dtype": "float32", "machine": machine()}
    controllers.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert len(list(controllers.tables(report))) == 2


def test_drafters_with_laws_have_stop_rules_alone_and_within_what_pays():
    runner = FakeRunner()
    names = controllers.names_for(runner, {"it": ModelDrafter(FakeRunner(), runner)})
    assert {"adaedl", "adaedl+pays", "confidence", "pays"} <= set(names) and "best_arm" not in names
    assert "disco" not in names  # there is no file for this drafter
    assert not set(names) - set(CONTROLLERS) - {f"{name}+pays" for name in CONTROLLERS}


def test_nothing_that_a_user_has_kept_is_read_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    store.keep("costs", "mine", [1])
    with store.apart():
        assert store.read("costs", "mine") is None
        store.keep("costs", "mine", [2])
        assert store.read("costs", "mine") == [2]
    assert store.read("costs", "mine") == [1]
    measure(["pays"])
    assert len(list((tmp_path / "pyspec").iterdir())) == 1


@pytest.mark.parametrize(
    "settings, words", [(dict(max_new_tokens=0), "max_new_tokens"), (dict(names=["adaedl"]), "laws of its own")]
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        measure(**settings)


def test_the_command(model, capsys, tmp_path):  # noqa: F811
    prompts, output = write_prompts(tmp_path / "prompts.jsonl"), tmp_path / "report.json"
    arguments = ("bench", "controllers", "--prompts", prompts, "--limit", 1, "--max-new-tokens", 12)
    code, out, _ = run(capsys, *arguments, "--output", output)
    assert code == 0 and "tokens a second" in out and "oracle" in out and output.with_suffix(".png").exists()
    assert list(json.loads(output.read_text())["categories"]) == ["all", "a", "b"]
    chosen = ("--drafter", "lookup", "--drafter", "suffix", "--controllers", "best_arm+pays")
    code, out, _ = run(capsys, *arguments, *chosen, "--json")
    names = list(json.loads(out)["categories"]["all"])
    assert code == 0 and names == ["plain", "best_arm+pays", "best fixed", "oracle"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--drafter", "medium"], "--drafter must be one of"),
        (["--controllers", "all"], "controller must be one of"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--output", "/nowhere/file.json"], "/nowhere"),
    ],
)
def test_bad_input(model, capsys, arguments, words):  # noqa: F811
    code, out, err = run(capsys, "bench", "controllers", *arguments)
    assert code == 2 and out == "" and words in err.splitlines()[-1]
