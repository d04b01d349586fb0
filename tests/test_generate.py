import copy
import json

import pytest
import torch

from pyspec.drafters import DRAFTERS
from pyspec.generate import generate
from pyspec.tree import DraftTree
from tests.helpers.fake_drafters import AlwaysWrong, Drafts, Oracle, OracleTrees, RandomTrees
from tests.helpers.fake_runner import EOS, FakeRunner, ScriptedRunner
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.runner_checks import observed_taps

PROMPT = list(b"once upon a time")
SAMPLED = dict(temperature=0.9, seed=11)


def drafters(model):
    return [Oracle(model), AlwaysWrong(model), RandomTrees(), OracleTrees(model)]


# ---- the text is the model's own


@pytest.mark.parametrize("settings", [{}, SAMPLED, dict(temperature=1.5, top_k=5, top_p=0.9, seed=3)])
@pytest.mark.parametrize("budget", [1, 2, 7, 40])
def test_any_drafter_and_budget_give_the_plain_text(settings, budget):
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=60, **settings)
    assert len(plain.tokens) == 60
    for drafter in drafters(FakeRunner()):
        result = generate(FakeRunner(), PROMPT, drafter=drafter, budget=budget, max_new_tokens=60, **settings)
        assert (result.tokens, result.text, result.finish_reason) == (plain.tokens, plain.text, "length")


@pytest.mark.parametrize("settings", [{}, SAMPLED])
def test_a_batch_gives_each_prompt_its_own_text(settings):
    prompts = [PROMPT, list(b"a"), list(b"in a hole in the ground there lived"), PROMPT[:5]]
    model = FakeRunner()
    batch = generate(model, prompts, drafter=RandomTrees(), budget=12, max_new_tokens=40, **settings)
    for prompt, tokens, text in zip(prompts, batch.tokens, batch.text, strict=True):
        alone = generate(FakeRunner(), prompt, drafter=None, max_new_tokens=40, **settings)
        assert (tokens, text) == (alone.tokens, alone.text)
    assert batch.finish_reason == ["length"] * 4 and batch.error == [None] * 4
    assert batch.stats.new_tokens == 160


def test_finished_sequences_of_a_batch_sit_out():
    class EndsByPrompt(FakeRunner):
        def logits(self, context):
            logits = super().logits(context)
            logits[EOS] = 30.0 if len(context) >= 10 * context[0] else -30.0
            return logits

    model = EndsByPrompt()
    sat_out = []
    verify = model.verify
    model.verify = lambda trees: sat_out.append([slot not in trees for slot in range(3)]) or verify(trees)
    commits, commit = [], model.commit
    model.commit = lambda paths: commits.append(paths) or commit(paths)
    result = generate(model, [[1, 97], [2, 97], [3, 97]], drafter=Oracle(model), budget=4, max_new_tokens=100)
    assert [len(tokens) for tokens in result.tokens] == [9, 19, 29]
    assert result.finish_reason == ["eos"] * 3
    assert commits[-1] == {} and list(commits[-2]) == [2]
    assert sat_out[0] == [False] * 3 and sat_out[-1] == [True, True, False]


def test_a_text_can_be_resumed():
    whole = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=30, **SAMPLED).tokens
    rest = generate(FakeRunner(), PROMPT + whole[:10], drafter=None, max_new_tokens=20, **SAMPLED).tokens
    assert whole[10:] == rest  # noise belongs to a position in the text, not to a step of a call


def test_without_a_seed_the_stats_tell_which_one_was_taken():
    first = generate(FakeRunner(), PROMPT, drafter=None, temperature=1.0, max_new_tokens=30)
    again = generate(FakeRunner(), PROMPT, drafter=None, temperature=1.0, max_new_tokens=30, seed=first.stats.seed)
    other = generate(FakeRunner(), PROMPT, drafter=None, temperature=1.0, max_new_tokens=30)
    assert first.tokens == again.tokens != other.tokens


# ---- what drafters get


def test_drafters_read_the_prompt_and_every_round():
    model = FakeRunner()
    drafter = Oracle(model)
    result = generate(model, PROMPT, drafter=drafter, budget=5, max_new_tokens=21)
    assert drafter.started == [PROMPT]
    chains = [seen for seen in drafter.observed if len(seen[1]) == len(seen[0])][:4]
    assert sum((tree.tokens.tolist() for tree, _ in chains), []) == PROMPT
    rounds = drafter.observed[4:]
    assert len(rounds) == result.stats.rounds == 4
    assert all(path == [0, 1, 2, 3, 4] for _, path in rounds)


@torch.inference_mode()
def test_drafters_get_the_taps_that_they_ask_for():
    """Those of a text's own prefill, and the text is the one without them."""
    model, prompts = random_llama(), [random_tokens(9), random_tokens(30, 1)]
    plain = generate(model, prompts, drafter=None, max_new_tokens=20)
    kept = {}

    class Tapping(Drafts):
        """One node is wrong, two are right, where the text is known."""

        taps = (1, 3)

        def start(self, prompt):
            started = copy.copy(self)
            started.text = [*prompt, *plain.tokens[prompts.index(prompt)]]
            kept[len(prompt)] = started.rows = []
            return started

        def propose(self, context, budget):
            right = self.text[len(context) : len(context) + 2]
            tree = DraftTree([context[-1], 5, *right], [-1, 0, *(0, 2)[: len(right)]])
            return tree.first(min(budget, len(tree)))

        def observe(self, tree, verified, path):
            self.rows += verified.taps[list(path)]

    assert generate(model, prompts, drafter=Tapping(), budget=6, max_new_tokens=20).tokens == plain.tokens
    for prompt, tokens in zip(prompts, plain.tokens, strict=True):
        expected = observed_taps(model, [[*prompt, *tokens]], (1, 3))[0]
        rows = torch.stack(kept[len(prompt)])
        assert len(rows) >= len(prompt) + 15 and torch.equal(rows, expected[: len(rows)])


@pytest.mark.parametrize(
    "tree, words",
    [
        (DraftTree.chain([0] * 9), "at most 8 nodes"),
        (DraftTree.chain([7, 97]), "below token 7"),
        (None, "outside of"),
    ],
)
def test_a_drafter_that_breaks_its_contract_is_named(tree, words):
    class Broken(Drafts):
        def propose(self, context, budget):
            return tree or DraftTree.chain([context[-1], FakeRunner.vocab_size])

    with pytest.raises(ValueError, match=f"drafter.*{words}"):
        generate(FakeRunner(), PROMPT, drafter=Broken(), budget=8)


# ---- where a text ends


@pytest.mark.parametrize("budget", [1, 3, 16])
@pytest.mark.parametrize("limit", [1, 2, 9, 10])
def test_max_new_tokens_is_exact(budget, limit):
    model = FakeRunner()
    result = generate(model, PROMPT, drafter=Oracle(model), budget=budget, max_new_tokens=limit)
    assert len(result.tokens) == limit and result.finish_reason == "length"


def test_a_text_ends_at_the_models_context():
    model = FakeRunner()
    model.context_length = 30
    result = generate(model, PROMPT, drafter=Oracle(model), budget=16, max_new_tokens=1000)
    assert len(PROMPT) + len(result.tokens) == 30 and result.finish_reason == "length"


def test_end_token_inside_an_accepted_path():
    model = ScriptedRunner([*b"abc", EOS, *b"never said"])
    result = generate(model, [65], drafter=Oracle(model), budget=16)
    assert result.tokens == [*b"abc", EOS]
    assert (result.text, result.finish_reason) == ("abc", "eos")
    assert result.stats.rounds == 1 and result.stats.accepted_lengths == [0, 0, 0, 1]


def test_end_token_first():
    result = generate(ScriptedRunner([]), [65], drafter=None)
    assert (result.tokens, result.text, result.finish_reason, result.stats.rounds) == ([EOS], "", "eos", 0)


# ---- figures


def test_stats_add_up():
    model = FakeRunner()
    drafter = OracleTrees(model)
    result = generate(model, [PROMPT, PROMPT[:4]], drafter=drafter, budget=9, **SAMPLED)
    stats = result.stats
    lengths = stats.accepted_lengths
    assert stats.new_tokens == 512 == 2 + sum(length * count for length, count in enumerate(lengths))
    assert stats.rounds == model.verified
    assert stats.mean_accepted_length == pytest.approx(510 / sum(lengths))
    assert stats.mean_accepted_length == pytest.approx(1 + sum(stats.acceptance_by_depth))
    assert 1 < stats.mean_accepted_length < 5
    assert stats.acceptance_by_depth == sorted(stats.acceptance_by_depth, reverse=True)
    assert stats.prefill_seconds == 1 and stats.verify_seconds == pytest.approx(model.now - 1)  # by the model's clock
    assert stats.total_seconds == model.now and stats.draft_seconds == stats.commit_seconds == 0
    assert stats.tokens_per_second == pytest.approx(510 / (stats.total_seconds - stats.prefill_seconds))
    assert stats.tokens_per_second_with_prefill == pytest.approx(512 / stats.total_seconds)
    assert json.loads(json.dumps(stats.to_dict()))["mean_accepted_length"] == stats.mean_accepted_length


def test_plain_decoding_accepts_one_token_a_round():
    stats = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=20).stats
    assert (stats.rounds, stats.nodes, stats.mean_accepted_length, stats.acceptance_by_depth) == (19, 19, 1.0, [])


def test_perfect_drafts_fill_every_round():
    model = FakeRunner()
    stats = generate(model, PROMPT, drafter=Oracle(model), budget=5, max_new_tokens=21).stats
    assert (stats.rounds, stats.mean_accepted_length, stats.acceptance_by_depth) == (4, 5.0, [1.0] * 4)


def test_one_token_needs_no_round():
    stats = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=1).stats
    assert (stats.rounds, stats.mean_accepted_length, stats.tokens_per_second) == (0, 0.0, 0.0)


# ---- models without a tokenizer, shapes of the input


def test_without_a_tokenizer_there_are_tokens_and_no_text():
    result = generate(FakeRunner(tokenizer=False), PROMPT, drafter=None, max_new_tokens=5)
    assert len(result.tokens) == 5 and result.text is None
    assert generate(FakeRunner(tokenizer=False), [PROMPT], drafter=None, max_new_tokens=5).text is None


def test_tensors_and_tuples_are_prompts_too():
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=5)
    for tokens in (tuple(PROMPT), torch.tensor(PROMPT)):
        assert generate(FakeRunner(), tokens, drafter=None, max_new_tokens=5).tokens == plain.tokens
    batch = generate(FakeRunner(), torch.tensor([PROMPT, PROMPT]), drafter=None, max_new_tokens=5)
    assert batch.tokens == [plain.tokens] * 2


# ---- bad input


@pytest.mark.parametrize(
    "settings, error, words",
    [
        (dict(tokens=[]), ValueError, "tokens must not be empty"),
        (dict(tokens=[PROMPT, []]), ValueError, r"tokens\[1\] must not be empty"),
        (dict(tokens="text"), TypeError, "token ids"),
        (dict(tokens=["text"]), TypeError, "token ids"),
        (dict(tokens=[1.5]), TypeError, "token ids"),
        (dict(tokens=[0, FakeRunner.vocab_size]), ValueError, "vocabulary"),
        (dict(tokens=[-1]), ValueError, "vocabulary"),
        (dict(tokens=[97] * 4096), ValueError, "context of 4096 tokens, got 4096"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=-5), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=10**12), ValueError, "max_new_tokens"),
        (dict(max_new_tokens=1.0), TypeError, "max_new_tokens"),
        (dict(budget=0), ValueError, r"budget must be in \[1, 4096\], got 0"),
        (dict(budget=5000), ValueError, "budget"),
        (dict(budget=True), TypeError, "budget"),
        (dict(stop=""), ValueError, "stop"),
        (dict(stop=["a", ""]), ValueError, "stop"),
        (dict(stop=[3]), ValueError, "stop"),
        (dict(temperature=-1), ValueError, "temperature"),
        (dict(top_p=0), ValueError, "top_p"),
        (dict(acceptance="lossy"), ValueError, "acceptance"),
        (dict(acceptance="traversal", drafter="lookup"), ValueError, 'Use acceptance="exact"'),
    ],
)
def test_bad_input_is_named_before_any_work(settings, error, words):
    model = FakeRunner()
    model.prefill = None
    arguments = dict(tokens=PROMPT, drafter=None) | settings
    with pytest.raises(error, match=words):
        generate(model, **arguments)


def test_text_arguments_need_a_tokenizer():
    for settings in (dict(stop="x"), dict(stream=print)):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}.*tokenizer"):
            generate(FakeRunner(tokenizer=False), PROMPT, drafter=None, **settings)


def test_an_unknown_drafter_is_named():
    with pytest.raises(ValueError, match="'medium'"):
        generate(FakeRunner(), PROMPT, drafter="medium")


@pytest.mark.parametrize("name", sorted(set(DRAFTERS) - {"layer_skip", "mtp"}))
@pytest.mark.parametrize("settings", [{}, SAMPLED, dict(temperature=1e30, seed=3), dict(temperature=1e-30, seed=3)])
def test_named_drafters_give_the_plain_text(name, settings):
    plain = generate(FakeRunner(), PROMPT * 3, drafter=None, max_new_tokens=80, **settings)
    result = generate(FakeRunner(), PROMPT * 3, drafter=name, max_new_tokens=80, **settings)
    assert result.tokens == plain.tokens
