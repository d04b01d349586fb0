"""A model as the drafter of another: its laws, its state, and what may not be combined."""

import pytest
import torch

from pyspec.acceptance import RULES, acceptance_from_name
from pyspec.drafters.model import ModelDrafter, _Laws
from pyspec.drafters.shapes import top_tokens
from pyspec.drafters.shapes.dyspec import DySpecGreedy, DySpecThreshold
from pyspec.drafters.shapes.reranked import Reranked, TopPaths
from pyspec.drafters.shapes.static import FixedBranching, Sequoia
from pyspec.drafters.shapes.stochastic_beam import StochasticBeam
from pyspec.generate import generate
from tests.helpers.fake_runner import EOS, FakeRunner

PROMPT = list(b"once upon a time")
GROWTH = [
    FixedBranching((2, 2, 1)),
    FixedBranching((2, 2), "with replacement"),
    FixedBranching((1, 1, 1, 1)),
    FixedBranching((2, 1), "top"),
    Sequoia((0.5, 0.2, 0.1), 4),
    StochasticBeam(3, 4),
    DySpecGreedy(),
    DySpecThreshold(0.1),
    TopPaths(3, 3),
    Reranked(FixedBranching((3, 2), "top")),
]


class Draft(FakeRunner):
    """Says roughly what FakeRunner does."""

    def logits(self, context):
        logits = super().logits(context)
        logits[97 + sum(context) % 26] += 0.5
        return logits


def ids(policy):
    return type(policy).__name__


def test_laws_are_the_draft_models_below_the_context():
    draft = Draft()
    drafter = ModelDrafter(draft, FakeRunner(), temperature=0.8, top_k=5).start(PROMPT)
    context = [*PROMPT, 97]
    for said in ([98], [99, 100, 101], [102]):  # 1 or 3 tokens accepted
        laws = _Laws(drafter._batch, 0, context, drafter._sampler)
        tokens, parents = [context[-1], 105, 106, 107, 108], [-1, 0, 0, 1, 2]
        for nodes in ([0], [1, 2], [4], [3, 0]):
            rows = laws.laws(tokens, parents, nodes)
            for node, row in zip(nodes, rows, strict=True):
                path = {0: [], 1: [105], 2: [106], 3: [105, 107], 4: [106, 108]}[node]
                expected = drafter._sampler.probabilities(Draft().logits([*context, *path]))
                torch.testing.assert_close(torch.from_numpy(row), expected)
        assert draft.committed == [context[:-1]]
        context += said


def test_the_likeliest_tokens_are_those_of_the_laws():
    drafter = ModelDrafter(Draft(), FakeRunner()).start(PROMPT)
    laws = _Laws(drafter._batch, 0, [*PROMPT, 97], drafter._sampler)
    tokens, parents, nodes = [97, 105, 106, 107, 108], [-1, 0, 0, 1, 2], [4, 0, 3]
    found, chances = laws.likeliest(tokens, parents, nodes, 3)
    for row, best, law in zip(found, chances, laws.laws(tokens, parents, nodes), strict=True):
        assert row.tolist() == top_tokens(law, 3)
        torch.testing.assert_close(torch.from_numpy(best).double(), torch.from_numpy(law[row]), rtol=1e-5, atol=0)
    assert laws.likeliest(tokens, parents, nodes, 9) is None  # more than statistics have
    warm = ModelDrafter(Draft(), FakeRunner(), temperature=0.8).start(PROMPT)
    assert _Laws(warm._batch, 0, [*PROMPT, 97], warm._sampler).likeliest(tokens, parents, nodes, 3) is None


@pytest.mark.parametrize("growth", GROWTH, ids=ids)
def test_exact_acceptance_gives_the_plain_text(growth):
    for settings in ({}, dict(temperature=0.9, seed=11)):
        plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=40, **settings)
        drafter = ModelDrafter(Draft(), FakeRunner(), growth)
        said = generate(FakeRunner(), PROMPT, drafter=drafter, budget=9, max_new_tokens=40, **settings)
        assert said.tokens == plain.tokens and said.stats.rounds < 39


def test_the_default_fits_the_defaults_of_generate():
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=40)
    said = generate(FakeRunner(), PROMPT, drafter=ModelDrafter(Draft(), FakeRunner()), max_new_tokens=40)
    assert said.tokens == plain.tokens and said.stats.rounds < 30


@pytest.mark.parametrize("growth", GROWTH, ids=ids)
@pytest.mark.parametrize("name", RULES)
def test_what_may_be_combined(name, growth):
    """Greedily what may gives the plain text, but mixtures and what is unverified; what may not says what to use."""
    drafter = ModelDrafter(Draft(), FakeRunner(), growth)
    siblings = acceptance_from_name(name).siblings
    fits = siblings is None or (growth.proposal == "sampled" and growth.siblings in siblings)
    call = dict(drafter=drafter, budget=9, acceptance=name, max_new_tokens=30)
    if fits:
        plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=30)
        for budget in (9, "auto"):
            tokens = generate(FakeRunner(), PROMPT, **call | dict(budget=budget)).tokens
            assert tokens == plain.tokens or acceptance_from_name(name).law == "mixture" or name == "unverified"
    else:
        model = FakeRunner()
        model.prefill = None  # before any work
        with pytest.raises(ValueError, match="do not go together.*Use acceptance="):
            generate(model, PROMPT, **call)


@pytest.mark.parametrize("growth", [DySpecGreedy(), StochasticBeam(3, 4), FixedBranching((2, 2, 1))], ids=ids)
def test_no_drawn_node_is_left_out_for_what_it_is(growth, monkeypatch):
    """What budget="auto" takes is set before the draw, by earlier rounds, and the tree is verified as it was drawn."""
    drawn, budgets = [], []

    class Watched(ModelDrafter):
        def propose(self, context, budget):
            budgets.append(budget)
            drawn.append(super().propose(context, budget))
            return drawn[-1]

    class Model(FakeRunner):
        def verify(self, trees):
            if len(trees[0]) > 1:
                assert trees[0] is drawn[-1]
            return super().verify(trees)

    drafter = Watched(Draft(), FakeRunner(), growth)
    generate(Model(), PROMPT, drafter=drafter, acceptance="traversal", temperature=1.0, seed=2, max_new_tokens=60)
    assert len(set(budgets)) > 1 and all(1 < len(tree) <= budget for tree, budget in zip(drawn, budgets, strict=True))


def test_published_bugs_say_what_to_use_instead():
    model = FakeRunner()

    def say(growth, acceptance, **settings):
        generate(model, PROMPT, drafter=ModelDrafter(Draft(), model, growth), acceptance=acceptance, **settings)

    with pytest.raises(
        ValueError, match='Use acceptance="traversal" or "recursive", which take what was drawn out of q'
    ):
        say(FixedBranching((3,)), "with_replacement", budget=4)
    with pytest.raises(ValueError, match='Use acceptance="traversal"'):
        say(FixedBranching((3,), "with replacement"), "block", budget=4)
    with pytest.raises(ValueError, match='scoring them as if they were drawn biases.*Use acceptance="exact"'):
        say(FixedBranching((3,), "top"), "recursive", budget=4)
    with pytest.raises(ValueError, match='Use acceptance="exact"'):
        generate(model, PROMPT, drafter="merged", acceptance="traversal", budget=4)
    with pytest.raises(ValueError, match="re-ranking what StochasticBeam drew"):
        say(Reranked(StochasticBeam(2, 2)), "traversal", budget=4)
    with pytest.raises(ValueError, match="temperature must be above 0 for DySpecGreedy.*Use a deterministic policy"):
        ModelDrafter(Draft(), model, DySpecGreedy(), temperature=0)
    for temperature in (float("inf"), float("nan"), -1):
        with pytest.raises(ValueError, match="temperature"):
            ModelDrafter(Draft(), model, temperature=temperature)
    ModelDrafter(Draft(), model, temperature=0)  # chosen anyway


@pytest.mark.parametrize("temperature", [1e-30, 0.5, 1e30])
@pytest.mark.parametrize("top_k", [0, 1, 10_000])
def test_extreme_drafts_are_still_right(temperature, top_k):
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=12)
    for growth in (DySpecThreshold(0.05), FixedBranching((3, 2)), StochasticBeam(3, 2)):
        drafter = ModelDrafter(Draft(), FakeRunner(), growth, temperature=temperature, top_k=top_k)
        for acceptance in ("recursive", "traversal"):
            said = generate(FakeRunner(), PROMPT, drafter=drafter, budget=8, acceptance=acceptance, max_new_tokens=12)
            assert said.tokens == plain.tokens


def test_a_seed_repeats_and_batches_are_separate():
    prompts = [PROMPT, list(b"in a hole in the ground"), list(b"it")]
    settings = dict(budget=8, acceptance="traversal", max_new_tokens=25, temperature=1.0, seed=5)

    def say(prompts, seed=0):
        drafter = ModelDrafter(Draft(), FakeRunner(), StochasticBeam(3, 3), seed=seed)
        return generate(FakeRunner(), prompts, drafter=drafter, **settings).tokens

    together = say(prompts)
    assert together == [say(prompt) for prompt in prompts] == say(prompts)
    assert together != say(prompts, seed=1)


def test_drafters_may_share_a_draft_model_and_texts_may_outgrow_its_slots(monkeypatch):
    monkeypatch.setattr("pyspec.drafters.model.LEAST_SLOTS", 8)
    draft, model = Draft(), FakeRunner()
    first, second = (ModelDrafter(draft, model, growth) for growth in (StochasticBeam(2, 3), TopPaths(2, 2)))
    plain = generate(model, PROMPT, drafter=None, max_new_tokens=80).tokens
    for drafter in (first, second, first):
        assert generate(model, PROMPT, drafter=drafter, budget=7, max_new_tokens=80).tokens == plain
    one, other = first.start(PROMPT), second.start(PROMPT)
    context = list(PROMPT)
    for token in plain[:6]:
        context.append(token)
        trees = [drafter.propose(context, 7).tokens.tolist() for drafter in (one, other)]
        alone = [drafter.start(PROMPT).propose(context, 7).tokens.tolist() for drafter in (first, second)]
        assert trees == alone


@pytest.mark.parametrize("growth", [*GROWTH, None], ids=ids)
def test_drafts_end_with_the_drafts_context(growth):
    draft = Draft()  # it asserts that no tree goes past its context
    draft.context_length = 24
    drafter = ModelDrafter(draft, FakeRunner(), growth)
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=40).tokens
    assert generate(FakeRunner(), PROMPT, drafter=drafter, budget=8, max_new_tokens=40).tokens == plain
    started = drafter.start(PROMPT)
    assert len(started.propose([*PROMPT, *plain[:8]], 8)) == 1
    assert len(started.propose([*PROMPT, *plain[:6]], 8)) == 2
    assert int(started.propose([*PROMPT, *plain[:7]], 8).depths.max()) <= 1
    assert len(drafter.start([97]).propose([97], 8)) == 1


def test_models_that_do_not_fit():
    target, other = FakeRunner(), Draft()
    with pytest.raises(ValueError, match="another runner than target"):
        ModelDrafter(target, target)
    other.vocab_size = EOS + 2
    with pytest.raises(ValueError, match=f"vocabulary of {EOS + 1} tokens, got {EOS + 2}"):
        ModelDrafter(other, target)
    other = Draft()
    other.tokenizer.fingerprint = "other bytes"
    with pytest.raises(ValueError, match="other bytes and bytes"):
        ModelDrafter(other, target)
    ModelDrafter(Draft(tokenizer=False), target)


def test_a_draft_model_that_fails_is_named():
    class Broken(Draft):
        def logits(self, context):
            return super().logits(context) * (torch.nan if len(context) > len(PROMPT) + 3 else 1)

    with pytest.raises(ValueError, match="draft model's logits after token .* are NaN"):
        generate(FakeRunner(), PROMPT, drafter=ModelDrafter(Broken(), FakeRunner()), budget=8, max_new_tokens=20)
