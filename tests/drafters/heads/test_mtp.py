"""The layer of a checkpoint that guesses further tokens says what transformers' module says, and changes no text."""

import pytest
import torch

from pyspec import generate, load
from pyspec.acceptance import RULES
from pyspec.drafters import DRAFTERS, new_drafter
from pyspec.drafters.heads.eagle3_batch import HeadLaws
from pyspec.drafters.mtp import Mtp
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.sampling.sampler import Sampler
from tests.helpers import tiny_hybrids
from tests.helpers.drafter_enumeration import check_drawn_law
from tests.helpers.mtp_heads import add_mtp, random_mtp, said_by_transformers
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.recurrent_gguf import write_recurrent_gguf
from tests.helpers.tiny_hybrids import tiny_hybrid

pytest.importorskip("transformers.modeling_layers", reason="MtpLayer is transformers'")
KINDS = ("qwen3_5", "qwen3_5_tied_with_biases", "qwen3_5_moe", "qwen3_next")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request, tmp_path_factory):
    """A model, its further tensors, and the folder of both."""
    pytest.importorskip("transformers")
    folder, model = tmp_path_factory.mktemp(request.param), tiny_hybrid(request.param)
    tensors = random_mtp(model)
    model.save_pretrained(folder)
    add_mtp(folder, tensors)
    return model, tensors, folder


def load_cpu(path, dtype=torch.float32):
    return load(str(path), dtype=dtype, device="cpu")


def said(drafter, target, prompt, guesses):
    """[1 + len(guesses), V] of the head's laws along a chain below a text."""
    reader = drafter.start(prompt[:-1])
    target.prefill(
        [prompt[:-1]],
        taps=drafter.taps,
        observe=lambda slot, chain, verified: reader.observe(chain, verified, range(len(chain))),
    )
    reader._batch.read({reader._sequence: prompt})
    laws = HeadLaws(reader._batch, reader._sequence, Sampler(1.0))
    found, tokens, parents = [], [0], [-1]
    for guess in [*guesses, 0]:
        found.append(laws.laws(tokens, parents, [len(tokens) - 1])[0])
        parents.append(len(tokens) - 1)
        tokens.append(guess)
    return torch.stack([torch.from_numpy(law) for law in found])


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_laws_are_those_of_transformers(checkpoint, form, tmp_path):
    model, tensors, path = checkpoint
    if form == "gguf":
        if model.config.model_type == "qwen3_next" or "full_attention" == model.config.layer_types[0]:
            pytest.skip("llama.cpp leaves it out, or has attention in other layers")
        path = tmp_path / "tiny.gguf"
        write_recurrent_gguf(path, model, further=tensors)
    target = load_cpu(path)
    prompt, guesses = random_tokens(40), [3, 17, 3]
    expected = said_by_transformers(model, tensors, prompt, guesses).softmax(-1)
    found = said(Mtp(target, weights=torch.float32), target, prompt, guesses)
    assert expected.max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
def test_texts_are_those_of_plain_decoding(checkpoint, dtype, settings):
    target = load_cpu(checkpoint[2], dtype)
    prompts = [random_tokens(length, length) for length in (150, 2, 1, 20)]
    plain = generate(target, prompts, drafter=None, max_new_tokens=30, **settings)
    for budget in (2, 7, 20):
        drafted = generate(target, prompts, drafter="mtp", budget=budget, max_new_tokens=30, **settings)
        assert drafted.tokens == plain.tokens


def test_drawn_trees_follow_their_rules(checkpoint):
    """Greedy texts of rules that trust q, from trees that the layer draws."""
    target = load_cpu(checkpoint[2])
    prompts = [random_tokens(length, length) for length in (30, 3)]
    plain = generate(target, prompts, drafter=None, max_new_tokens=20).tokens
    for name in ("exact", "recursive", "block"):
        drafter = Mtp(target, growth_for(name), weights=torch.float32)
        options = {"acceptance": name, "budget": 6, "max_new_tokens": 20}
        assert generate(target, prompts, drafter=drafter, **options).tokens == plain, name
        assert RULES[name]


def test_drawn_laws_are_the_targets(tmp_path, monkeypatch):
    """By every outcome of every draw, of a model with few tokens."""
    *names, shape = tiny_hybrids.KINDS["qwen3_5"]
    monkeypatch.setitem(tiny_hybrids.KINDS, "few", (*names, shape | {"vocab_size": 5}))
    model = tiny_hybrid("few")
    model.save_pretrained(tmp_path)
    add_mtp(tmp_path, random_mtp(model))
    target = load_cpu(tmp_path)
    drafter = Mtp(target, FixedBranching((2, 1), "without replacement"), weights=torch.float32)
    check_drawn_law(monkeypatch, drafter, target, [1, 2, 0, 4, 4, 3, 1], "traversal")


def test_a_layer_that_knows_the_text_is_right(tmp_path):
    """A layer that copies what the target's last norm gave guesses what the target said of the token before."""
    model = tiny_hybrid("qwen3_5")
    tensors = {name: torch.zeros_like(values) for name, values in random_mtp(model).items()}
    hidden = model.config.hidden_size
    tensors["mtp.fc.weight"][:, hidden:] = torch.eye(hidden)  # norms keep their 1, once
    model.save_pretrained(tmp_path)
    add_mtp(tmp_path, tensors)
    target, prompt = load_cpu(tmp_path), random_tokens(30)
    before = []
    target.prefill([prompt[:-1]], observe=lambda slot, chain, verified: before.append(verified.logits))
    found = said(Mtp(target, weights=torch.float32), target, prompt, [])
    assert int(found[0].argmax()) == int(before[-1][-1].argmax())


def test_models_without_a_layer_have_no_such_drafter(tmp_path):
    target = random_llama()
    assert not DRAFTERS["mtp"].fits(target)
    with pytest.raises(ValueError, match="target must be of a checkpoint with a layer that guesses further tokens"):
        new_drafter("mtp", target)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("mtp.fc.weight"), "has no tensor mtp.fc.weight"),
        (lambda t: t.update({"mtp.fc.weight": torch.ones(2, 2)}), r"mtp.fc.weight must have shape \(96, 192\), got"),
        (lambda t: t.update({"mtp.layers.1.odd.weight": torch.ones(2)}), "mtp.layers.1.odd.weight must not be there"),
        (lambda t: t["mtp.norm.weight"].fill_(float("nan")), "mtp.norm.weight has values that are NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    model = tiny_hybrid("qwen3_5")
    tensors = random_mtp(model)
    change(tensors)
    model.save_pretrained(tmp_path)
    add_mtp(tmp_path, tensors)
    target = load_cpu(tmp_path)  # which does not need it
    with pytest.raises(ValueError, match=message):
        Mtp(target)


def test_nothing_is_read_before_it_is_asked_for(tmp_path):
    model = tiny_hybrid("qwen3_5")
    model.save_pretrained(tmp_path)
    plain = load_cpu(tmp_path)
    add_mtp(tmp_path, random_mtp(model))
    target = load_cpu(tmp_path)
    assert target.fingerprint == plain.fingerprint
    assert DRAFTERS["mtp"].fits(target) and not DRAFTERS["mtp"].fits(plain)
