"""Texts of a random model, in the folder that python -m training.data writes."""

import json

import torch

from pyspec import generate
from tests.helpers.random_llama import random_tokens
from tests.helpers.runner_checks import observed_taps
from training.data_files import Text, shard_path, write_shard


def write_texts(folder, target, taps, texts=100, answer=20):
    """Two shards of texts, half of them each, of short prompts and what the target says to them."""
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps({"model": "random", "taps": list(taps)}))
    made = [_text_of(target, random_tokens(3 + seed % 5, seed), answer, taps) for seed in range(texts)]
    for number in range(2):
        write_shard(shard_path(folder, number), made[number * texts // 2 : (number + 1) * texts // 2])
    return folder


def _text_of(target, prompt, count, taps):
    tokens = [*prompt, *generate(target, prompt, drafter=None, max_new_tokens=count).tokens]
    (features,) = observed_taps(target, [tokens], taps)
    features[-1] = 0
    return Text(torch.tensor(tokens, dtype=torch.int32), len(prompt), features)
