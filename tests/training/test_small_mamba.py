"""Distilling a smaller Mamba-2: with all layers it is its teacher, and a run goes on to the same student."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("safetensors")
from pyspec import from_transformers, load  # noqa: E402
from tests.helpers.tiny_mambas import tiny_mamba  # noqa: E402
from training import small_mamba  # noqa: E402
from training.data_files import Text, shard_path, write_shard  # noqa: E402
from training.small_mamba import Distillation, Recipe, learn, main, student_of  # noqa: E402

RECIPE = Recipe(layers=(1,), tokens=120, steps=12, warmup=2, every=4)


@pytest.fixture(scope="module")
def teacher():
    return tiny_mamba("mamba2")


@pytest.fixture(scope="module")
def texts(teacher, tmp_path_factory):
    """60 texts of 4 to 40 random tokens."""
    folder, runner = tmp_path_factory.mktemp("texts"), from_transformers(teacher)
    (folder / "settings.json").write_text(json.dumps({"hidden": 48, "taps": [1, 2]}))
    generator, made = torch.Generator().manual_seed(0), []
    for number in range(60):
        tokens = torch.randint(runner.vocab_size, (4 + number * 7 % 37,), generator=generator, dtype=torch.int32)
        rows = []
        runner.prefill([tokens.tolist()], observe=lambda slot, chain, seen: rows.append(seen.taps), taps=(1, 2))  # noqa: B023
        features = torch.cat(rows)
        features[-1] = 0
        made.append(Text(tokens, 2, features))
    write_shard(shard_path(folder, 0), made)
    return folder


def test_a_student_with_all_layers_is_its_teacher(teacher, texts, tmp_path):
    run = Distillation(tmp_path, Recipe(layers=(0, 1), tokens=120), teacher, texts)
    same, overlap = run.measure()
    assert same == 1.0 and overlap > 0.998  # features are float16
    assert next(run.steps()) < 1e-4
    others = Distillation(tmp_path, Recipe(layers=(1, 0), tokens=120), teacher, texts)
    assert others.measure()[1] < 0.9


def test_a_student_is_nearer_to_its_teacher_afterwards(teacher, texts, tmp_path):
    run = Distillation(tmp_path, Recipe(layers=(1,), tokens=120, steps=40, warmup=4, every=20), teacher, texts)
    before = run.measure()
    learn(run)
    assert run.curve[-1][3] > before[1] + 0.02
    assert (tmp_path / "loss.csv").read_text().startswith("step,divergence,same token,overlap\n20,")


def test_an_interrupted_run_goes_on_to_the_same_student(teacher, texts, tmp_path, monkeypatch):
    folders = [tmp_path / "whole", tmp_path / "parts"]
    for folder in folders:
        folder.mkdir()
    whole = Distillation(folders[0], RECIPE, teacher, texts)
    learn(whole)
    real, calls = small_mamba.learning_rate, []

    def interrupted(recipe, step):
        calls.append(step)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(recipe, step)

    monkeypatch.setattr(small_mamba, "learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(Distillation(folders[1], RECIPE, teacher, texts))
    parts = Distillation(folders[1], RECIPE, teacher, texts)
    assert parts.step == 7
    learn(parts)
    for one, other in zip(whole.student.parameters(), parts.student.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="was trained by another recipe"):
        Distillation(folders[1], Recipe(layers=(0,)), teacher, texts)


def test_the_command_writes_a_model_that_loads(teacher, texts, tmp_path, capsys):
    teacher.save_pretrained(tmp_path / "teacher")
    options = ["--layers", "0", "--steps", "3", "--tokens", "120"]
    main(["--model", str(tmp_path / "teacher"), "--data", str(texts), "--output", str(tmp_path / "small"), *options])
    assert "its likeliest token is the teacher's in" in capsys.readouterr().out
    runner = load(str(tmp_path / "small"), device="cpu")
    assert runner.layers == 1 and runner.vocab_size == teacher.config.vocab_size


def test_what_does_not_fit_is_refused(teacher, texts, tmp_path):
    with pytest.raises(ValueError, match=r"layers must be some of the teacher's, in \[0, 2\), got \[0, 2\]"):
        student_of(teacher, (0, 2))
    (tmp_path / "settings.json").write_text(json.dumps({"hidden": 32, "taps": [1, 2]}))
    write_shard(shard_path(tmp_path, 0), [Text(torch.zeros(2, dtype=torch.int32), 1, torch.zeros(2, 2, 32))])
    with pytest.raises(ValueError, match="must be of a model of 2 layers of 48, got 2 layers of 32 in"):
        Distillation(tmp_path, RECIPE, teacher, tmp_path)
