"""Every named drafter over a real runner gives the bits of plain decoding."""

from types import SimpleNamespace

import pytest
import torch

from pyspec.drafters import DRAFTERS, new_drafter
from pyspec.generate import generate
from tests.helpers.random_llama import random_llama, random_tokens

PROMPTS = [random_tokens(12) * 3, random_tokens(40, 1), random_tokens(5, 2)]


@pytest.mark.parametrize("name", sorted(set(DRAFTERS) - {"layer_skip", "mtp"}))  # which have tests of their own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_the_plain_text_bit_for_bit(name, dtype):
    model = random_llama(dtype=dtype)
    drafter = new_drafter(name, model)
    for settings in ({}, dict(temperature=0.8, seed=5), dict(temperature=0.8, seed=5, top_k=9, top_p=0.9)):
        plain = generate(model, PROMPTS, drafter=None, max_new_tokens=40, **settings)
        for budget in (1, 16):  # the second time from fuller tables
            said = generate(model, PROMPTS, drafter=drafter, budget=budget, max_new_tokens=40, **settings)
            assert said.tokens == plain.tokens
    assert said.stats.mean_accepted_length > 1


def test_what_is_known_of_a_name_before_there_is_a_drafter():
    """An engine of others has a vocabulary and a fingerprint alone; what learns can be saved, others have nothing."""
    engine = SimpleNamespace(vocab_size=9, fingerprint="another engine's")
    needs_model = {name for name, drafter in DRAFTERS.items() if not drafter.fits(engine)}
    prepared = {name for name, drafter in DRAFTERS.items() if drafter.prepare is not None}
    assert prepared == {"layer_skip", "ngrammys"} and needs_model == prepared | {"mtp"}
    for name in set(DRAFTERS) - needs_model:
        has_learned = any(table.layout() for table in new_drafter(name, engine).tables)
        assert has_learned == DRAFTERS[name].learns == (name != "lookup")
