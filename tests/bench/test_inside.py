"""What benchmarks do to a runner beyond its calls has the values of those calls."""

import torch
from inside import attend_step, seconds_in_ops, seconds_of_recording

from pyspec import DraftTree
from pyspec.generate import generate
from pyspec.ops import tree_attention
from tests.helpers.random_llama import random_llama

PROMPT = [1, 5, 9, 3, 7]


def full(layer, q, k, v):
    bits, lengths = torch.ones(1, 1, 1, dtype=torch.int32), torch.tensor([k.shape[1] - 1], dtype=torch.int32)
    return tree_attention(q[None, :, None], k[None], v[None], bits, lengths)[0, :, 0]


def test_a_step_with_full_attention_is_the_runners_own():
    model = random_llama()
    (expected,) = model.prefill([[*PROMPT, 11]])
    model.prefill([PROMPT])
    assert torch.equal(attend_step(model, 11, len(PROMPT), full), expected)
    none = attend_step(model, 11, len(PROMPT), lambda layer, q, k, v: torch.zeros_like(q))
    assert not torch.equal(none, expected)


def test_the_cache_of_the_batch_is_public():
    model = random_llama()
    assert model.cache is None
    model.prefill([PROMPT])
    assert model.cache.lengths == [len(PROMPT)]


def test_seconds_in_ops_are_part_of_decoding():
    model = random_llama()
    with seconds_in_ops() as inside:
        assert inside() == 0
        stats = generate(model, PROMPT, drafter=None, max_new_tokens=8).stats
        assert 0 < inside() < stats.prefill_seconds + stats.decode_seconds
    before = inside()
    generate(model, PROMPT, drafter=None, max_new_tokens=2)
    assert inside() == before


def test_what_is_recorded_again_gives_the_same():
    model, tree = random_llama(), DraftTree([1, 2, 3], [-1, 0, 0])
    model.prefill([PROMPT])
    expected = model.verify({0: tree})[0].logits.clone()
    before = dict(model._replays._replays)
    assert seconds_of_recording(model, tree) > 0
    assert before.keys() == model._replays._replays.keys() and before != model._replays._replays
    assert torch.equal(model.verify({0: tree})[0].logits, expected)
