"""The training of block drafters: what one says is what its folder's layout says, and it learns."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import random_llama
from training.command import train
from training.data_files import DraftData
from training.drafts import Recipe, Target, chains_of
from training.dspark import BLOCK, DSpark

TAPS = (2, 3, 5)


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"), target, (*TAPS, 6))


def vocabulary(data):
    return np.sort(np.argsort(-np.bincount(data.tokens(), minlength=97))[:40])


def a_head(target):
    torch.manual_seed(1)
    head = DSpark(Target(target, torch.arange(0, 80, 2)), TAPS)
    with torch.no_grad():
        for values in head.parameters():
            values.add_(0.05 * torch.randn(values.shape))
            values.copy_(values.bfloat16())
    return head


def norm(rows, weight, epsilon=1e-5):
    return rows * (rows.square().mean(-1, keepdim=True) + epsilon) ** -0.5 * weight


def turned(rows, position):
    """[heads, D] of one position, by complex numbers."""
    half = rows.shape[-1] // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    found = torch.complex(rows[:, :half], rows[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([found.real, found.imag], -1)


def said_of_block(folder, target, tokens, features, anchor):
    """Rows [BLOCK, H] behind the last norm, for one block whose first token is at `anchor`, in float64, key by key."""
    config = json.loads((folder / "config.json").read_text())
    w = {name: values.double() for name, values in load_file(folder / "model.safetensors").items()}
    layer = {name.removeprefix("layers.0."): values for name, values in w.items() if name.startswith("layers.0.")}
    context = norm(features[:anchor].double().flatten(1) @ w["fc.weight"].T, w["hidden_norm.weight"])
    block = torch.tensor([int(tokens[anchor])] + [config["mask_token_id"]] * (config["block_size"] - 1))
    stream = target.embed(block).double()
    x = norm(stream, layer["input_layernorm.weight"])
    attention = {name: layer[f"self_attn.{name}_proj.weight"] for name in "qkvo"}
    rows, places = torch.cat([context, x]), torch.arange(anchor + config["block_size"])

    def heads(name, rows, places):
        found = (rows @ attention[name].T).unflatten(-1, (-1, 64))
        if name == "v":
            return found
        found = norm(found, layer[f"self_attn.{name}_norm.weight"])
        return torch.stack([turned(row, int(place)) for row, place in zip(found, places, strict=True)])

    keys, values, queries = heads("k", rows, places), heads("v", rows, places), heads("q", x, places[anchor:])
    group = queries.shape[1] // keys.shape[1]
    mixed = []
    for query in queries:
        of_heads = []
        for head, row in enumerate(query):
            shares = (keys[:, head // group] @ row / 8).softmax(-1)
            of_heads.append(shares @ values[:, head // group])
        mixed.append(torch.cat(of_heads))
    stream = stream + torch.stack(mixed) @ attention["o"].T
    x = norm(stream, layer["post_attention_layernorm.weight"])
    inner = F.silu(x @ layer["mlp.gate_proj.weight"].T) * (x @ layer["mlp.up_proj.weight"].T)
    return norm(stream + inner @ layer["mlp.down_proj.weight"].T, w["norm.weight"]), w


@torch.inference_mode()
def test_it_guesses_as_its_layout_says(target, data, tmp_path):
    head = a_head(target)
    head.write(tmp_path, "demo")
    batch = DraftData(data).read([3, 8])
    chains = chains_of(batch)[1].nonzero()[:, 0]
    found, sure = {}, {}
    for slot, (kept, rows) in enumerate(head.guesses(batch, chains, BLOCK, 1.0, 0.0)):
        found |= {(slot, chain): head.logits(row) for chain, row in zip(kept.tolist(), rows, strict=True)}
        sure |= {(slot, chain): head.confidence(row) for chain, row in zip(kept.tolist(), rows, strict=True)}
    first = int((batch.texts == 0).sum())
    for chain in (int(chains[0]), first - 12, first - 4, int(chains[-9])):
        of = batch.texts == batch.texts[chain]
        tokens, anchor = batch.tokens[of], int(batch.positions[chain]) + 1
        said, w = said_of_block(tmp_path, target, tokens, batch.features[of][:, :-1], anchor)
        slots = [slot for slot in range(BLOCK) if (slot, chain) in found]
        assert slots == list(range(min(BLOCK, len(tokens) - anchor - 1)))
        for slot in slots:
            before = w["markov_head.markov_w1.weight"][tokens[anchor + slot]]
            logits = w["lm_head.weight"] @ said[slot] + w["markov_head.markov_w2.weight"] @ before
            torch.testing.assert_close(found[slot, chain].double(), logits, rtol=1e-4, atol=1e-4)
            logit = w["confidence_head.proj.weight"] @ torch.cat([said[slot], before]) + w["confidence_head.proj.bias"]
            torch.testing.assert_close(sure[slot, chain].double(), logit, rtol=1e-4, atol=1e-4)


def test_it_learns_and_goes_on_where_it_was(target, data, tmp_path, monkeypatch):
    recipe = Recipe(
        steps=24, tokens=120, depth=BLOCK, vocabulary=40, share=0.5, frozen=0, warmup=4, learning_rate=1e-2, every=8
    )
    whole = train(tmp_path / "whole", data, recipe, target, DSpark, vocabulary)
    real, calls = Recipe.rate, []

    def interrupted(recipe, step):
        calls.append(step)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return real(recipe, step)

    monkeypatch.setattr(Recipe, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", data, recipe, target, DSpark, vocabulary)
    train(tmp_path / "parts", data, recipe, target, DSpark, vocabulary)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert models[0] == models[1]
    (_, first, _), *_, (_, last, shares) = whole.curve
    assert last < 0.9 * first and len(shares) == BLOCK


def test_confidence_learns_how_often_guesses_are_accepted(target, data, tmp_path):
    recipe = Recipe(steps=60, tokens=240, depth=2, vocabulary=40, frozen=0, warmup=4, learning_rate=1e-2, every=60)
    run = train(tmp_path, data, recipe, target, DSpark, vocabulary)
    batch, head = DraftData(data, held_out=True).read([0, 1]), run.head
    is_learned, has_guess = chains_of(batch)
    (kept, rows), *_ = head.guesses(batch, has_guess.nonzero()[:, 0], 1, 1.0, 0.0)
    laws = run.target.laws(batch.features[kept + 1, -1], torch.float32).shares
    shared = torch.minimum(laws, head.logits(rows).softmax(-1)).sum(-1).detach()
    sure = head.confidence(rows)[:, 0].sigmoid().detach()
    assert abs(float(sure.mean() - shared.mean())) < 0.1
