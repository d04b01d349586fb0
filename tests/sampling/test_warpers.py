"""Warpers: each against transformers' or its definition, their order, and the same text with and without drafts."""

import itertools
import math

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from pyspec.acceptance import acceptance_from_name
from pyspec.acceptance.laws import DraftLaws, TargetLaws
from pyspec.generate import generate
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import InvalidLogits, Sampler
from pyspec.sampling.warpers import WARPERS, warpers_from
from pyspec.sampling.warpers.mirostat import zipf_cut
from pyspec.tree import Accepted, DraftTree
from tests.helpers.enumeration import Laws, target_law, text_law, texts_of, total_variation, trees_of
from tests.helpers.fake_drafters import AlwaysWrong, Oracle, RandomTrees
from tests.helpers.fake_runner import EOS, FakeRunner

#: A setting of every warper, for a vocabulary of at least three tokens.
EXAMPLES = {
    "min_p": 0.3,
    "typical_p": 0.6,
    "repetition_penalty": 1.4,
    "frequency_penalty": 0.7,
    "presence_penalty": -0.8,
    "logit_bias": {1: 1.5, "2": -0.5},
    "banned_tokens": [[1, 2], [0]],
    "forced_tokens": [2, 1],
    "mirostat": {"version": 2, "tau": 0.9, "eta": 0.3},
}


class Model:
    vocab_size = 60
    tokenizer = None


def law(settings, logits, prompt=(), text=(), temperature=1.0, **sampler):
    """The law after a prompt and a text, drawn token by token."""
    drawing = Sampler(temperature, seed=0, **sampler, **settings).start(prompt, Model)
    for token in text:
        drawing.draws(DraftTree.chain([0]), Verified(logits[None]))
        drawing.extend(Accepted([0], token))
    return drawing.laws(DraftTree.chain([0]), Verified(logits[None]))(0)


def test_every_warper_has_an_example():
    assert EXAMPLES.keys() == set(WARPERS) - {"grammar"}


@pytest.mark.parametrize(
    "settings, processor",
    [
        ({"min_p": 0.2}, lambda: theirs.MinPLogitsWarper(0.2)),
        ({"typical_p": 0.7}, lambda: theirs.TypicalLogitsWarper(0.7)),
        ({"repetition_penalty": 1.3}, lambda: theirs.RepetitionPenaltyLogitsProcessor(1.3)),
        ({"repetition_penalty": 0.7}, lambda: theirs.RepetitionPenaltyLogitsProcessor(0.7)),
        (
            {"logit_bias": {3: 2.5, 7: -4.0}},
            lambda: theirs.SequenceBiasLogitsProcessor([[[3], 2.5], [[7], -4.0]]),
        ),
        ({"banned_tokens": [9, [3, 4], [8, 3, 5]]}, lambda: theirs.NoBadWordsLogitsProcessor([[9], [3, 4], [8, 3, 5]])),
    ],
)
def test_laws_are_those_of_transformers(settings, processor):
    prompt, text = [5, 11, 5], [7, 8, 3]
    for seed in range(5):
        logits = torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 2
        scores = processor()(torch.tensor([prompt + text]), logits[None].clone())
        expected = scores[0].double().softmax(0)
        torch.testing.assert_close(
            torch.from_numpy(law(settings, logits, prompt, text)), expected, rtol=1e-5, atol=1e-9
        )


def test_the_order_is_that_of_transformers():
    settings = {
        "typical_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.5,
        "logit_bias": {3: 1.0},
        "banned_tokens": [2],
    }
    prompt = [3, 4, 5]
    processors = LogitsProcessorList(
        [
            theirs.SequenceBiasLogitsProcessor([[[3], 1.0]]),
            theirs.RepetitionPenaltyLogitsProcessor(1.5),
            theirs.NoBadWordsLogitsProcessor([[2]]),
            theirs.TemperatureLogitsWarper(0.7),
            theirs.TopKLogitsWarper(30),
            theirs.TopPLogitsWarper(0.9),
            theirs.MinPLogitsWarper(0.05),
            theirs.TypicalLogitsWarper(0.8),
        ]
    )
    for seed in range(10):
        logits = torch.randn(60, generator=torch.Generator().manual_seed(seed)) * 2
        expected = processors(torch.tensor([prompt]), logits[None].clone())[0].double().softmax(0)
        found = law(settings, logits, prompt, temperature=0.7, top_k=30, top_p=0.9)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-9)


def test_penalties_count_the_text_and_not_the_prompt():
    logits = torch.zeros(60)
    found = law({"frequency_penalty": 0.5, "presence_penalty": 0.25}, logits, prompt=[1, 1, 2], text=[3, 4, 3])
    scores = np.zeros(60)
    scores[3], scores[4] = -2 * 0.5 - 0.25, -0.5 - 0.25
    np.testing.assert_allclose(found, np.exp(scores) / np.exp(scores).sum(), rtol=1e-12)


def test_a_text_begins_with_the_forced_tokens():
    result = generate(FakeRunner(), list(b"ab"), drafter=None, max_new_tokens=6, forced_tokens=[120, 121, 122])
    free = generate(FakeRunner(), list(b"abxyz"), drafter=None, max_new_tokens=3)
    assert result.tokens == [120, 121, 122, *free.tokens]


def test_penalties_change_greedy_text_too():
    model = FakeRunner()
    plain = generate(model, list(b"ab"), drafter=None, max_new_tokens=40).tokens
    varied = generate(model, list(b"ab"), drafter=None, max_new_tokens=40, repetition_penalty=50.0).tokens
    assert len(set(varied)) > len(set(plain))


def mirostat_reference(laws, text, version, tau, eta):
    """mu after a text, from the laws [V] before each of its tokens: the definition, in floats."""
    mu = 2 * tau
    for p, token in zip(laws, text, strict=True):
        mu -= eta * ((-math.log2(p[token]) if p[token] else math.inf) - tau)
    return mu


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_steers_the_surprise(version):
    generator = np.random.default_rng(0)
    logits = torch.from_numpy(generator.standard_normal((400, 60)).astype(np.float32) * 2)
    laws = torch.softmax(logits.double(), 1).numpy()
    drawing = Sampler(1.0, seed=1, mirostat={"version": version, "tau": 2.0, "eta": 0.2}).start([], Model)
    text, surprise = [], []
    for step, row in enumerate(logits):
        token = drawing.draws(DraftTree.chain([0]), Verified(row[None]))(0, step)
        mu = mirostat_reference(laws[:step], text, version, 2.0, 0.2)
        shares = drawing.laws(DraftTree.chain([0]), Verified(row[None]))(0)
        bits = np.sort(-np.log2(laws[step]))
        count = max(1, (bits <= mu).sum()) if version == 2 else zipf_cut(bits, mu, 60)
        assert (shares > 0).sum() == count
        drawing.extend(Accepted([0], token))
        text.append(token)
        surprise.append(-math.log2(laws[step][token]))
    assert abs(np.mean(surprise[50:]) - 2.0) < 0.1


def test_mirostats_cut():
    # p_i = 1 / i: s is 1, and k = 2^mu / ln n, + 1
    zipf = np.log2(np.arange(1, 61))
    assert zipf_cut(zipf, 3.0, 60) == round(8 / math.log(60)) + 1
    # p_i = 1 / i^2: s is 2, eps 1
    assert zipf_cut(2 * zipf, 6.0, 60) == round(math.sqrt(64 / (1 - 1 / 60))) + 1
    assert zipf_cut(np.zeros(60), 1.0, 60) == 60
    assert zipf_cut(np.array([0.0, np.inf, np.inf]), 1.0, 3) == 1
    assert zipf_cut(zipf, 1000.0, 60) == 60


# ==== speculation ====

SETTINGS = [{name: setting} for name, setting in EXAMPLES.items()] + [
    {"mirostat": {"version": 1, "tau": 1.2, "eta": 0.5}},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "min_p": 0.05, "mirostat": {"version": 2, "tau": 1.5}},
]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings))
def test_one_seed_gives_one_text_with_speculation_and_without(settings, temperature):
    prompt = list(b"once upon a time")
    if "banned_tokens" in settings:
        settings = {"banned_tokens": [101, [99, 100], [116, 105, 109]]}
    asked = dict(max_new_tokens=60, temperature=temperature, seed=5, **settings)
    plain = generate(FakeRunner(), prompt, drafter=None, **asked)
    assert len(plain.tokens) == 60 and plain.error is None
    for drafter in ("merged", Oracle(FakeRunner()), AlwaysWrong(FakeRunner()), RandomTrees()):
        result = generate(FakeRunner(), prompt, drafter=drafter, budget=12, **asked)
        assert (result.tokens, result.text) == (plain.tokens, plain.text)
    batch = generate(FakeRunner(), [prompt, list(b"abc")], drafter=RandomTrees(), budget=9, **asked)
    assert batch.tokens[0] == plain.tokens


class WarpedLaws(Laws):
    """Laws whose target is warped, by a definition that knows nothing of states."""

    def __init__(self, settings, kind, prompt):
        super().__init__(3, kind)
        self._settings, self._prompt = settings, prompt

    def p(self, text):
        scores = self.logits(text).double().numpy().copy()
        for token, number in self._settings.get("logit_bias", {}).items():
            scores[int(token)] += number
        for token in range(3):
            if token in (*self._prompt, *text) and (penalty := self._settings.get("repetition_penalty")):
                scores[token] *= penalty if scores[token] < 0 else 1 / penalty
            scores[token] -= self._settings.get("frequency_penalty", 0) * text.count(token)
            scores[token] -= self._settings.get("presence_penalty", 0) * (token in text)
        whole = (*self._prompt, *text)
        for sequence in self._settings.get("banned_tokens", []):
            *begin, last = sequence if isinstance(sequence, list) else [sequence]
            if whole[len(whole) - len(begin) :] == tuple(begin):
                scores[last] = -np.inf
        forced = self._settings.get("forced_tokens", [])
        if len(text) < len(forced):
            scores = np.where(np.arange(3) == forced[len(text)], 0.0, -np.inf)
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        if "min_p" in self._settings:
            shares[shares < self._settings["min_p"] * shares.max()] = 0
        if mirostat := self._settings.get("mirostat"):
            before = [self._plain(text[:end]) for end in range(len(text))]
            mu = mirostat_reference(before, text, 2, mirostat["tau"], mirostat["eta"])
            with np.errstate(divide="ignore"):
                bits = -np.log2(shares)
            shares[bits > max(mu, bits.min())] = 0
        return shares / shares.sum()

    def _plain(self, text):
        return WarpedLaws({k: v for k, v in self._settings.items() if k != "mirostat"}, self._kind, self._prompt).p(
            text
        )


@pytest.mark.parametrize("kind", ["dense", "near"])
@pytest.mark.parametrize("rule", ["recursive", "traversal", "block", "with_replacement"])
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"frequency_penalty": 0.9, "presence_penalty": 0.4},
        {"logit_bias": {1: 1.0}, "min_p": 0.4},
        {"banned_tokens": [[1, 2], [2, 2]]},
        {"forced_tokens": [2, 1]},
        {"mirostat": {"version": 2, "tau": 0.9, "eta": 0.3}},
        {"repetition_penalty": 1.3, "min_p": 0.1, "mirostat": {"version": 2, "tau": 1.1, "eta": 0.5}},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_the_law_of_the_text_is_the_warped_one(settings, rule, kind):
    chain = rule in ("block", "with_replacement")
    prompt, length = (0,), 4 if chain else 3
    laws = WarpedLaws(settings, kind, prompt)

    class Shape:
        def grow(self, source, token, budget, noise):
            tokens, parents = [token], [-1]
            for parent in [0, 1, 2] if chain else [0, 0, 1]:
                tokens.append(noise.draw(source.laws(tokens, parents, [parent])[0]))
                parents.append(parent)
            return DraftTree(tokens, parents)

    def judge(tree, p, q, noise):
        sampler = Sampler(1.0, seed=0, **settings).start(prompt, Model)
        rows = torch.stack([laws.logits(text) for text in texts_of(tree.tokens.tolist(), tree.parents.tolist())])
        return acceptance_from_name(rule).judge(tree, TargetLaws(tree, Verified(rows), sampler), DraftLaws(tree), noise)

    emitted, _ = text_law(trees_of(Shape(), laws, 9), judge, laws, length)
    assert total_variation(emitted, target_law(laws, length)) < 1e-12


# ==== bad input ====


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"min_p": 1.5}, ValueError, "min_p must be in"),
        ({"min_p": math.nan}, ValueError, "min_p must be in"),
        ({"typical_p": 0}, ValueError, "typical_p must be in"),
        ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be finite"),
        ({"frequency_penalty": 3}, ValueError, "frequency_penalty must be in"),
        ({"presence_penalty": "1"}, TypeError, "presence_penalty must be a number"),
        ({"logit_bias": [1]}, TypeError, "logit_bias must be numbers by token id"),
        ({"logit_bias": {1: math.inf}}, ValueError, "below infinity"),
        ({"logit_bias": {"one": 1}}, TypeError, "logit_bias must be"),
        ({"logit_bias": {EOS + 1: 1.0}}, ValueError, "logit_bias must hold tokens in"),
        ({"banned_tokens": [[]]}, ValueError, "not empty"),
        ({"banned_tokens": "no"}, TypeError, "banned_tokens must be"),
        ({"banned_tokens": [-1]}, ValueError, "banned_tokens must hold tokens in"),
        ({"forced_tokens": [9999]}, ValueError, "forced_tokens must hold tokens in"),
        ({"mirostat": 3}, ValueError, "version 1 or 2"),
        ({"mirostat": {"tau": 2}}, ValueError, "must have a version"),
        ({"mirostat": {"version": 2, "tau": -1}}, ValueError, "tau must be"),
        ({"max_tokens": 3}, TypeError, "unexpected keyword argument 'max_tokens'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(settings, error, message):
    model = FakeRunner()
    with pytest.raises(error, match=message):
        generate(model, [97], drafter=None, max_new_tokens=3, **settings)
    assert model.now == 0


def test_none_leaves_a_warper_out():
    assert warpers_from({"min_p": None, "mirostat": None}) == []


def test_no_token_left_is_said_and_keeps_the_text():
    model = FakeRunner()
    everything = [[97, token] for token in range(model.vocab_size)]
    result = generate(
        model, [120], drafter="merged", max_new_tokens=50, banned_tokens=everything, forced_tokens=[98, 97]
    )
    assert result.tokens == [98, 97] and result.finish_reason == "error"
    assert "all -inf after banned_tokens" in result.error and "position 2" in result.error


def test_invalid_logits_stay_invalid():
    logits = torch.zeros(60)
    logits[3] = torch.nan
    with pytest.raises(InvalidLogits, match="NaN"):
        law({"forced_tokens": [3]}, logits)


def test_a_rejected_path_leaves_no_state():
    """Laws after every node of a full tree are those of the texts that lead there, whichever are read first."""
    settings = {"mirostat": {"version": 2, "tau": 0.9, "eta": 0.3}, "repetition_penalty": 1.4}
    laws = WarpedLaws(settings, "dense", (0,))
    tokens, parents = [0, *range(3), *range(3), *range(3), *range(3)], [-1, *[0] * 3, *[1] * 3, *[2] * 3, *[3] * 3]
    tree, texts = DraftTree(tokens, parents), texts_of(tokens, parents)
    possible = [
        node
        for node in range(13)
        if all(laws.p(texts[node][:end])[texts[node][end]] for end in range(len(texts[node])))
    ]
    for order in itertools.islice(itertools.permutations(possible), 0, 5000, 500):
        drawing = Sampler(1.0, seed=0, **settings).start((0,), Model)
        found = drawing.laws(tree, Verified(torch.stack([laws.logits(text) for text in texts])))
        for node in order:
            np.testing.assert_allclose(found(node), laws.p(texts[node]), atol=1e-12)
