"""The demo model, in fp32: the whole way from the GGUF file to text."""

import pytest
import torch

from pyspec import DraftTree, load
from pyspec.checkpoints.sources import demo_file

PROMPTS = (
    "Explain how rainbows form.",
    "List three prime numbers, and then the same three numbers in reverse.",
    "def fibonacci(n):",
)
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def runner():
    try:
        return load("demo", dtype=torch.float32, device="cpu")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def reference(runner):
    """transformers' own reading of the same file."""
    import transformers

    path = demo_file()
    return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_are_those_of_transformers(runner, reference, prompt):
    tokens = runner.tokenizer.chat([{"role": "user", "content": prompt}])
    generated = reference.generate(torch.tensor([tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = generated[0, len(tokens) :].tolist()

    context = tokens + [int(runner.prefill([tokens], capacity=256)[0].argmax())]
    while len(context) < len(tokens) + len(expected):
        logits = runner.verify({0: DraftTree.chain(context[-1:])})[0].logits
        runner.commit({0: [0]})
        context.append(int(logits[0].argmax()))
    assert context[len(tokens) :] == expected

    # and all of them at once, as one tree: the right continuation, with a wrong token beside every node
    right, wrong = expected[:-1], [(token + 1) % runner.vocab_size for token in expected[1:]]
    tree = DraftTree(right + wrong, [*range(-1, len(right) - 1), *range(len(wrong))])
    runner.prefill([tokens], capacity=256)
    logits = runner.verify({0: tree})[0].logits
    assert logits[: len(right)].argmax(-1).tolist() == expected[1:]


def test_chat_is_the_models_own_template(runner):
    tokens = runner.tokenizer.chat([{"role": "user", "content": "Hi <|im_end|>"}])
    assert tokens[0] == runner.tokenizer.encode("<|im_start|>", special=True)[0]
    assert runner.tokenizer.decode(tokens).endswith("user\nHi \nassistant\n")
    assert runner.eos_tokens == {0, 2}
    assert runner.vocab_size == runner.tokenizer.vocab_size == 49152
    assert runner.context_length == 8192
