"""AdaDec: the text of its definition, token by token, whatever was looked at on the way."""

import math

import pytest
import torch

from pyspec import adadec, branches, generate
from tests.helpers.fake_runner import EOS, FakeRunner
from tests.helpers.random_llama import random_llama, random_tokens

PROMPT = list(b"once upon")


class Ending(FakeRunner):
    def logits(self, context):
        logits = super().logits(context)
        logits[EOS] = 1.0 if sum(context[-3:]) % 7 == 0 else -60.0
        return logits


def defined(law, prompt, ends, threshold, choices, depth, count):
    """The text without a tree."""
    context = list(prompt)
    for _ in range(count):
        logprobs = law(context)
        order = torch.argsort(-logprobs, stable=True).tolist()
        token = order[0]
        if -float((logprobs.exp() * logprobs.clamp_min(-1e30)).sum()) >= threshold:
            scores = []
            for first in order[:choices]:
                path, total = [first], float(logprobs[first])
                while len(path) <= depth and path[-1] not in ends:
                    ahead = law([*context, *path])
                    path.append(int(ahead.argmax()))
                    total += float(ahead.max())
                scores.append(total / len(path))
            token = order[scores.index(max(scores))]
        context.append(token)
        if token in ends:
            break
    return context[len(prompt) :]


@pytest.mark.parametrize("threshold, choices, depth", [(0.0, 3, 5), (0.9, 3, 5), (1.2, 2, 1), (0.5, 8, 3)])
def test_the_text_is_the_one_of_the_definition(threshold, choices, depth):
    rows = {}

    def law(context):
        return rows.setdefault(tuple(context), Ending().logits(list(context)).double().log_softmax(0))

    expected = defined(law, PROMPT, {EOS}, threshold, choices, depth, 70)
    found = adadec(Ending(), PROMPT, threshold=threshold, choices=choices, depth=depth, max_new_tokens=70)
    assert found.tokens == expected and found.finish_reason == ("eos" if expected[-1] == EOS else "length")
    assert found.tokens != generate(Ending(), PROMPT, drafter=None, max_new_tokens=70).tokens
    assert found.stats.new_tokens == len(expected) == sum(found.stats.accepted_lengths)


def test_over_a_real_cache_too(monkeypatch):
    monkeypatch.setattr(branches, "FEW_NODES", 20)
    model = random_llama()
    plain, prompt = model.fork(), random_tokens(7)

    def law(context):
        return plain.prefill([context])[0].double().log_softmax(0)

    found = adadec(model, prompt, threshold=1.0, max_new_tokens=30)
    assert found.tokens == defined(law, prompt, set(), 1.0, 3, 5, 30)


def test_a_threshold_that_is_never_reached_is_greedy():
    model = FakeRunner()
    found = adadec(model, PROMPT, threshold=math.inf, max_new_tokens=90)
    assert found.tokens == generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=90).tokens
    assert model.verified == 90  # a prompt's last token, and all new ones but the last


def test_what_was_looked_at_is_not_computed_again():
    model = FakeRunner()
    found = adadec(model, PROMPT, threshold=0.0, max_new_tokens=40)
    assert found.stats.rounds == model.verified and found.stats.nodes < 40 * 3 * 5


def test_stop_and_stream_are_those_of_generate():
    said = []
    whole = adadec(FakeRunner(), PROMPT, max_new_tokens=40).text
    cut = adadec(FakeRunner(), PROMPT, max_new_tokens=40, stop=whole[10:13], stream=said.append)
    assert cut.finish_reason == "stop" and cut.text == "".join(said) == whole[: whole.index(whole[10:13])]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(threshold=-1), "threshold must be"),
        (dict(threshold=math.nan), "threshold must be"),
        (dict(choices=0), "choices must be"),
        (dict(choices=9), "choices must be"),
        (dict(depth=0), "depth must be"),
        (dict(tokens=[97]), "tokens must be at least 2"),
    ],
)
def test_what_does_not_fit_is_refused(settings, message):
    model = FakeRunner()
    with pytest.raises(ValueError, match=message):
        adadec(model, **{"tokens": PROMPT} | settings)
    assert not model.verified
