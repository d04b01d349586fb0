"""EAGLE-3 heads say what their paper's computation says, in every layout, and never change the text."""

from itertools import product

import pytest
import torch

from pyspec.drafters.eagle3 import Eagle3, _Laws
from pyspec.sampling.sampler import Sampler
from tests.helpers.eagle3_heads import FLAGS, random_head, steps, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens
from tests.helpers.runner_checks import observed_taps

TAPS = (2, 3, 5)
COMBINATIONS = [
    dict(zip(FLAGS, flags, strict=True)) for flags in product((False, True), repeat=4) if not (flags[1] and flags[2])
]
KINDS = [("llama", "speculators"), ("qwen3", "speculators"), ("llama", "flat"), ("llama", "nemo")]


def name_of(flags):
    return "-".join(name for name, on in flags.items() if on) or "none"


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


def said(drafter, target, prompt, guesses):
    """[1 + len(guesses), draft] of the head's laws along a chain of its own tokens below a text."""
    reader = drafter.start(prompt[:-1])

    def observe(slot, chain, verified):
        reader.observe(chain, verified, range(len(chain)))

    target.prefill([prompt[:-1]], taps=drafter.taps, observe=observe)
    laws = _Laws(reader._batch, reader._sequence, prompt, Sampler(1.0))
    found, tokens, parents = [], [0], [-1]
    for guess in [*guesses, 0]:
        found.append(laws.laws(tokens, parents, [len(tokens) - 1])[0])
        parents.append(len(tokens) - 1)
        tokens.append(guess)
    return torch.stack([torch.from_numpy(law) for law in found])


@torch.inference_mode()
@pytest.mark.parametrize("kind, layout", KINDS)
@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_laws_are_those_of_the_paper(target, tmp_path, kind, layout, flags):
    shape = {"kind": kind, "biases": layout == "nemo", "layers": 1 + (layout == "flat")}
    tensors = random_head(VOCABULARY, target.hidden_size, **shape, **flags)
    folder = write_head(tmp_path, tensors, VOCABULARY, kind=kind, layout=layout, taps=TAPS, **flags)
    drafter = Eagle3(folder, target, weights=torch.float32)
    prompt, guesses = random_tokens(40), [3, 17, 3]
    (taps,) = observed_taps(target, [prompt[:-1]], TAPS)
    of_target = drafter.head.target_tokens(torch.tensor(guesses).numpy()).tolist()
    expected = steps(tensors, taps, prompt[1:], of_target, flags).softmax(-1)
    found = said(drafter, target, prompt, guesses)
    assert expected.max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
