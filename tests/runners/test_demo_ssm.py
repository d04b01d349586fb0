"""The state space demo model: the text of transformers, and of plain decoding."""

from pathlib import Path

import pytest
import torch

from pyspec import generate, load
from tests.helpers.tiny_mambas import step_by_step

FOLDER = Path(__file__).parents[2] / "models/demo-ssm"
PROMPTS = ("def read_lines(", "class Queue:\n    def __init__(self", "import os\nimport sys\n")


@pytest.fixture(scope="module")
def runner():
    return load(str(FOLDER), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(runner, prompt):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    tokens = runner.tokenizer.encode(prompt)
    expected = step_by_step(model, tokens, 48)
    for token, logits in zip(generate(runner, tokens, max_new_tokens=48).tokens, expected, strict=False):
        best = logits.topk(2).values
        if token != int(logits.argmax()):
            assert best[0] - best[1] < 1e-4
            break


def test_drafts_are_accepted_and_change_nothing(runner):
    """Sampled, so that a small model does not write in circles, which are easy to draft."""
    accepted = []
    for seed, prompt in enumerate(PROMPTS):
        tokens, settings = runner.tokenizer.encode(prompt), {"temperature": 0.8, "seed": seed, "max_new_tokens": 200}
        plain = generate(runner, tokens, drafter=None, **settings)
        result = generate(runner, tokens, drafter="merged", budget=8, **settings)
        assert result.tokens == plain.tokens
        accepted.append(result.stats.mean_accepted_length)
        eights = [tuple(plain.tokens[place : place + 8]) for place in range(len(plain.tokens) - 7)]
        assert len(set(eights)) > 0.5 * len(eights), plain.text
    assert sum(accepted) / len(accepted) > 1.2
