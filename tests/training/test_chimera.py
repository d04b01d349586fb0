"""The training of heads of three tokens: a guess is made of what its chain has, and nothing else."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.helpers.draft_data import write_texts
from tests.helpers.random_llama import random_llama
from tests.training.test_dspark import norm, turned
from training.chimera import Chimera
from training.command import train
from training.data_files import DraftData
from training.drafts import Recipe, Target, chains_of

TAPS = (2, 3, 5)


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


@pytest.fixture(scope="module")
def data(target, tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data"), target, (*TAPS, 6))


def logits_of_chain(w, target, tokens, features, chain, index):
    """[Vd] of the guess behind tokens[chain + 1 + index], in float64, key by key, from the tensors of a folder."""
    layer = {name.removeprefix("layers.0."): values for name, values in w.items() if name.startswith("layers.0.")}

    def row_of(place):
        of_tokens = [target.embed(tokens[place - back : place - back + 1])[0].double() for back in (2, 1, 0)]
        normed = [norm(row, w["token_norm.weight"], torch.finfo(torch.float32).eps) for row in of_tokens]
        inner = F.silu(w["inner.weight"] @ torch.cat(normed))
        return of_tokens[-1] + w["outer.weight"] @ inner

    last = chain + 1 + index
    own = [row_of(place) for place in range(chain + 1, last + 1)]
    context = [norm(w["fc.weight"] @ row.double().flatten(), w["hidden_norm.weight"]) for row in features[: chain + 1]]
    seen = context + [norm(row, layer["input_layernorm.weight"]) for row in own]

    def heads(name, row, place):
        found = (layer[f"self_attn.{name}_proj.weight"] @ row).unflatten(-1, (-1, 64))
        return found if name == "v" else turned(found, place)

    keys = torch.stack([heads("k", row, place) for place, row in enumerate(seen)])
    values = torch.stack([heads("v", row, place) for place, row in enumerate(seen)])
    query = heads("q", seen[-1], last)
    group = len(query) // keys.shape[1]
    mixed = [
        (keys[:, head // group] @ row / 8).softmax(-1) @ values[:, head // group] for head, row in enumerate(query)
    ]
    stream = own[-1] + layer["self_attn.o_proj.weight"] @ torch.cat(mixed)
    x = norm(stream, layer["post_attention_layernorm.weight"])
    inner = F.silu(layer["mlp.gate_proj.weight"] @ x) * (layer["mlp.up_proj.weight"] @ x)
    return w["lm_head.weight"] @ norm(stream + layer["mlp.down_proj.weight"] @ inner, w["norm.weight"])


@torch.inference_mode()
def test_it_guesses_as_its_formula_says(target, data, tmp_path):
    torch.manual_seed(1)
    head = Chimera(Target(target, torch.arange(0, 80, 2)), TAPS)
    for values in head.parameters():
        values.add_(0.05 * torch.randn(values.shape))
        values.copy_(values.bfloat16())
    head.write(tmp_path, "demo")
    w = {name: values.double() for name, values in load_file(tmp_path / "model.safetensors").items()}
    batch = DraftData(data).read([3, 8])
    chains, found = chains_of(batch)[1].nonzero()[:, 0], {}
    for depth, (kept, rows) in enumerate(head.guesses(batch, chains, 4, 1.0, 0.0)):
        found |= {(depth, chain): head.logits(row) for chain, row in zip(kept.tolist(), rows, strict=True)}
    for chain in (int(chains[0]), int((batch.texts == 0).sum()) - 5, int(chains[-8])):
        of = batch.texts == batch.texts[chain]
        place = int(batch.positions[chain])
        for depth in range(3):
            each = batch.tokens[of], batch.features[of][:, :-1], place, depth
            expected = logits_of_chain(w, target, *each)
            torch.testing.assert_close(found[depth, chain].double(), expected, rtol=1e-4, atol=1e-4)


def test_it_learns(target, data, tmp_path):
    recipe = Recipe(steps=24, tokens=120, vocabulary=40, warmup=4, learning_rate=1e-2, every=8)

    def vocabulary(data):
        return np.sort(np.argsort(-np.bincount(data.tokens(), minlength=97))[:40])

    (_, first, _), *_, (_, last, shares) = train(tmp_path, data, recipe, target, Chimera, vocabulary).curve
    assert last < 0.9 * first and len(shares) == 4
