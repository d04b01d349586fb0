"""Real runners as drafters: the target's twin must guess everything, or its state does not follow the text."""

import gc
import weakref

import pytest
import torch

from pyspec.drafters import drafter_from_name
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes.dyspec import DySpecThreshold
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.generate import generate
from tests.helpers.random_llama import random_llama, random_tokens

PROMPTS = [random_tokens(140), random_tokens(7, 1), random_tokens(30, 2)]


@pytest.mark.parametrize("acceptance", ["recursive", "k_seq", "block", "traversal"])
@pytest.mark.parametrize("settings", [dict(temperature=1.0), dict(temperature=0.7, top_k=20, top_p=0.9)])
def test_a_twin_is_always_right(settings, acceptance):
    model = random_llama(dtype=torch.bfloat16, windows=(9, None))
    drafter = ModelDrafter(
        random_llama(dtype=torch.bfloat16, windows=(9, None)), model, FixedBranching((1,) * 5), **settings
    )
    generation = generate(
        model, PROMPTS, drafter=drafter, acceptance=acceptance, budget=6, max_new_tokens=31, seed=3, **settings
    )
    # one token of the prefill, then 5 rounds of 5 drafts and a token of the target
    assert generation.stats.accepted_lengths == [0] * 6 + [15]
    assert generation.finish_reason == ["length"] * 3


@pytest.mark.parametrize("growth", [None, DySpecThreshold(0.02), FixedBranching((3, 2), "with replacement")])
def test_greedy_text_is_the_plain_one_bit_for_bit(growth):
    model = random_llama(dtype=torch.bfloat16)
    drafter = ModelDrafter(random_llama(windows=(60, None)), model, growth, temperature=0.3)
    plain = generate(model, PROMPTS, drafter=None, max_new_tokens=40)
    acceptance = "exact" if growth is None else "traversal"
    said = generate(model, PROMPTS, drafter=drafter, acceptance=acceptance, budget=9, max_new_tokens=40)
    assert said.tokens == plain.tokens and said.stats.mean_accepted_length > 1.2


def test_models_that_drafted_can_be_forgotten():
    """No table of drafters or of whose state is whose may hold a model: it is gigabytes."""
    model, draft = random_llama(), random_llama()
    generate(model, [1, 2, 3], drafter=ModelDrafter(draft, model), budget=4, max_new_tokens=8)
    drafter_from_name("merged", model)
    found = weakref.ref(model), weakref.ref(draft)
    del model, draft
    gc.collect()
    assert [reference() for reference in found] == [None, None]
