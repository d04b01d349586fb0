"""Two models that write one text: each token is its model's own, whatever is drafted."""

import numpy as np
import pytest
import torch

from pyspec.answers import ANSWER_RULES
from pyspec.answers.chow import ChowAverage, ChowSum
from pyspec.answers.learned import LearnedRule
from pyspec.answers.quantile import ChowQuantile
from pyspec.cascade import cascade
from pyspec.generate import generate
from pyspec.sampling.sampler import Sampler
from pyspec.turns import LARGE, SMALL, TURN_RULES, entropy_bits
from pyspec.turns.entropy import EntropyTurns
from pyspec.turns.foreal import ForealTurns
from pyspec.turns.uniroute import Router, UniRouteTurns
from tests.helpers.fake_drafters import AlwaysWrong, Oracle, RandomTrees
from tests.helpers.fake_runner import EOS, FakeRunner, FakeTokenizer

PROMPT = list(b"once upon a time")


class Small(FakeRunner):
    """A model that ends sentences."""

    def logits(self, context):
        logits = super().logits(context)
        logits[ord(".")] = 20.0 if len(context) % 11 == 0 else -30.0
        return logits


class Large(Small):
    """Another model, which is unsure now and then."""

    def logits(self, context):
        return super().logits([*context[:-2], 7, *context[-1:]]) * (0.2 if sum(context[-2:]) % 3 else 2.0)


def written_token_by_token(rule, seed, temperature, count):
    """Tokens and who wrote them, without a loop, a batch or a drafter."""
    models, sampler = (Small(), Large()), Sampler(temperature, seed=seed)
    turns = rule.start(sampler.seed, FakeTokenizer().token_bytes, PROMPT)
    context, writers, active = list(PROMPT), [], turns.first
    for _ in range(count):
        row = models[active].logits(context)
        context.append(sampler.draw(row, len(context)))
        writers.append(active)
        active = turns.next(context[-1], row.numpy())
    return context[len(PROMPT) :], writers


RULES = [EntropyTurns(1.2), EntropyTurns(0.8, window=2, stay=1), ForealTurns(3), ForealTurns(4, probability=0.5)]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_text_is_that_of_turns_without_drafts(rule, temperature):
    expected, writers = written_token_by_token(rule, 5, temperature, 90)
    assert set(writers) == {SMALL, LARGE}
    for make in (None, Oracle, AlwaysWrong, lambda model: RandomTrees(), lambda model: "merged"):
        small, large = Small(), Large()
        drafters = (None, None) if make is None else (make(small), make(large))
        result = cascade(
            small,
            large,
            PROMPT,
            rule=rule,
            drafters=drafters,
            budget=9,
            max_new_tokens=90,
            temperature=temperature,
            seed=5,
        )
        assert result.tokens == expected
        assert [model for model, count in result.turns for _ in range(count)] == writers
        assert result.large_share == pytest.approx(np.mean(writers))
        assert sum(stats.new_tokens for stats in result.stats) == 90
        assert small.committed[0] == [*PROMPT, *expected][: len(small.committed[0])]


def test_a_model_reads_what_it_missed():
    class Checks(Large):
        def commit(self, paths):
            super().commit(paths)
            assert self.committed[0] == whole[: len(self.committed[0])]

    tokens, _ = written_token_by_token(ForealTurns(2), 0, 0.0, 60)
    whole = [*PROMPT, *tokens]
    result = cascade(Small(), Checks(), PROMPT, rule=ForealTurns(2), max_new_tokens=60)
    assert result.tokens == tokens and result.finish_reason == "length"


def test_one_model_alone_is_plain_generation():
    for threshold, model in ((1e9, Small()), (1e-9, Large())):
        result = cascade(Small(), Large(), PROMPT, rule=EntropyTurns(threshold, stay=1), max_new_tokens=40)
        assert {turn[0] for turn in result.turns[1:]} <= {SMALL if threshold > 1 else LARGE}
        if threshold > 1:
            assert result.tokens == generate(model, PROMPT, drafter=None, max_new_tokens=40).tokens


def test_the_end_of_a_text_is_the_end_of_a_turn():
    class Ends(FakeRunner):
        def logits(self, context):
            logits = super().logits(context)
            logits[EOS] = 40.0 if len(context) == len(PROMPT) + 7 else -40.0
            return logits

    result = cascade(Ends(), Ends(), PROMPT, rule="foreal", drafters=(Oracle(Ends()), Oracle(Ends())), budget=8)
    assert result.finish_reason == "eos" and len(result.tokens) == 8 and result.text is not None


def test_entropy():
    assert entropy_bits(np.zeros(8, np.float32)) == pytest.approx(3)
    row = torch.randn(50)
    law = row.double().softmax(0)
    assert entropy_bits(row.numpy()) == pytest.approx(float(-(law * law.log2()).sum()), abs=1e-12)
    assert entropy_bits(np.array([0, -np.inf], np.float32)) == 0


def test_entropy_turns_stay_for_a_while():
    sure, unsure = np.array([50, 0, 0, 0], np.float32), np.zeros(4, np.float32)
    rule = EntropyTurns(1.0, window=2, stay=3).start(0, None, PROMPT)
    said = [rule.next(0, row) for row in (unsure, unsure, unsure, sure, sure, sure, unsure)]
    assert said == [SMALL, SMALL, LARGE, LARGE, LARGE, SMALL, SMALL]


def test_foreal_begins_sentences():
    rule = ForealTurns(2).start(0, lambda token: b"a" if token else b"end. ", PROMPT)
    assert rule.first == LARGE
    assert [rule.next(token, None) for token in (1, 1, 1, 0, 1, 1, 1)] == [
        LARGE,
        SMALL,
        SMALL,
        LARGE,
        LARGE,
        SMALL,
        SMALL,
    ]
    leads = [ForealTurns(1, 0.3).start(seed, lambda token: b"", PROMPT).first for seed in range(400)]
    assert 0.2 < np.mean(leads) < 0.4


def test_rules_have_names():
    assert set(TURN_RULES) == {"entropy", "foreal", "uniroute"}
    assert set(ANSWER_RULES) == {"chow_sum", "chow_average", "chow_quantile", "learned"}


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(rule="none"), ValueError, "rule must be one of entropy, foreal, uniroute, chow_average"),
        (
            dict(rule="foreal", small=FakeRunner(tokenizer=False), large=FakeRunner(tokenizer=False)),
            ValueError,
            "needs text",
        ),
        (dict(tokens=[[97], [98]]), TypeError, "one prompt"),
        (dict(max_tokens=3), TypeError, "unexpected keyword"),
        (dict(drafters=("nothing", None)), ValueError, "drafter must be one of"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    asked = dict(small=FakeRunner(), large=FakeRunner(), tokens=PROMPT) | settings
    with pytest.raises(error, match=message):
        cascade(**asked)


def test_one_runner_twice_is_refused():
    with pytest.raises(ValueError, match="must be two runners"):
        cascade(model := FakeRunner(), model, PROMPT)


def test_models_of_other_vocabularies_are_refused():
    class Larger(FakeRunner):
        vocab_size = EOS + 2

    with pytest.raises(ValueError, match="one vocabulary"):
        cascade(FakeRunner(), Larger(), PROMPT)


@pytest.mark.parametrize("make", [lambda: EntropyTurns(0), lambda: EntropyTurns(window=0), lambda: EntropyTurns(stay=0),
                                  lambda: ForealTurns(0), lambda: ForealTurns(probability=0)])  # fmt: skip
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="must be"):
        make()


# ==== answers ====


class Answers(Small):
    """A model whose answers end, and that is the surer of them the longer the prompt is."""

    def logits(self, context):
        logits = super().logits(context)
        logits[EOS] = 60.0 if len(context) >= len(PROMPT) + 12 else -60.0
        return logits


def logprobs_of(model, context, tokens):
    found = []
    for token in tokens:
        found.append(float(model.logits(context).double().log_softmax(0)[token]))
        context = [*context, token]
    return np.array(found)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("rule", [ChowSum, ChowAverage, ChowQuantile])
def test_an_answer_stands_or_is_given_again(rule, temperature):
    asked = dict(max_new_tokens=30, temperature=temperature, seed=3)
    own = generate(Answers(), PROMPT, drafter=None, **asked)
    logprobs = logprobs_of(Answers(), PROMPT, own.tokens)
    score = {
        ChowSum: logprobs.sum(),
        ChowAverage: logprobs.sum() / len(logprobs),
        ChowQuantile: sorted(logprobs)[0] * 0.9 + sorted(logprobs)[1] * 0.1,
    }[rule]
    settings = {"quantile": 0.1 / (len(logprobs) - 1)} if rule is ChowQuantile else {}
    for threshold, drafters in ((score - 1e-6, (None, None)), (score + 1e-6, ("merged", "merged"))):
        said = []
        result = cascade(
            Answers(), Large(), PROMPT, rule=rule(threshold, **settings), drafters=drafters, stream=said.append, **asked
        )
        assert result.score == pytest.approx(score, abs=1e-9) and "".join(said) == result.text
        if threshold < score:
            assert result.tokens == own.tokens and result.turns == [(SMALL, 13)] and result.large_share == 0
        else:
            assert result.tokens == generate(Large(), PROMPT, drafter=None, **asked).tokens
            assert result.turns == [(SMALL, 13), (LARGE, 30)] and result.large_share == 1


def test_the_learned_rule_is_its_formula():
    generator = np.random.default_rng(0)
    shapes = {"mean": 13, "scale": 13, "hidden": (4, 13), "hidden_bias": 4, "out": 4, "out_bias": ()}
    weights = {name: generator.normal(size=shape) + (3 if name == "scale" else 0) for name, shape in shapes.items()}
    weights["out_bias"] = np.array(0.2)
    logprobs = -generator.exponential(size=9)
    features = [*(np.quantile(logprobs, tenth / 10) for tenth in range(11)), sum(logprobs), sum(logprobs) / 9]
    seen = (np.array(features) - weights["mean"]) / weights["scale"]
    logit = 0.2
    for unit in range(4):
        logit += weights["out"][unit] * np.tanh(weights["hidden"][unit] @ seen + weights["hidden_bias"][unit])
    assert LearnedRule(weights).score(logprobs) == pytest.approx(-logit)
    assert LearnedRule(weights).defers(-0.1) and not LearnedRule(weights).defers(0.0)


def test_a_router_counts_errors_by_cluster(tmp_path):
    sums, words = [[1, 2, 3, each] for each in range(10, 30)], [[7, 8, 9, each] for each in range(30, 50)]
    router = Router([*sums, *words], clusters=2)
    assert len({router.cluster(prompt) for prompt in sums}) == len({router.cluster(prompt) for prompt in words}) == 1
    router.add("small", [*sums[:4], *words[:4]], [0, 0, 1, 0, 1, 1, 1, 1], 0.0)
    router.add("large", [*sums[:4], *words[:4]], [0, 0, 0, 0, 0, 1, 0, 0], 1.0)
    # (sum + mean) / (count + 1)
    by_sums, by_words = router.cluster(sums[0]), router.cluster(words[0])
    assert router.errors["small"][by_sums] == pytest.approx((1 + 5 / 8) / 5)
    assert router.errors["large"][by_words] == pytest.approx((1 + 1 / 8) / 5)
    assert [router.route(prompt, 0.4) for prompt in (sums[9], words[9])] == ["small", "large"]
    assert [router.route(prompt, 9.0) for prompt in (sums[9], words[9])] == ["small", "small"]
    router.save(tmp_path / "routes.npz")
    rule = UniRouteTurns(tmp_path / "routes.npz", price=0.4)
    for prompt, model in ((sums[9], SMALL), (words[9], LARGE)):
        result = cascade(Small(), Large(), prompt, rule=rule, max_new_tokens=9)
        assert result.turns == [(model, 9)]
        assert result.tokens == generate((Small, Large)[model](), prompt, drafter=None, max_new_tokens=9).tokens


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ChowSum(float("nan")), "threshold must be a number"),
        (lambda: ChowQuantile(quantile=1.1), "quantile must be in"),
        (lambda: LearnedRule(), "file must name"),
        (lambda: LearnedRule({"mean": np.zeros(13)}), "file must hold"),
        (lambda: cascade(Small(), Large(), PROMPT, rule="learned"), "file must name"),
        (lambda: Router([]), "prompts must be"),
        (lambda: Router([[1]], clusters=0), "clusters must be"),
        (lambda: Router([[1]]).route([1]), "must know at least one"),
        (lambda: Router([[1]]).add("small", [[1]], [2.0], 1.0), "errors must be"),
        (lambda: Router([[1]]).add("small", [[1]], [1.0], -1.0), "cost must be"),
        (lambda: UniRouteTurns(), "router must be"),
        (lambda: UniRouteTurns(Router([[1]])), "router must know"),
    ],
)
def test_answers_and_routes_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_files_of_another_kind_are_refused(tmp_path):
    (tmp_path / "text").write_text("no arrays")
    for make in (LearnedRule, UniRouteTurns):
        with pytest.raises(ValueError, match="is no file of"):
            make(tmp_path / "text")
