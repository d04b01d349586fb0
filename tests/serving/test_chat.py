"""pyspec chat and the checks of pyspec serve, in this process."""

import io
import json
import sys

import pytest

import pyspec
from pyspec.cli import chat
from tests.helpers.command_line import run
from tests.helpers.talking_llama import talking_llama

SETTINGS = {"drafter": None, "max_new_tokens": 12, "temperature": 0.7, "seed": 3}


@pytest.fixture
def model(monkeypatch):
    runner = talking_llama()
    monkeypatch.setattr(pyspec, "load", lambda source, **options: runner)
    return runner


def converse(capsys, monkeypatch, *lines, options=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return run(capsys, "chat", "--max-new-tokens", 12, "--seed", 3, "--budget", 4, *options)


def answer_to(*turns, system=None):
    """What the model says to the last of a user's and its own turns."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    runner = talking_llama()
    return pyspec.generate(runner, runner.tokenizer.chat(messages), **SETTINGS).text


def test_a_conversation_goes_on_from_what_was_said(model, capsys, monkeypatch):
    first = answer_to("hello")
    second = answer_to("hello", first, "two\nlines")
    code, out, err = converse(capsys, monkeypatch, "hello", "", '"""two', 'lines"""', "/stats")
    assert (code, out) == (0, f"{first}\n{second}\n")
    assert "last: 12 tokens" in err and "\nall: " in err


def test_commands(model, capsys, monkeypatch, tmp_path):
    plain, brief = answer_to("hello"), answer_to("hello", system="Brief")
    code, out, err = converse(
        capsys, monkeypatch, "/stats", "hello", "/reset", "hello", "/system Brief", "/reset", "hello", "/nothing",
        f"/save {tmp_path / 'said.json'}", "/save", f"/save {tmp_path}", "/help", "/quit", "never said",
    )  # fmt: skip
    assert (code, out) == (0, f"{plain}\n{plain}\n{brief}\n")
    for words in ("no answer yet", "there is no command /nothing", "needs the name of a file", "/reset", "directory"):
        assert words in err
    said = json.loads((tmp_path / "said.json").read_text())
    assert [turn["role"] for turn in said] == ["system", "user", "assistant"] and said[2]["content"] == brief


def test_a_conversation_is_kept_in_a_file(model, capsys, monkeypatch, tmp_path):
    options = ("--conversation", tmp_path / "said.json", "--system", "Brief")
    first = answer_to("hello", system="Brief")
    assert converse(capsys, monkeypatch, "hello", options=options)[1] == first + "\n"
    second = answer_to("hello", first, "more", system="Brief")
    assert converse(capsys, monkeypatch, "more", options=options)[1] == second + "\n"
    assert len(json.loads((tmp_path / "said.json").read_text())) == 5
    (tmp_path / "said.json").write_text('[{"role": "user"}]')
    code, out, err = converse(capsys, monkeypatch, "more", options=options)
    assert (code, out) == (2, "") and "must be a conversation" in err


def test_an_interrupt_ends_the_answer_and_not_the_chat(model, capsys, monkeypatch, tmp_path):
    shown = []

    def write(piece):
        shown.append(piece)
        if len(shown) % 4 == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(chat, "write", write)
    endless = ("--max-new-tokens", 2000, "--logit-bias", '{"96": -100}', "--conversation", tmp_path / "said.json")
    code, _, err = converse(capsys, monkeypatch, "hello", "/stats", "more", options=endless)
    assert code == 0 and err.count("ended by Ctrl-C") == 2
    said = [turn["content"] for turn in json.loads((tmp_path / "said.json").read_text())]
    assert len(said) == 4 and said[2] == "more" and all(len(text) < 1990 for text in said)
    assert said[1].startswith("".join(shown[: shown.index("\n")])) and said[1] != said[3]


def test_a_conversation_longer_than_the_context_is_told(model, capsys, monkeypatch):
    code, out, err = converse(capsys, monkeypatch, "x" * 3000, "hello")
    assert (code, out) == (0, answer_to("hello") + "\n") and "takes 3000: /reset" in err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--slots", 0), "--slots must be at least 1"),
        (("--queue", -1), "--queue must be at least 1"),
        (("--port", 70000), "--port must be at most 65535"),
        (("--grace", "nan"), "--grace must be in"),
        (("--most-bytes", 0), "--most-bytes must be at least 1"),
        (("--api-key", "é"), "--api-key must be ASCII"),
        (("--acceptance", "cascade", "--deferral", 3), "deferral must be"),
    ],
)
def test_serve_checks_its_numbers_before_it_loads_a_model(capsys, arguments, words):
    code, out, err = run(capsys, "serve", "--model", "no/such/model", *arguments)
    assert (code, out) == (2, "") and words in err


def test_serve_names_the_extra_that_it_needs(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err = run(capsys, "serve", "--model", "no/such/model")
    assert code == 1 and "pip install 'pyspec-kernels[serve]'" in err
