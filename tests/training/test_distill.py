"""A distilled model says in training what pyspec's runner says of its folder, learns, and drafts."""

import pytest
import torch

from pyspec import generate, load
from pyspec.drafters.model import ModelDrafter
from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens
from training.command import train
from training.data_files import DraftData
from training.distill import Student
from training.drafts import Recipe, Target, chains_of


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"), target, (2, 3, 5, 6))


def everything(data):
    return range(VOCABULARY)


@torch.inference_mode()
def test_it_guesses_as_its_folder_does(target, data, tmp_path):
    student = Student(Target(target, torch.arange(VOCABULARY)))
    for values in student.parameters():
        values.copy_(values.bfloat16())
    student.write(tmp_path, "demo")
    runner, texts = load(str(tmp_path), dtype=torch.float32, device="cpu"), DraftData(data)
    batch = texts.read([3, 8])
    chains = chains_of(batch)[1].nonzero()[:, 0]
    for depth, (kept, rows) in enumerate(student.guesses(batch, chains, 3, 1.0, 0.0)):
        for place in (0, len(kept) // 2, -1):
            after = int(kept[place]) + 1 + depth
            text = batch.tokens[: after + 1][batch.texts[: after + 1] == batch.texts[after]]
            (expected,) = runner.prefill([text.tolist()])
            torch.testing.assert_close(student.logits(rows[place]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["kl", "reverse kl", "jsd", "tvd"])
def test_it_learns_and_drafts(target, data, tmp_path, divergence):
    settings = {
        "steps": 60,
        "tokens": 240,
        "depth": 1,
        "vocabulary": 0,
        "warmup": 4,
        "every": 30,
        "learning_rate": 3e-3,
    }
    recipe = Recipe(**settings, hybrid=1.0, divergence=divergence)
    (_, first, _), (_, last, _) = train(tmp_path, data, recipe, target, Student, everything).curve
    assert last < 0.95 * first
    drafter = ModelDrafter(load(str(tmp_path), dtype=torch.float32, device="cpu"), target)
    prompt = random_tokens(4, 2)
    plain = generate(target, prompt, drafter=None, max_new_tokens=20)
    assert generate(target, prompt, drafter=drafter, budget=5, max_new_tokens=20).tokens == plain.tokens


def test_another_target_is_refused():
    with pytest.raises(ValueError, match="target must have the layers of a Llama without biases, but self_attn"):
        Student(Target(random_llama(biases=True), torch.arange(VOCABULARY)))
