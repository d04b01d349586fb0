"""The check of bit equality: that it holds on a sample of the demo model, and that the check notices one bit."""

import random
import secrets
from itertools import pairwise

import bit_equality
import pytest
import torch
from bit_equality import BUDGETS, MODELS, Check
from peers import DRAFTERS
from recording import record

from pyspec.drafters import new_drafter
from pyspec.measure import prompts
from tests.helpers.fake_runner import EOS, FakeRunner
from tests.helpers.order_dependent import order_dependent_llamas

PROMPTS = {number: list(b"a tree is a tree is a tree"[number:]) for number in (1, 2, 3)}
UNIT = {"dtype": "fp32", "drafter": "merged", "alone": [1, 2, 3], "together": [1, 2, 3]}


class EndingRunner(FakeRunner):
    """Ends its texts, each in another round."""

    def logits(self, context):
        logits = super().logits(context)
        if len(context) == 30 + 3 * (context[0] % 5):
            logits[EOS] = 50.0
        return logits


class OneBitApart(FakeRunner):
    """In trees of several nodes, one bit of the least likely token's logit is another than alone."""

    def _tree_logits(self, committed, tree):
        logits = super()._tree_logits(committed, tree)
        if len(tree) > 1:
            logits[:, 0].nextafter_(torch.tensor(0.0))
        return logits


class OneSequenceApart(FakeRunner):
    """The same, but only for the second sequence of a batch."""

    def verify(self, trees):
        verified = super().verify(trees)
        if len(verified) > 1 and 1 in verified:
            verified[1].logits[:, 0].nextafter_(torch.tensor(0.0))
        return verified


def check_unit(model, tokens=30):
    """The unit's runs on a model, and [differences of tokens, of logits] of each text."""
    runs = Check({"fp32": model}, PROMPTS, tokens).unit(UNIT)["runs"]
    return runs, [[(text["token_differences"], text["logit_differences"]) for text in run["texts"]] for run in runs]


@pytest.mark.parametrize("runner", [FakeRunner, EndingRunner])
def test_every_token_has_the_logits_it_was_drawn_from(runner):
    model = runner()
    for drafter in (None, new_drafter("merged", model)):
        texts, _ = record(model, list(PROMPTS.values()), drafter=drafter, max_new_tokens=30)
        assert [len(text.tokens) for text in texts] == ([30] * 3 if runner is FakeRunner else [12, 10, 20])
        for prompt, text in zip(PROMPTS.values(), texts, strict=True):
            contexts = [[*prompt, *text.tokens[:place]] for place in range(len(text.tokens))]
            expected = torch.stack([model.logits(context) for context in contexts])
            assert torch.equal(torch.stack(text.logits), expected)


def test_equal_texts_are_found_equal():
    runs, found = check_unit(EndingRunner())
    assert [run["question_ids"] for run in runs] == [[1], [2], [3], [1, 2, 3]] * len(BUDGETS)
    assert found == [[(0, 0)] * len(run["texts"]) for run in runs]
    checks = bit_equality.summary([UNIT | {"runs": runs}])
    assert [(counts["budget"], counts["batch"]) for counts in checks] == [(b, n) for b in BUDGETS for n in (1, 3)]
    counts = bit_equality.total(checks)
    assert counts["rows"] == counts["tokens"] == sum(text["tokens"] for run in runs for text in run["texts"])
    assert all(counts["sequences"] == 3 and counts["tokens"] > counts["rounds"] > 0 for counts in checks[1:])
    assert bit_equality.differences(counts) == 0


def test_one_bit_is_a_difference(capsys):
    runs, found = check_unit(OneBitApart())
    assert all(tokens == 0 and logits > 0 for texts in found for tokens, logits in texts)
    assert all(text["first_row"] > 0 and text["first_token"] is None for run in runs for text in run["texts"])
    bit_equality.show([], [UNIT | {"runs": runs}])
    assert "DIFFERENT: question 2 of [1, 2, 3], fp32, merged, budget 48: 0 of 30 tokens and" in capsys.readouterr().out


def test_a_difference_is_found_in_its_own_sequence():
    _, found = check_unit(OneSequenceApart())
    for alone, other, another, (first, second, third) in zip(*[iter(found)] * 4, strict=True):
        assert alone == other == another == [(0, 0)]
        assert first == third == (0, 0) != second


def test_logits_count_up_to_a_different_token():
    model = FakeRunner()
    ((text,), _) = record(model, [PROMPTS[1]], drafter=None, max_new_tokens=12)
    expected = bit_equality.Expected(text.tokens[:5] + [99] + text.tokens[6:10], [b""] * 10)
    assert bit_equality.compare(text, expected) == {
        "tokens": 12,
        "rows": 6,
        "token_differences": 3,
        "logit_differences": 6,
        "first_token": 5,
        "first_row": 0,
    }


def test_the_work_is_every_combination_for_three_prompts_after_three():
    units = bit_equality.units(list(range(50)))
    combinations = len(MODELS) * len(DRAFTERS)
    assert len(units) == 17 * combinations
    groups = units[::combinations]
    assert [question_id for unit in groups for question_id in unit["alone"]] == list(range(50))
    assert all(unit["alone"] == unit["together"] for unit in groups[:-1])
    assert (groups[-1]["alone"], groups[-1]["together"]) == ([48, 49], [48, 49, 0])
    first = {(unit["dtype"], unit["drafter"]) for unit in units[:combinations]}
    assert len(first) == combinations and all(a["alone"][0] <= b["alone"][0] for a, b in pairwise(units))


@pytest.fixture(scope="module")
def demo():
    """name -> one of the models, loaded when first asked for."""
    models = {}

    def get(name):
        if name not in models:
            try:
                models[name] = bit_equality.load(name)
            except FileNotFoundError as missing:
                pytest.skip(str(missing))
        return models[name]

    return get


def short_questions(model, count, choose):
    token_ids = {
        question.question_id: question.tokens(model) for question in prompts.across_categories(prompts.spec_bench(), 50)
    }
    short = [question_id for question_id, tokens in token_ids.items() if len(tokens) < 100]
    return {question_id: token_ids[question_id] for question_id in choose.sample(short, count)}


@pytest.mark.parametrize("name", MODELS)
def test_a_sample_of_texts_has_the_bits_of_plain_decoding(demo, name):
    model = demo(name)
    for seed in (0, secrets.randbits(32)):  # one that is always the same, and one that never was
        choose = random.Random(seed)
        token_ids = short_questions(model, 3, choose)
        check = Check({name: model}, token_ids, 16)
        drafter_name = choose.choice(DRAFTERS)
        drafter = new_drafter(drafter_name, model)
        for batch in ([choose.choice(list(token_ids))], list(token_ids)):
            run = check.run(name, drafter, choose.choice(BUDGETS), batch)
            differences = sum(map(bit_equality.differences, run["texts"]))
            assert differences == 0, f"seed {seed}, {drafter_name}: {run}"


def test_the_sample_has_teeth(demo):
    """Where a sum's order depends on the number of rows, the same check finds differences."""
    model = demo("fp32")
    token_ids = short_questions(model, 1, random.Random(0))

    def differences():
        run = Check({"fp32": model}, token_ids, 6).run("fp32", new_drafter("merged", model), 4, list(token_ids))
        return bit_equality.differences(run["texts"][0])

    assert differences() == 0
    with order_dependent_llamas():
        assert differences() > 0
