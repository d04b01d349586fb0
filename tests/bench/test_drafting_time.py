"""bench/drafting_time.py runs, and writes what it found."""

import json
import sys

import drafting_time
import torch

from pyspec.measure import results


def test_every_drafter_is_timed(monkeypatch, capsys):
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", ["drafting_time.py", "--entries", "20000", "--repeats", "5", "--threads", threads])
    assert drafting_time.main() == 0
    rows = json.loads((results.RESULTS / "drafting_time.json").read_text())["drafters"]
    assert rows["suffix"]["entries"] == 20000 and "stand" in capsys.readouterr().out
