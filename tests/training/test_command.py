"""What every trainer's command does beside its draft: it begins with what another run kept."""

import dataclasses
import json

import pytest
from safetensors.torch import load_file

from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import random_llama
from training.chimera import Chimera
from training.command import train
from training.drafts import Recipe
from training.dspark import DSpark

RECIPE = Recipe(steps=3, tokens=120, depth=2, vocabulary=40, frozen=0, warmup=1, learning_rate=1e-2, every=3)
STILL = dataclasses.replace(RECIPE, steps=1, every=1, learning_rate=0.0, last_rate=0.0, seed=1)


def no_vocabulary(data):
    raise AssertionError("the tokens are those of the draft to begin with")


def test_a_draft_begins_with_another(tmp_path):
    target = random_llama(windows=(None,) * 6)
    data = write_texts(tmp_path / "data", target, (2, 3, 5, 6))
    train(tmp_path / "first", data, RECIPE, target, DSpark, lambda data: range(1, 81, 2))
    train(tmp_path / "second", data, STILL, target, DSpark, no_vocabulary, begin=tmp_path / "first")
    first, second = ((tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    assert json.loads((tmp_path / "second" / "tokens.json").read_text()) == list(range(1, 81, 2))
    train(tmp_path / "new", data, STILL, target, DSpark, lambda data: range(1, 81, 2))
    differ = load_file(tmp_path / "new" / "model.safetensors")["lm_head.weight"] != load_file(first)["lm_head.weight"]
    assert differ.any()
    with pytest.raises(
        ValueError, match=r"first must hold such a draft, but confidence.bias is \(1,\) there, not None"
    ):
        train(tmp_path / "other", data, STILL, target, Chimera, no_vocabulary, begin=tmp_path / "first")
    with pytest.raises(FileNotFoundError, match="checkpoint.pt"):
        train(tmp_path / "none", data, STILL, target, DSpark, no_vocabulary, begin=tmp_path / "data")
    assert not (tmp_path / "none").exists()
