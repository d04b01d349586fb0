import math

import pytest
import torch

from pyspec.generate import generate
from pyspec.sampling.logprobs import token_logprobs
from tests.helpers.fake_drafters import Oracle, RandomTrees
from tests.helpers.fake_runner import FakeRunner, ScriptedRunner

PROMPT = list(b"once upon a time")


def test_a_token_and_the_likeliest():
    logits = torch.tensor([0.0, 2.0, -math.inf, 2.0, 1.0])
    law = logits.double().log_softmax(0).tolist()
    found = token_logprobs(logits, 4, 3)
    assert list(found.top) == [1, 3, 4]
    assert found.logprob == pytest.approx(law[4], abs=1e-12)
    assert found.top == pytest.approx({token: law[token] for token in (1, 3, 4)}, abs=1e-12)
    assert token_logprobs(logits, 2, 0) == (-math.inf, {})
    assert len(token_logprobs(logits, 0, 100).top) == 5


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 3, "min_p": 0.1, "repetition_penalty": 1.3}])
def test_they_are_of_the_models_own_law_with_speculation_and_without(settings):
    model = FakeRunner()
    plain = generate(model, PROMPT, drafter=None, max_new_tokens=40, logprobs=4, **settings)
    for place, (token, told) in enumerate(zip(plain.tokens, plain.logprobs, strict=True)):
        law = model.logits(PROMPT + plain.tokens[:place]).double().log_softmax(0)
        assert told.logprob == pytest.approx(float(law[token]), abs=1e-9)
        assert list(told.top.values()) == pytest.approx(law.topk(4).values.tolist(), abs=1e-9)
    for drafter in (Oracle(model), RandomTrees()):
        result = generate(FakeRunner(), PROMPT, drafter=drafter, budget=9, max_new_tokens=40, logprobs=4, **settings)
        assert result.logprobs == plain.logprobs
    batch = generate(FakeRunner(), [PROMPT, [97]], drafter=None, max_new_tokens=40, logprobs=4, **settings)
    assert batch.logprobs[0] == plain.logprobs and len(batch.logprobs[1]) == 40


def test_there_are_as_many_as_tokens_where_a_text_ends_inside_of_a_round():
    model = ScriptedRunner(b"abcabcabcabc", tokenizer=True)
    result = generate(model, [1], drafter=Oracle(model), budget=8, max_new_tokens=50, stop="bcab", logprobs=0)
    assert len(result.logprobs) == len(result.tokens) < 13 and result.finish_reason == "stop"


def test_none_are_kept_unasked():
    assert generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=3).logprobs is None


@pytest.mark.parametrize("wrong, error", [(-1, ValueError), (101, ValueError), ("5", TypeError), (True, TypeError)])
def test_a_number_out_of_range_is_refused(wrong, error):
    with pytest.raises(error, match="logprobs must be"):
        generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=3, logprobs=wrong)
