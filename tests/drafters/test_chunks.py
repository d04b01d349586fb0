"""Chunks by hidden state: found where they should be, exact as drafts, and unverified only where asked for."""

import numpy as np
import pytest
import torch

import pyspec
from pyspec import DraftTree, generate
from pyspec.acceptance.unverified import UnverifiedAcceptance
from pyspec.drafters.chunks import ChunkDrafter, ChunkStore, store_of
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import InvalidLogits, Sampler
from tests.helpers.random_llama import random_llama, random_tokens
from training.chunks import chunks_of, main, sure_runs


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def text(model):
    """A prompt and what the model goes on with, long enough to repeat itself."""
    prompt = random_tokens(12)
    return prompt, generate(model, prompt, drafter=None, max_new_tokens=60).tokens


def made(states_and_chunks, fingerprint="fake"):
    return store_of(states_and_chunks, fingerprint)


class Target:
    layers, fingerprint = 3, "fake"


def proposed(store, state, token, threshold, budget=9):
    drafter = ChunkDrafter(store, Target(), threshold=threshold).start([1])
    rows = Verified(torch.zeros(1, 8), taps=torch.tensor(state)[None, None].float())
    drafter.observe(DraftTree.chain([1]), rows, [0])
    tree = drafter.propose([1, token], budget)
    return tree.tokens.tolist(), tree.parents.tolist()


def test_the_nearest_chunks_of_the_token_are_drafted_as_one_tree():
    store = made(
        {
            4: [(np.array([1.0, 0.0]), [5, 6]), (np.array([3.0, 4.0]), [5, 7, 2]), (np.array([0.0, -1.0]), [3])],
            2: [(np.array([1.0, 0.0]), [1])],
        }
    )
    assert proposed(store, [2.0, 0.0], 4, 0.5) == ([4, 5, 6, 7, 2], [-1, 0, 1, 1, 3])  # cosines 1, 0.6 and 0
    assert proposed(store, [2.0, 0.0], 4, 0.7) == ([4, 5, 6], [-1, 0, 1])
    assert proposed(store, [0.0, 1.0], 4, 0.7) == ([4, 5, 7, 2], [-1, 0, 1, 2])
    assert proposed(store, [2.0, 0.0], 4, 0.5, budget=3) == ([4, 5, 6], [-1, 0, 1])
    assert proposed(store, [-1.0, 0.0], 4, 0.5) == ([4], [-1])
    assert proposed(store, [1.0, 0.0], 3, 0.5) == ([3], [-1])


def test_runs_that_the_model_is_sure_of():
    assert sure_runs([0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.9, 0.2, 0.9], 0.5) == [(1, 3), (4, 7)]
    assert sure_runs([0.9] * 20, 0.5) == [(1, 17), (17, 20)] and sure_runs([0.1] * 4, 0.5) == sure_runs([], 0.5) == []


def test_the_store_is_of_states_and_runs(model, text):
    prompt, said = text
    whole = [*prompt, *said]
    store = chunks_of(model, [whole], least=0.2)
    rows = []
    model.prefill([whole], observe=lambda slot, chain, verified: rows.append(verified), taps=(model.layers + 1,))
    states = torch.cat([each.taps[:, 0] for each in rows]).numpy()
    chances = torch.cat([each.logits for each in rows]).softmax(1)
    assert len(store.tokens) > 3
    for place, token in enumerate(store.tokens):
        chunk = store.chunks[store.starts[place] : store.starts[place + 1]].tolist()
        likeness = states @ store.keys[place].astype(np.float32) / np.linalg.norm(states, axis=1)
        at = int(likeness.argmax())  # the state that predicted the token before the chunk
        assert likeness[at] > 0.999 and whole[at + 1 : at + 2 + len(chunk)] == [token, *chunk]
        assert all(chances[at + 1 + step, each] > 0.2 for step, each in enumerate(chunk))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_as_drafts_they_change_nothing(model, text, temperature):
    prompt, said = text
    drafter = ChunkDrafter(chunks_of(model, [[*prompt, *said]], least=0.2), model)
    settings = dict(max_new_tokens=60, temperature=temperature, seed=3)
    drafted = generate(model, prompt, drafter=drafter, budget=12, **settings)
    assert drafted.tokens == generate(model, prompt, drafter=None, **settings).tokens
    assert temperature or drafted.stats.mean_accepted_length > 1.2  # it has read this very text


def test_unverified_they_are_the_text():
    tree = DraftTree([0, 3, 4, 5, 6], [-1, 0, 0, 1, 3])
    rows = Verified(torch.eye(8)[[1, 1, 1, 1, 2]] * 9)
    assert UnverifiedAcceptance().accept(tree, rows, Sampler(), 0) == ([0, 1, 3, 4], 2)
    assert UnverifiedAcceptance().law == "heuristic"
    rows.logits[4] = torch.nan
    with pytest.raises(InvalidLogits, match="NaN") as error:
        UnverifiedAcceptance().accept(tree, rows, Sampler(), 0)
    assert error.value.path == [0, 1, 3, 4]


def test_unverified_by_name(model, text):
    prompt, _ = text
    state = {token: [(np.ones(96), [7, 8, 9])] for token in range(97)}
    drafter = ChunkDrafter(store_of(state, model.fingerprint), model, threshold=-1)
    said = generate(model, prompt, drafter=drafter, budget=8, acceptance="unverified", max_new_tokens=9).tokens
    assert said[1:4] == said[5:8] == [7, 8, 9]


def test_the_command_writes_what_is_read(model, tmp_path, monkeypatch, capsys):
    class Letters:
        def encode(self, text):
            return [ord(letter) % 97 for letter in text]

    fork = model.fork()
    fork.tokenizer = Letters()
    monkeypatch.setattr(pyspec, "load", lambda source: fork)
    (tmp_path / "text").write_text("one two three " * 9)
    main([str(tmp_path / "text"), "--least", "0.001", "--output", str(tmp_path / "chunks.npz")])
    assert "126 tokens" in capsys.readouterr().out
    store = ChunkStore.load(tmp_path / "chunks.npz")
    assert len(store.tokens) and store.fingerprint == model.fingerprint
    assert ChunkDrafter(tmp_path / "chunks.npz", model).taps == (model.layers + 1,)


def test_what_does_not_fit_is_refused(model, tmp_path):
    store = made({1: [(np.ones(2), [3])]})
    (tmp_path / "text").write_text("no arrays")
    broken = store._replace(starts=np.array([0, 2]))
    for make, message in (
        (lambda: ChunkDrafter(store, model), "store must be of the target"),
        (lambda: ChunkDrafter(store, Target(), threshold=1.5), "threshold must be in"),
        (lambda: ChunkDrafter(store, object()), "target must be a runner with taps"),
        (lambda: ChunkDrafter(broken, Target()), "store must hold chunks"),
        (lambda: ChunkDrafter(tmp_path / "text", Target()), "is no file of"),
        (lambda: chunks_of(model, [[1, 2]], least=1.0), "least must be in"),
        (lambda: store_of({}, "fake"), "at least one chunk"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(FileNotFoundError):
        ChunkDrafter(tmp_path / "nothing.npz", Target())
