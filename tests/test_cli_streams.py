"""What the command line reads and writes: encodings, and streams that are closed or full."""

import codecs
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pyspec
from pyspec.cli import main
from tests.helpers.command_line import fake_model, pyspec_text, run
from tests.helpers.fake_runner import ScriptedRunner

ROOT = Path(__file__).parents[1]
model = pytest.fixture(fake_model)


def says(text, monkeypatch, prompt="x"):
    runner = ScriptedRunner(text.encode())
    runner.prompt_length = len(f"user: {prompt}\n".encode())
    monkeypatch.setattr(pyspec, "load", lambda *args, **kwargs: runner)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_json_is_utf8_whatever_the_locale(encoding, monkeypatch):
    says("grüße 🌳", monkeypatch)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert main(["generate", "x", "--json", "--no-compare", "--model", "f\udce9"]) == 0
    report = json.loads(written.getvalue().decode("utf-8"))
    assert report["text"] == "grüße 🌳" and report["model"] == "f\udce9"


@pytest.mark.parametrize(
    "data",
    [b"gr\xc3\xbc\xc3\x9f\n", codecs.BOM_UTF8 + b"gr\xc3\xbc\xc3\x9f\r\n", "grüß\n".encode("utf-16")],
)
def test_prompts_of_files_and_streams(model, capsys, monkeypatch, tmp_path, data):
    path = tmp_path / "prompt.txt"
    path.write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    expected = pyspec_text(model, "user: grüß\n\n", 5)
    for arguments in (["--file", path], ["-"]):
        code, out, _ = run(capsys, "generate", *arguments, "--json", "--max-new-tokens", 5, "--drafter", "none")
        assert code == 0 and json.loads(out)["text"] == expected


@pytest.mark.parametrize(
    "arguments, data, words",
    [
        (["-"], b"caf\xe9", "standard input must be UTF-8 text, got byte 0xe9 at 3"),
        (["-"], b"", "the prompt is empty"),
        (["-"], codecs.BOM_UTF8, "the prompt is empty"),
        (["-"], None, "standard input is closed"),
        (["caf\udce9"], None, r"the prompt must be text that UTF-8 can hold, got 'caf\udce9'"),
        (["x", "--stop", "\udce9"], None, "--stop must be text that UTF-8 can hold"),
        (["--file", "."], None, ". cannot be read: Is a directory"),
        (["--file", "x" * 999], None, "cannot be read: File name too long"),
        (["--file", "FILE"], b"\xff\xfe\x00", "must be UTF-8 text, got byte 0x00 at 2"),
        (["--file", "FILE"], b"caf\xe9", "prompt.txt must be UTF-8 text, got byte 0xe9 at 3"),
    ],
)
def test_prompts_that_are_no_text_are_bad_input(model, capsys, monkeypatch, tmp_path, arguments, data, words):
    monkeypatch.setattr(sys, "stdin", data if data is None else io.TextIOWrapper(io.BytesIO(data)))
    if data is not None:
        (tmp_path / "prompt.txt").write_bytes(data)
    code, out, err = run(capsys, "generate", *(tmp_path / "prompt.txt" if a == "FILE" else a for a in arguments))
    assert code == 2 and out == "" and words in err and len(err.splitlines()) == 1


def test_a_closed_stdout_is_a_failure_with_a_sentence(model, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        assert main(["generate", "x"]) == 1
    assert capsys.readouterr().err == "pyspec: there is nowhere to write to: standard output is closed\n"


def test_a_closed_stderr_keeps_the_text(model, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert main(["generate", "x", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == pyspec_text(model, "user: x\n", 5) + "\n"


def test_real_streams_that_are_closed_or_full():
    script = """
import sys, pyspec
sys.path.insert(0, sys.argv.pop(1))
from tests.helpers.fake_runner import FakeRunner
pyspec.load = lambda *args, **kwargs: FakeRunner()
from pyspec.cli import main
sys.exit(main(sys.argv[1:]))
"""
    calls = ["x --no-compare --drafter none --json >&-"]
    if Path("/dev/full").exists():
        calls.append("x --no-compare --drafter none --json >/dev/full")
    command = "; ".join(f'"$0" -c "$1" "$2" generate {call}; echo "code $?" >&2' for call in calls)
    result = subprocess.run(
        ["sh", "-c", command, sys.executable, script, str(ROOT)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
    )
    expected = ["standard output is closed", "code 1", "No space left", "code 1"]
    lines = result.stderr.splitlines()
    assert len(lines) == 2 * len(calls) and all(words in line for words, line in zip(expected, lines, strict=False))
