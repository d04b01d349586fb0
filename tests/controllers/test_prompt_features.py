"""Features of prompts: the same whatever parts a prompt is read in, and left alone by what follows it."""

import numpy as np
import pytest
import torch

from pyspec.controllers.prompt_features import NAMES, PromptFeatures
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import FakeRunner

PROMPT = list(b"the tree and the tree")


def of_parts(parts, model=None):
    model = FakeRunner() if model is None else model
    features, start = PromptFeatures(PROMPT), 0
    for end in (*parts, len(PROMPT)):
        rows = torch.stack([model.logits(PROMPT[: place + 1]) for place in range(start, end)])
        features.observe(DraftTree.chain(PROMPT[start:end]), Verified(rows))
        start = end
    return features


def test_parts_of_a_prompt_give_the_features_of_all_of_it():
    whole, parts = of_parts([]).values(), of_parts([5, 9]).values()
    assert whole.shape == (len(NAMES),) and np.isfinite(whole).all()
    right = NAMES.index("right")
    assert np.delete(parts, right) == pytest.approx(np.delete(whole, right), rel=1e-6)


def test_what_follows_the_prompt_and_a_cached_beginning_do_no_harm():
    model, features = FakeRunner(), of_parts([])
    before = features.values()
    features.observe(DraftTree.chain([1, 2]), Verified(model.logits([1])[None].expand(2, -1)))
    assert (features.values() == before).all()
    cached = PromptFeatures(PROMPT)
    rows = model.logits(PROMPT)[None]
    cached.observe(DraftTree.chain(PROMPT[-1:]), Verified(rows))
    assert cached.values()[-2:] == pytest.approx(before[-2:])
    assert PromptFeatures(PROMPT).values()[1:5].tolist() == [0.0] * 4


def test_repeated_tokens_are_counted():
    found = dict(zip(NAMES, PromptFeatures([1, 2, 3, 1, 2, 3, 1, 2]).values(), strict=True))
    assert found["repeated_1"] == pytest.approx(4 / 7)
    assert found["repeated_2"] == pytest.approx(3 / 6) and found["repeated_3"] == pytest.approx(2 / 5)
