"""bench/drafters.py and bench/drafting_time.py run, and write what they found."""

import json
import sys

import drafters
import drafting_time
import measure
import prompts
import torch

import pyspec
from tests.helpers.fake_runner import FakeRunner


def test_drafters(monkeypatch, tmp_path):
    monkeypatch.setattr(pyspec, "load", lambda *args, **settings: FakeRunner())
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    short = [prompts.Prompt(number, category, "a tree is a tree") for number, category in enumerate("aab")]
    monkeypatch.setattr(prompts, "first_of_each_category", lambda limit: short)
    arguments = ["--new-tokens", "8", "--budget", "4", "--threads", str(torch.get_num_threads()), "--drafters", "stand"]
    monkeypatch.setattr(sys, "argv", ["drafters.py", *arguments])
    assert drafters.main() == 0
    report = json.loads((tmp_path / "drafters_bf16.json").read_text())
    assert report["temperatures"]["0.8"]["all"]["stand"]["texts"] == 3 and (tmp_path / "drafters_bf16.png").exists()


def test_drafting_time(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["drafting_time.py", "--entries", "20000", "--repeats", "5"])
    assert drafting_time.main() == 0
    rows = json.loads((tmp_path / "drafting_time.json").read_text())["drafters"]
    assert rows["suffix"]["entries"] == 20000 and "stand" in capsys.readouterr().out
