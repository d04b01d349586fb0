"""The training of EAGLE-3 heads on a target of a few thousand parameters: its head is the one that drafts."""

import dataclasses

import numpy as np
import pytest
import torch

from pyspec import generate
from pyspec.drafters.eagle3 import Eagle3
from tests.drafters.heads.test_eagle3 import said
from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.runner_checks import observed_taps
from training import eagle3
from training.command import train
from training.data_files import Batch
from training.drafts import Recipe, Target, chains_of

TAPS = (2, 3, 5)
RECIPE = Recipe(steps=24, tokens=120, vocabulary=40, warmup=4, learning_rate=1e-2, every=8)


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"), target, (*TAPS, 6))


def vocabulary(data):
    return np.sort(np.argsort(-np.bincount(data.tokens(), minlength=97))[:40])


def a_head(target, norm_before_residual):
    head = eagle3.Eagle3(Target(target, torch.arange(0, 80, 2)), TAPS, norm_before_residual)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in head.parameters():
            values.add_(0.05 * torch.randn(values.shape, generator=generator))
            values.copy_(values.bfloat16())
    return head


@torch.inference_mode()
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_it_guesses_as_the_drafter_does(target, tmp_path, norm_before_residual):
    head = a_head(target, norm_before_residual)
    head.write(tmp_path, "demo")
    drafter = Eagle3(tmp_path, target, weights=torch.float32)
    texts = [[token // 3 * 2 for token in random_tokens(length, length)] for length in (9, 30, 2)]
    features = observed_taps(target, texts, (*TAPS, 6))
    lengths = [len(text) for text in texts]
    batch = Batch(
        torch.tensor(sum(texts, [])),
        torch.cat(features),
        torch.ones(sum(lengths), dtype=torch.bool),
        torch.cat([torch.arange(length) for length in lengths]),
        torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)),
    )
    chains = chains_of(batch)[1].nonzero()[:, 0]
    found = {}
    for depth, (kept, rows) in enumerate(head.guesses(batch, chains, 4, 1.0, 0.0)):
        found |= {(depth, chain): head.logits(row) for chain, row in zip(kept.tolist(), rows, strict=True)}
    for row in (0, 7, 20):
        text, guesses = texts[1][: row + 2], texts[1][row + 2 : row + 5]
        expected = said(drafter, target, text, [guess // 2 for guess in guesses])
        assert expected.max() > 0.05
        for depth, law in enumerate(expected):
            torch.testing.assert_close(found[depth, 9 + row].softmax(-1), law.float(), atol=1e-6, rtol=1e-4)


def test_it_learns_goes_on_where_it_was_and_drafts(target, data, tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", data, RECIPE, target, eagle3.Eagle3, vocabulary)
    real, calls = Recipe.rate, []

    def interrupted(recipe, step):
        calls.append(step)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(recipe, step)

    monkeypatch.setattr(Recipe, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", data, RECIPE, target, eagle3.Eagle3, vocabulary)
    train(tmp_path / "parts", data, RECIPE, target, eagle3.Eagle3, vocabulary)
    assert calls[13:15] == [13, 8]
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    (_, first, _), *_, (_, last, shares) = whole.curve
    assert last < 0.9 * first and len(shares) == 4
    with pytest.raises(ValueError, match="was trained by another recipe"):
        train(tmp_path / "parts", data, dataclasses.replace(RECIPE, noise=0.0), target, eagle3.Eagle3, vocabulary)
    prompt = random_tokens(4, 2)
    plain = generate(target, prompt, drafter=None, max_new_tokens=30)
    drafted = generate(target, prompt, drafter=Eagle3(tmp_path / "whole", target), budget=6, max_new_tokens=30)
    assert drafted.tokens == plain.tokens
