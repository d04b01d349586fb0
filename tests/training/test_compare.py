"""Drafts of one budget side by side: each is trained, kept, and measured as a chain and as a tree."""

import json

import pytest

from pyspec import generate
from pyspec.drafters import drafter_of_head
from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import random_llama, random_tokens
from training import compare


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


def test_one_table(target, tmp_path, monkeypatch, capsys):
    data = write_texts(tmp_path / "data", target, (2, 3, 5, 6))
    monkeypatch.setattr(compare, "head_vocabulary", lambda texts, runner, size: range(0, 2 * size, 2))
    monkeypatch.setattr(compare.pyspec, "load", lambda *source, **options: target)
    arguments = ["--data", str(data), "--output", str(tmp_path / "drafts"), "--steps", "4"]
    for _ in range(2):  # the second time all is there
        compare.main([*arguments, "--tokens", "120", "--vocabulary", "40"])
    kept = json.loads((tmp_path / "drafts" / "compared.json").read_text())
    assert kept["drafts"].keys() == compare.KINDS.keys() and kept["steps"] == 4
    prompt = random_tokens(9)
    plain = generate(target, prompt, drafter=None, max_new_tokens=20).tokens
    for name in ("eagle3", "dspark", "chimera"):  # each of them drafts
        drafter = drafter_of_head(tmp_path / "drafts" / name, target)
        assert generate(target, prompt, drafter=drafter, budget=6, max_new_tokens=20).tokens == plain
        assert "--draft-head FOLDER" in (tmp_path / "drafts" / name / "README.md").read_text()
    for name, row in kept["drafts"].items():
        assert (tmp_path / "drafts" / name / "model.safetensors").is_file()
        assert 0 <= row["first"] <= row["chain"] - 1 and row["chain"] <= row["tree"] <= 5
    lines = [line for line in capsys.readouterr().out.splitlines() if " parameters, first " in line]
    assert len(lines) == 8 and lines[:4] == lines[4:]
