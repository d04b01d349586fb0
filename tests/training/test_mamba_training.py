"""The training script on a model of a few thousand parameters: it learns, goes on where it was, and loads."""

import dataclasses

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from pyspec import generate, load  # noqa: E402
from training.mamba import Recipe, learning_rate, main, standard_library, texts_of, train  # noqa: E402

TEXTS = {"functions": [f"def f{index}(x):\n    return x + {index}\n" * 12 for index in range(100)]}
RECIPE = Recipe(vocabulary=280, hidden=32, layers=1, state=16, length=32, batch=8, steps=40, warmup=4)
CPU = torch.device("cpu")


def test_it_learns_and_the_folder_loads(tmp_path):
    train(tmp_path, RECIPE, TEXTS, CPU, every=20)
    _, first, last = (tmp_path / "loss.csv").read_text().splitlines()
    assert float(last.split(",")[2]) < float(first.split(",")[2]) < 6.0
    assert (tmp_path / "loss.png").stat().st_size > 1000
    card = (tmp_path / "README.md").read_text()
    assert "- functions: 100 files, 0." in card and f"**{float(last.split(',')[2]):.3f} nats" in card
    assert "40 steps of 8 rows of 32 tokens" in card
    runner = load(str(tmp_path), dtype=torch.float32, device="cpu")
    prompt = runner.tokenizer.encode("def f")
    plain = generate(runner, prompt, drafter=None, max_new_tokens=24)
    assert generate(runner, prompt, drafter="merged", budget=6, max_new_tokens=24).tokens == plain.tokens


def test_an_interrupted_run_goes_on_to_the_same_model(tmp_path, monkeypatch):
    train(tmp_path / "whole", RECIPE, TEXTS, CPU, every=20)
    real, calls = learning_rate, []

    def interrupted(recipe, step):
        calls.append(step)
        if len(calls) == 31:
            raise KeyboardInterrupt
        return real(recipe, step)

    monkeypatch.setattr("training.mamba.learning_rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", RECIPE, TEXTS, CPU, every=20)
    train(tmp_path / "parts", RECIPE, TEXTS, CPU, every=20)
    assert calls[30:32] == [30, 30]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    with pytest.raises(ValueError, match="was trained by another recipe"):
        train(tmp_path / "parts", dataclasses.replace(RECIPE, batch=4), TEXTS, CPU)


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocabulary must be at most 65536"):
        train(tmp_path, dataclasses.replace(RECIPE, vocabulary=70000), TEXTS, CPU)
    with pytest.raises(ValueError, match="texts must have more than 33 tokens"):
        train(tmp_path, RECIPE, {"few": TEXTS["functions"][:10]}, CPU)


def test_the_standard_library_is_text():
    texts = standard_library()
    assert len(texts) > 200 and any("class OrderedDict" in text for text in texts)


def test_texts_of_a_folder(tmp_path):
    (tmp_path / "inner").mkdir()
    for name, data in (
        ("b.md", b"two"),
        ("inner/a.rst", b"three"),
        ("a.txt", b"one"),
        ("c.txt", b"\xff"),
        ("d.bin", b"x"),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "empty.py").write_text("\n")
    assert texts_of(tmp_path) == ["one", "two", "three"]


def test_the_command_line_names_its_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--learning-rate" in capsys.readouterr().out
