"""The command line of cascades, beams and AdaDec, and of rules with a setting."""

import json

import pytest

import pyspec
from pyspec.beams import beam_search
from pyspec.generate import generate
from tests.helpers.command_line import fake_model, pyspec_text, run
from tests.helpers.fake_runner import FakeRunner

model = pytest.fixture(fake_model)


def test_generate_takes_the_setting_of_a_rule(model, capsys):
    asked = ("generate", "hello", "--json", "--no-compare", "--max-new-tokens", 20, "--seed", 1)
    code, out, _ = run(capsys, *asked, "--acceptance", "cascade", "--deferral", '{"alpha": 0, "top": 1}')
    expected = generate(model, list(b"user: hello\n"), max_new_tokens=20).tokens
    assert code == 0 and json.loads(out)["tokens"] == expected
    for settings, message in (
        (("--deferral", 0.1), "deferral is for"),
        (("--acceptance", "cascade", "--deferral", 2), "deferral must be in"),
    ):
        code, _, err = run(capsys, *asked, *settings)
        assert code == 2 and message in err


def test_cascade_has_two_models_and_a_rule(monkeypatch, capsys):
    sources = []
    monkeypatch.setattr(pyspec, "load", lambda source, **options: sources.append(source) or FakeRunner())
    asked = ("cascade", "hello", "--small", "tiny", "--large", "big", "--max-new-tokens", 20)
    code, out, err = run(capsys, *asked, "--rule", "chow_average", "--setting", "threshold=5")
    assert code == 0 and sources == ["tiny", "big"] and out == pyspec_text(FakeRunner(), "user: hello\n", 20) + "\n"
    assert "100% of them by the large model in 2 turns" in " ".join(err.split()) and "scored" in err
    code, out, _ = run(capsys, *asked, "--json", "--setting", "threshold=1e9")
    report = json.loads(out)
    assert code == 0 and report["turns"] == [[0, 20]] and report["large_share"] == 0 and len(report["stats"]) == 2
    for settings, message in (
        (("--setting", "windows=2"), "must be one of threshold, window, stay, got windows"),
        (("--setting", "threshold=0"), "threshold must be"),
        (("--rule", "learned"), "file must name"),
        (("--setting", "threshold"), "must be NAME=VALUE"),
    ):
        code, _, err = run(capsys, *asked, *settings)
        assert code == 2 and message in err


def test_beams_are_shown_with_their_scores(model, capsys):
    settings = ("--beams", 4, "--groups", 2, "--max-new-tokens", 12)
    expected = beam_search(model, list(b"user: hello\n"), beams=4, groups=2, max_new_tokens=12).beams
    code, out, err = run(capsys, "beams", "hello", *settings)
    assert code == 0 and "12 steps of 4 beams" in err
    shown = "".join(f"{beam.score:.4f}  group {beam.group}  {beam.text}\n" for beam in expected)
    assert out == shown
    code, out, _ = run(capsys, "beams", "hello", "--json", *settings)
    assert [beam["tokens"] for beam in json.loads(out)["beams"]] == [beam.tokens for beam in expected]
    code, _, err = run(capsys, "beams", "hello", "--beams", 4, "--groups", 3)
    assert code == 2 and "groups must divide" in err


def test_adadec_streams_its_text(model, capsys):
    settings = ("--threshold", 0.5, "--choices", 2, "--depth", 3, "--max-new-tokens", 12)
    expected = pyspec.adadec(model, list(b"user: hello\n"), threshold=0.5, choices=2, depth=3, max_new_tokens=12)
    code, out, err = run(capsys, "adadec", "hello", *settings)
    assert code == 0 and out == expected.text + "\n" and "12 tokens in" in err
    code, out, _ = run(capsys, "adadec", "hello", "--json", *settings)
    assert json.loads(out)["tokens"] == expected.tokens
    code, _, err = run(capsys, "adadec", "hello", "--choices", 9)
    assert code == 2 and "choices must be" in err
