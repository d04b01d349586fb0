"""The Llama runner over codes: plain decoding's bits, generate's texts, and the demo model with its own codebooks."""

import pytest
import torch
from random_llama import random_llama, random_tokens, random_tree, root_path

from pyspec import DraftTree, ResidualVqCache, generate, load
from pyspec.caches import Codebooks
from pyspec.caches.codebooks import DEMO_FILE


@pytest.fixture(scope="module")
def runner():
    return random_llama(dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=["post-rope", "pre-rope"])
def cache(runner, request):
    words = torch.randn(2, 2, 8, 256, 32, generator=torch.Generator().manual_seed(0))
    words *= 0.8 * 0.8 ** torch.arange(8)[:, None, None]
    frequencies = runner.config.rope_frequencies() if request.param == "pre-rope" else None
    return ResidualVqCache(Codebooks(words.half(), 2, 64, runner.fingerprint, frequencies))


def test_logits_are_near_those_of_the_dense_cache(runner, cache):
    prompt, tree = random_tokens(400), random_tree(20)
    runner.prefill([prompt])
    (expected,) = runner.verify([tree])
    runner.prefill([prompt], cache=cache)
    (found,) = runner.verify([tree])
    assert not torch.equal(found, expected)
    assert (found - expected).abs().mean() < 1.2 * expected.std()


@pytest.mark.parametrize("length", [190, 319])
def test_a_node_has_the_bits_of_plain_decoding(runner, cache, length):
    prompt, tree = random_tokens(length), random_tree(24)
    runner.prefill([prompt], cache=cache)
    (logits,) = runner.verify([tree])
    for node in (3, 23):
        runner.prefill([prompt], cache=cache)
        for step in root_path(tree, node):
            (alone,) = runner.verify([DraftTree.chain([int(tree.tokens[step])])])
            runner.commit([[0]])
        assert torch.equal(alone[0], logits[node])
    runner.prefill([random_tokens(7, 1), prompt], cache=cache)
    assert torch.equal(runner.verify([random_tree(9), tree])[1], logits)


@pytest.mark.parametrize("drafter", ["lookup", "merged"])
def test_greedy_text_is_that_of_plain_decoding(runner, cache, drafter):
    prompts = [random_tokens(20) * 9, random_tokens(11, 3) * 20]
    settings = dict(max_new_tokens=60, cache=cache)
    plain = generate(runner, prompts, drafter=None, **settings)
    result = generate(runner, prompts, drafter=drafter, budget=16, **settings)
    assert result.tokens == plain.tokens and result.stats.mean_accepted_length > 1.05


def test_codebooks_of_another_model_are_refused(runner, cache):
    other = random_llama(context=2000)
    with pytest.raises(ValueError, match="codebooks must be those of llama-.* got codebooks of llama-"):
        generate(other, random_tokens(9), cache=cache)


def test_demo_model():
    if not DEMO_FILE.is_file():
        pytest.skip("the demo model's codebooks are not there")
    try:
        runner = load("demo", device="cpu")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    text = "The list of the first prime numbers is 2, 3, 5, 7, 11. Once more: the list of the first prime numbers is "
    tokens = runner.tokenizer.encode(text * 9)
    plain = generate(runner, tokens, drafter=None, max_new_tokens=16, cache="rvq")
    assert generate(runner, tokens, max_new_tokens=16, budget=8, cache="rvq").tokens == plain.tokens
    assert "2, 3, 5, 7, 11" in plain.text
