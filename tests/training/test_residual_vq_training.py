"""Training of codebooks: each step against its closed form, and a run on a model of two layers."""

import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("safetensors")
from pyspec import ResidualVqSettings, generate  # noqa: E402
from pyspec.caches import Codebooks  # noqa: E402
from pyspec.ops import residual_vq_decode, residual_vq_encode, rotary_of_blocks  # noqa: E402
from pyspec.ops.residual_vq import nearest, turn_keys  # noqa: E402
from tests.helpers.random_llama import random_llama  # noqa: E402
from training import residual_vq  # noqa: E402
from training.residual_vq import Quantiser, Reader, Recipe, documentation, main, train, vectors  # noqa: E402

RECIPE = Recipe(depth=3, length=64, rows=16, steps=3, iterations=2)
TEXTS = [[" ".join(f"word{(7 * i + j) % 31}" for j in range(90)) for i in range(9)], ["x = 1\n" * 60]]


class Characters:
    """A tokenizer for random_llama's 97 tokens."""

    fingerprint = "characters"

    def encode(self, text):
        return [ord(letter) % 97 for letter in text]

    def token_bytes(self, token):
        return bytes([token])


@pytest.fixture(scope="module")
def runner():
    runner = random_llama()
    runner.tokenizer = Characters()
    return runner


def clusters(count=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(300, 32, generator=generator)
    return centres[torch.randint(300, (count,), generator=generator)] + torch.randn(count, 32, generator=generator)


def started(x, depth=3):
    quantiser = Quantiser(torch.zeros(depth, 256, 65))
    quantiser.start(x, 3, torch.Generator().manual_seed(0))
    return quantiser


def test_a_step_is_its_closed_form():
    """Counts and sums decay by 0.99 towards the batch's, codewords are their quotient, counts smoothed by Laplace."""
    quantiser, x = started(clusters()), clusters(3000, 1)
    before = quantiser.state.clone().double().numpy()
    quantiser.step(x, 0.99, torch.Generator())
    left = x.double().numpy()
    for level in range(3):
        words, sums, counts = before[level, :, :32], before[level, :, 32:64], before[level, :, 64]
        codes = np.square(left[:, None] - words).sum(-1).argmin(-1)
        one_hot = np.eye(256)[codes]
        counts = 0.99 * counts + 0.01 * one_hot.sum(0)
        sums = 0.99 * sums + 0.01 * one_hot.T @ left
        smoothed = (counts + 1e-5) / (counts.sum() + 256e-5) * counts.sum()
        kept = counts > 0.02 * counts.mean()  # others move
        assert kept.mean() > 0.9
        for found, expected in (
            (quantiser.codewords[level], sums / smoothed[:, None]),
            (quantiser.sums[level], sums),
            (quantiser.counts[level], counts),
        ):
            np.testing.assert_allclose(found.double().numpy()[kept], expected[kept], rtol=2e-4, atol=2e-4)
        left = left - words[codes]


def test_k_means_finds_clusters_and_levels_help():
    x = clusters()
    generator = torch.Generator().manual_seed(1)
    random_words = x[torch.randperm(len(x), generator=generator)[:256]]
    by_chance = (x - random_words[nearest(x, random_words)]).square().mean()
    errors = started(x).step(x, 0.99, generator)
    assert errors[0] < 0.9 * by_chance and errors[2] < errors[1] < errors[0]


def test_codewords_that_nothing_is_near_move():
    x = clusters()
    quantiser = started(x)
    quantiser.codewords[0, :40] = 1e3
    quantiser.counts[0, :40] = 0
    quantiser.sums[0, :40] = 0
    quantiser.step(x, 0.99, torch.Generator().manual_seed(0))
    assert (quantiser.codewords[0, :40].abs() < 50).all() and (quantiser.counts[0, :40] > 1).all()
    used = nearest(x, quantiser.codewords[0]).unique()
    assert (used < 40).sum() > 30


def test_vectors_are_what_is_encoded():
    """Codes of an encoded block are the nearest codewords of these vectors."""
    k, v = torch.randn(2, 1, 2, 128, 64, generator=torch.Generator().manual_seed(3)).unbind(0)
    books = torch.randn(2, 1, 256, 32, generator=torch.Generator().manual_seed(4)).half()
    decoded = residual_vq_decode(residual_vq_encode(k, v, books), books, 64)
    x = vectors(torch.stack((k, v))[None])[0]
    again = vectors(torch.stack(decoded)[None] * 1.0)[0]
    assert x.shape == (2, 2 * 128 * 2, 32)
    for side in range(2):
        words = books[side, 0].float()
        chosen = words[nearest(x[side], words)]
        cosine = torch.nn.functional.cosine_similarity(chosen, again[side])
        assert (cosine > 0.999).float().mean() > 0.99


@pytest.mark.parametrize("keys", ["post-rope", "pre-rope"])
def test_a_run_learns_goes_on_and_is_used(runner, tmp_path, monkeypatch, keys):
    recipe = dataclasses.replace(RECIPE, keys=keys)
    whole = train(runner, tmp_path / "whole.safetensors", recipe, TEXTS)
    assert whole.keys == keys
    real = vectors
    calls = []

    def interrupted(keys_values):
        calls.append(1)
        if len(calls) == 4:  # in the second step
            raise KeyboardInterrupt
        return real(keys_values)

    monkeypatch.setattr(residual_vq, "vectors", interrupted)
    parts = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(runner, parts, recipe, TEXTS)
    with pytest.raises(ValueError, match="is of another recipe or model"):
        train(runner, parts, dataclasses.replace(recipe, decay=0.5), TEXTS)
    assert train(runner, parts, recipe, TEXTS) == whole
    assert Codebooks.load(parts) == Codebooks.load(tmp_path / "whole.safetensors") == whole
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.safetensors", "whole.safetensors"]

    prompt = Characters().encode(TEXTS[0][0])[:300]
    runner.prefill([prompt])
    k, v = runner._cache.keys_values[:, :, 0, :, :256].unbind(1)
    if keys == "pre-rope":
        k = turn_keys(k, rotary_of_blocks(whole.frequencies, 2), back=True)
    before = 1.0
    for depth in (1, 2, 3):
        books = whole.tables[:, :, :depth]
        found, _ = residual_vq_decode(residual_vq_encode(k, v, books), books, 64)
        error = float((found - k).norm() / k.norm())
        assert error < before
        before = error
    cache = ResidualVqSettings(whole)
    plain = generate(runner, prompt, drafter=None, max_new_tokens=20, cache=cache)
    assert generate(runner, prompt, budget=6, max_new_tokens=20, cache=cache).tokens == plain.tokens


def test_rows_hang_on_the_step_alone():
    reader = Reader(Characters(), TEXTS, RECIPE)
    assert reader.rows(3) == reader.rows(3) != reader.rows(4)
    assert [len(row) for row in reader.rows(0)] == [RECIPE.length] * RECIPE.rows


def test_what_does_not_fit_is_refused(runner, tmp_path):
    with pytest.raises(ValueError, match="a step must have 2048 vectors or more, got 256: use more rows"):
        train(runner, tmp_path / "x", dataclasses.replace(RECIPE, rows=1), TEXTS)
    with pytest.raises(ValueError, match="codes must be one of"):
        train(runner, tmp_path / "x", dataclasses.replace(RECIPE, codes=300), TEXTS)
    with pytest.raises(ValueError, match="keys must be one of post-rope, pre-rope, got 'rope'"):
        dataclasses.replace(RECIPE, keys="rope")
    assert not list(tmp_path.iterdir())


def test_the_documentation_leaves_out_what_is_measured():
    from pydoc_data.topics import topics

    pages = documentation()
    assert len(pages) == len(topics) - 8 and max(map(len, pages)) <= min(map(len, set(topics.values()) - set(pages)))


def test_the_command_line_names_its_settings(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--depth" in capsys.readouterr().out
