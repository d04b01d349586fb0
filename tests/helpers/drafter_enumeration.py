"""The law of a text that a drafter with a model's own laws begins, by every outcome of each of its draws."""

import torch

from pyspec import DraftTree
from pyspec.drafters import eagle3
from tests.acceptance.test_rules import RULES
from tests.helpers.enumeration import outcomes, target_law, text_law, total_variation


def reading(drafter, target, prompt):
    """A drafter that has read a prompt but its last token, which the target has not read yet."""
    reader = drafter.start(prompt[:-1])

    def observe(slot, chain, verified):
        reader.observe(chain, verified, range(len(chain)))

    target.prefill([prompt[:-1]], taps=drafter.taps, observe=observe)
    return reader


class TextsOfTarget:
    """What a target says behind a prompt and some tokens, as tests.helpers.enumeration.Laws."""

    def __init__(self, target, prompt):
        self.vocab_size, self._target, self._root, self._rows = target.vocab_size, target, prompt[-1], {}

    def p(self, text):
        if text not in self._rows:  # with all its siblings and their children, in one call
            *above, _ = text or (0,)
            chain = [self._root, *above]
            tokens = [*chain, *range(self.vocab_size)] if text else chain
            parents = [*range(-1, len(chain) - 1), *[len(chain) - 1] * (len(tokens) - len(chain))]
            verified = self._target.verify({0: DraftTree(tokens, parents)})[0]
            laws = verified.logits.double().softmax(-1).numpy()
            if text:
                self._rows |= {(*above, token): laws[len(chain) + token] for token in range(self.vocab_size)}
            else:
                self._rows[()] = laws[0]
        return self._rows[text]


@torch.inference_mode()
def check_drawn_law(monkeypatch, drafter, target, prompt, rule, budget=4, length=3):
    """Asserts that a round of a drafter that draws leaves the law of the text what the target's is.

    Args:
        drafter: of trees with less than `length` levels below the root, and of few tokens.
        rule: of RULES.
    """
    reader, laws = reading(drafter, target, prompt), TextsOfTarget(target, prompt)
    real = eagle3.Noise

    def propose(noise):
        class Scripted:
            DRAFTS = real.DRAFTS

            def __new__(cls, *key):
                return noise

        with monkeypatch.context() as patch:
            patch.setattr(eagle3, "Noise", Scripted)
            return reader.propose(prompt, budget)

    trees = list(outcomes(propose))
    assert len(trees) > 10 and abs(sum(chance for _, chance in trees) - 1) < 1e-9
    emitted, accepted = text_law(trees, RULES[rule], laws, length)
    assert total_variation(emitted, target_law(laws, length)) < 1e-6
    assert 0 < accepted < length
