"""The command line in this process, on a fake model."""

import json

import pyspec
from pyspec.cli import main
from tests.helpers.fake_runner import FakeRunner


def fake_model(monkeypatch):
    """Makes every command load a fake model, whose `loads` are what was asked for; for pytest.fixture."""
    runner = FakeRunner()
    runner.loads = []

    def load(source, *, dtype=None, prompt_attention="pyspec", progress=None, announce=None):
        runner.loads.append((source, dtype))
        progress(1, 2)
        progress(2, 2)
        return runner

    monkeypatch.setattr(pyspec, "load", load)
    return runner


def run(capsys, *arguments):
    """Exit code, stdout, stderr of a command."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as exit:  # argparse
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write_prompts(path):
    lines = [{"category": category, "turns": [f"{category} {index}"]} for category in "ab" for index in range(3)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "alone"}])))
    return path


def pyspec_text(model, prompt, max_new_tokens):
    from pyspec.generate import generate

    return generate(model, list(prompt.encode()), drafter=None, max_new_tokens=max_new_tokens).text
