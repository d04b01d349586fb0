"""Whatever TransformersRunner takes gives the logits of plain decoding, whatever else is in a call; else it is refused.

A row is read in trees, in a batch and behind a prompt in chunks, and held against transformers' own generate.
"""

import pytest
import torch

from pyspec import DraftTree
from pyspec.runners.foreign import TransformersRunner
from tests.helpers.any_architecture import VOCABULARY, tiny

transformers = pytest.importorskip("transformers")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

NEW_TOKENS = 14
OTHERS = [[7, 3, 9, 7, 3] * 5, [44, 8]]  # in the batch
QUICK = [
    "gpt2",
    "llama",
    "mixtral",
    "phi3",
    "deepseek_v3",
    "gpt_oss",
    "llama4_text",
    "gemma3n_text",
    "granitemoehybrid",
    "qwen3_5_text",
]
TYPES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
]


def runner_or_sentence(model):
    """The runner of a model; None where it is refused by name, with a reason."""
    try:
        return TransformersRunner(model)
    except ValueError as error:
        message = str(error)
    assert message.startswith(f"{type(model).__name__} is not supported: it") and "; supported are Bamba" in message
    return None


def plain(model, prompt):
    """Greedy tokens, and the [V] logits of each, by transformers."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(
        torch.tensor([prompt]), return_dict_in_generate=True, output_logits=True, repetition_penalty=1.0, **options
    )
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits).float()


def in_company(runner, prompt, said):
    """The same logits by a runner, read in trees, in a batch, and after a prompt in chunks."""
    rows = [runner.prefill([OTHERS[0], prompt, OTHERS[1]], capacity=128)[1]]
    while len(rows) < NEW_TOKENS:
        done = len(rows)
        right = said[done - 1 : done + 3]  # the root and up to three behind it
        wrong = [(token + 1) % VOCABULARY for token in right[1:]]
        parents = [-1, *range(len(wrong)), *range(len(wrong))]
        tree = DraftTree([*right, *wrong], parents)
        other = DraftTree([9, 9, 8, 9, 7], [-1, 0, 0, 2, 2])
        logits = runner.verify({0: DraftTree.chain([5, 6]), 1: tree, 2: other})[1].logits
        rows += logits[: len(right)]
        runner.commit({0: [0], 1: list(range(len(right))), 2: [0, 2, 3]})
    return torch.stack(rows[:NEW_TOKENS])


@pytest.mark.parametrize("prompt_length", [11, 24])
@pytest.mark.parametrize("switch", [None, 20], ids=["own", "longrope"])
@pytest.mark.parametrize("model_type", TYPES)
def test_a_row_does_not_hang_on_its_call(model_type, switch, prompt_length, monkeypatch):
    model = tiny(model_type, switch)
    runner = runner_or_sentence(model)
    if runner is None:
        return
    monkeypatch.setattr("pyspec.runners.foreign.PREFILL_CHUNK", 7)
    prompt = ([5, 9, 17, 3, 44, 8, 90, 21, 60, 2] * 3)[:prompt_length]
    said, expected = plain(model, prompt)
    found = in_company(runner, prompt, said)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
