"""The maker of texts: what is in its files, that it goes on where it was killed, and where circles are cut."""

import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("safetensors")
from safetensors.torch import load_file  # noqa: E402

from pyspec import generate  # noqa: E402
from tests.helpers.random_llama import random_llama  # noqa: E402
from training import data, data_prompts  # noqa: E402
from training.data import Maker, Recipe, end_of_circles, main, make, taps_of  # noqa: E402
from training.data_files import shard_path  # noqa: E402
from training.data_prompts import Function, Topics, Word  # noqa: E402

RECIPE = Recipe(each=6, answer=10)
END = 7


class Characters:
    """A tokenizer for random_llama's 97 tokens, with turns of a chat in brackets."""

    fingerprint = "characters"
    chat_template = "of brackets"

    def encode(self, text, special=False):
        return [ord(letter) % 97 for letter in text]

    def render(self, messages):
        return f"[{messages[0]['content']}]("

    def chat(self, messages):
        return self.encode(self.render(messages))[:40]

    def decode(self, tokens):
        return "".join(map(chr, tokens))

    def token_bytes(self, token):
        return bytes([token])


@pytest.fixture(scope="module")
def runner():
    runner = random_llama(windows=(None,) * 5)
    runner.tokenizer, runner.eos_tokens = Characters(), frozenset({END, 8, 9, 10, 11, 12})
    return runner


@pytest.fixture(autouse=True)
def few_functions(monkeypatch):
    found = [Function(f"module.f{number}", f"Gives {number}.", f"def f{number}():\n    x\n") for number in range(5)]
    monkeypatch.setattr(data_prompts, "functions_of_python", lambda: found)


def topics():
    return Topics([Word("tree", "a plant"), Word("leaf", "a part of a tree")])


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def naive_end(tokens):
    """Every place, every period, counted by hand."""
    best = len(tokens)
    for start, period in itertools.product(range(len(tokens)), range(1, len(tokens))):
        length = period
        while start + length < len(tokens) and tokens[start + length] == tokens[start + length - period]:
            length += 1
        if length > 2 * period and length >= data.CIRCLE:
            best = min(best, start + 2 * period)
    return best


def test_circles_end_with_their_second_period():
    begin, once = list(range(100, 120)), list(range(40))
    assert end_of_circles([*begin, *once, *once, *once]) == 20 + 80
    assert end_of_circles([*begin, *once, *once, once[0], 5]) == 20 + 80
    assert end_of_circles([*begin, *once, *once, 5]) == 20 + 81  # twice is no circle
    assert end_of_circles([*begin, *[3] * 31]) == 51  # a line
    assert end_of_circles([*begin, *[3] * 32, 1, 2]) == 22
    assert [end_of_circles(list(range(length))) for length in (0, 1, 2, 50)] == [0, 1, 2, 50]


@pytest.mark.parametrize("seed", range(12))
def test_circles_by_hand(seed):
    random = np.random.default_rng(seed)
    text = random.integers(0, 40, 120)
    period, start = int(random.integers(1, 40)), int(random.integers(0, 60))
    for place in range(start + period, min(120, start + int(random.integers(1, 4)) * period + 20)):
        text[place] = text[place - period]
    assert end_of_circles(text.tolist()) == naive_end(text.tolist())


def test_features_are_what_layers_say_of_the_text(runner):
    maker = Maker(runner, RECIPE, topics())
    assert maker.taps == taps_of(5) == (2, 5)
    assert taps_of(30) == (2, 15, 27, 30)
    for text in maker.shard(0):
        rows = []
        runner.prefill([text.tokens.tolist()], observe=lambda slot, chain, seen: rows.append(seen.taps), taps=(2, 5))  # noqa: B023
        assert torch.equal(text.features[:-1], torch.cat(rows)[:-1])
        assert len(text.features) == len(text.tokens) and not text.features[-1].any()


def test_answers_are_the_models_own(runner):
    """Most are greedy, and then what generate says; the others are not."""
    texts = [text for number in range(4) for text in Maker(runner, RECIPE, topics()).shard(number)]
    greedy = 0
    for text in texts:
        prompt, answer = text.tokens[: text.answer].tolist(), text.tokens[text.answer :].tolist()
        said = generate(runner, prompt, max_new_tokens=RECIPE.answer).tokens
        greedy += said[: len(answer)] == answer
    assert 0.5 * len(texts) < greedy < len(texts)


@pytest.mark.parametrize("writer", ["another", "documents"])
def test_another_writes_and_the_model_reads(runner, writer):
    another = None
    if writer == "another":
        writer = another = random_llama(windows=(None,))
        another.tokenizer, another.eos_tokens = runner.tokenizer, runner.eos_tokens
    maker, others = Maker(runner, RECIPE, topics(), writer), 0
    texts = [text for number in range(2) for text in maker.shard(number)]
    for text in texts:
        prompt, answer = text.tokens[: text.answer].tolist(), text.tokens[text.answer :].tolist()
        if another is None:
            known = ["Tree: a plant.", "Leaf: a part of a tree.", *(f"Gives {number}." for number in range(5))]
            others += answer in [Characters().encode(each)[:10] for each in known]
        else:
            others += generate(another, prompt, max_new_tokens=10).tokens[: len(answer)] == answer
        rows = []
        runner.prefill([[*prompt, *answer]], observe=lambda slot, chain, seen: rows.append(seen.taps), taps=(2, 5))  # noqa: B023
        assert torch.equal(text.features[:-1], torch.cat(rows)[:-1])
        assert not text.features[-1].any()
    assert others == len(texts) if another is None else 0.5 * len(texts) < others


def test_a_writer_of_other_tokens_is_refused(runner, tmp_path, monkeypatch):
    another = random_llama()
    monkeypatch.setattr(another, "vocab_size", 96, raising=False)
    monkeypatch.setattr(data.pyspec, "load", lambda name, device: another)
    with pytest.raises(ValueError, match="writer must have the model's 97 tokens, got 96 in small"):
        make(runner, tmp_path / "texts", RECIPE, 100, name="random", wordnet=tmp_path, writer="small")


def test_the_models_own_prompts_differ(runner):
    maker = Maker(runner, Recipe(each=16, answer=1, own=1.0), topics())
    turns = [tuple(text.tokens[: text.answer].tolist()) for text in maker.shard(0)]
    assert len(set(turns)) > 6  # one beginning, and noise of their own
    assert turns == [tuple(text.tokens[: text.answer].tolist()) for text in maker.shard(0)]


def test_it_goes_on_where_it_was_killed(runner, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = make(runner, whole, RECIPE, 700, name="tiny", wordnet=tmp_path)
    expected = contents(whole)
    assert done >= 700 > done - len(load_file(shard_path(whole, len(expected) - 2))["tokens"]) and len(expected) > 3
    make(runner, killed, RECIPE, 1, name="tiny", wordnet=tmp_path)
    assert len(contents(killed)) == 2  # a shard and the settings
    (killed / "shard-00001.part").write_bytes(b"half of it")
    assert make(runner, killed, RECIPE, 700, name="tiny", wordnet=tmp_path) == done
    assert contents(killed) == expected
    shard_path(killed, 1).unlink()
    make(runner, killed, RECIPE, 1, name="tiny", wordnet=tmp_path)  # has enough, so nothing is made
    assert not shard_path(killed, 1).is_file()


def test_interrupted_in_a_shard(runner, tmp_path, monkeypatch):
    def load(source, device, dtype):
        assert dtype == torch.bfloat16
        return runner

    monkeypatch.setattr(data.pyspec, "load", load)
    monkeypatch.setattr(data, "Recipe", lambda **options: RECIPE if options else Recipe())

    def interrupt(self, number):
        raise KeyboardInterrupt

    monkeypatch.setattr(Maker, "shard", interrupt)
    with pytest.raises(SystemExit, match="interrupted; the same command goes on"):
        main(["--output", str(tmp_path), "--wordnet", str(tmp_path), "--dtype", "bfloat16"])
    assert list(contents(tmp_path)) == ["settings.json"]


def test_other_settings_are_refused(runner, tmp_path, capsys):
    make(runner, tmp_path, RECIPE, 1, name="tiny", wordnet=tmp_path / "none")
    assert "There is no WordNet in" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"settings.json must have answer 11 to go on, got 10"):
        make(runner, tmp_path, Recipe(each=6, answer=11), 1, name="tiny", wordnet=tmp_path)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert settings["taps"] == [2, 5] and settings["fingerprint"] == runner.fingerprint
    mute = runner.fork()
    mute.tokenizer = None
    with pytest.raises(ValueError, match="model must have a tokenizer"):
        make(mute, tmp_path / "other", RECIPE, 1, name="tiny", wordnet=tmp_path)
    assert not (tmp_path / "other").exists()


def test_bad_recipes_are_named():
    for name, value in (("each", 0), ("answer", 0), ("own", 1.5)):
        with pytest.raises(ValueError, match=rf"{name} must be in .*, got {value}"):
            Recipe(**{name: value})


def test_a_model_of_a_short_context(runner):
    short = runner.fork()
    short.context_length = 30
    for text in Maker(short, RECIPE, topics()).shard(0):
        assert text.answer <= 15 and len(text.tokens) <= 30


def test_a_model_without_chats_goes_on_from_code(runner, monkeypatch):
    monkeypatch.setattr(Characters, "chat_template", None)
    texts = Maker(runner, RECIPE, topics()).shard(0)
    prompts = [runner.tokenizer.decode(text.tokens[: text.answer].tolist()) for text in texts]
    assert any(prompt.startswith(runner.tokenizer.decode(runner.tokenizer.encode("def f"))) for prompt in prompts)
    assert any(text.tokens[0] == END for text in texts)  # its own begin where a text begins
