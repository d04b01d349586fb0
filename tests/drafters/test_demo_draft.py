"""The head in models/demo-draft drafts for the demo model and leaves its text as it is."""

from pathlib import Path

import pytest
import torch

from pyspec import generate, load
from pyspec.drafters.eagle3 import Eagle3

FOLDER = Path(__file__).parents[2] / "models/demo-draft"


def test_it_guesses_a_good_part_of_the_text():
    try:
        model = load("demo", dtype=torch.float32, device="cpu")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    head = Eagle3(FOLDER, model, tables=())
    assert head.taps == (2, 15, 27) and head.head.vocab_size == 8192
    tokens = model.tokenizer.chat([{"role": "user", "content": "Explain how rainbows form."}])
    plain = generate(model, tokens, drafter=None, max_new_tokens=40)
    drafted = generate(model, tokens, drafter=head, budget=8, max_new_tokens=40)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.mean_accepted_length > 1.3
    assert sum(path.stat().st_size for path in FOLDER.glob("*.safetensors")) <= 20e6
