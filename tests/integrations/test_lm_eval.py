from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval")

import pyspec  # noqa: E402
from pyspec.integrations.lm_eval import PyspecLM  # noqa: E402

TASKS = Path(__file__).parent / "lm_eval_task"


@pytest.fixture(scope="module")
def model():
    return PyspecLM(pyspec.load("demo", dtype=torch.float32), batch_size=3)


def requests_of(*arguments):
    return [SimpleNamespace(args=argument) for argument in arguments]


def likelihood(runner, tokens, first):
    """Log likelihood of tokens[first:], one token after another through verify."""
    logits = runner.prefill([tokens[:first]], capacity=len(tokens) + 1)[0]
    total, greedy = 0.0, True
    for token in tokens[first:]:
        law = logits.double().log_softmax(-1)
        total, greedy = total + float(law[token]), greedy and int(law.argmax()) == token
        logits = runner.verify({0: pyspec.DraftTree.chain([token])})[0].logits[0]
        runner.commit({0: [0]})
    return total, greedy


def test_a_task_runs_end_to_end_without_a_network(model, tmp_path, monkeypatch):
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for task in TASKS.glob("*.yaml"):
        text = task.read_text().replace("DATA", str(TASKS / "questions.jsonl"))
        (tmp_path / task.name).write_text(text)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    names = ["pyspec_choices", "pyspec_texts"]
    results = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
    assert results["pyspec_choices"]["acc,none"] >= 0.75
    assert 0 <= results["pyspec_texts"]["exact_match,none"] <= 1


def test_likelihoods_are_those_of_one_token_after_another(model):
    shared = (
        "The following is a question about animals that live in the sea, and a list of answers to choose from. " * 2
    )
    (said,) = model.generate_until(requests_of(("One, two,", {"max_gen_toks": 4})), disable_tqdm=True)
    pairs = [(shared + "Whales are", " mammals"), (shared + "Whales are", " birds and fish"), ("One, two,", said)]
    found = model.loglikelihood(requests_of(*pairs), disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        tokens = model.tok_encode(context + continuation)
        expected = likelihood(model.runner, tokens, len(model.tok_encode(context)))
        assert total == pytest.approx(expected[0], abs=1e-3) and greedy == expected[1]
    assert found[2][1], "it is what greedy decoding says"


def test_rolling_likelihood_is_the_sum_over_windows(model, monkeypatch):
    text = "The quick brown fox jumps over the lazy dog, and the dog sleeps on."
    (whole,) = model.loglikelihood_rolling(requests_of((text,)), disable_tqdm=True)
    tokens = [model.prefix_token_id, *model.tok_encode(text)]
    assert whole == pytest.approx(likelihood(model.runner, tokens, 1)[0], abs=1e-3)
    monkeypatch.setattr(model.runner, "context_length", 9, raising=False)
    (windows,) = model.loglikelihood_rolling(requests_of((text,)), disable_tqdm=True)
    assert windows < whole - 0.1, "shorter contexts know less"


def test_texts_end_at_their_stops_whatever_is_batched(model):
    greedy = {"until": [",", "\n"], "do_sample": False, "max_gen_toks": 12}
    longer = greedy | {"until": "!!", "max_gen_toks": 5}
    asked = [("One two three four", greedy), ("Hello", longer), ("def add(a", greedy), ("Red, green,", greedy)]
    together = model.generate_until(requests_of(*asked), disable_tqdm=True)
    assert together == [model.generate_until(requests_of(one), disable_tqdm=True)[0] for one in asked]
    assert not any("," in text for text in together[::2])
    plain = PyspecLM(model.runner, drafter=None)
    assert together == plain.generate_until(requests_of(*asked), disable_tqdm=True)


def test_chat_templates_are_read_as_special_tokens(model):
    text = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert model.tok_encode(text) == model.tokenizer.chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dtype": "fp7"}, "dtype must be one of"),
        ({"batch_size": "auto"}, "batch_size must be"),
        ({"batch_size": 0}, "batch_size must be"),
    ],
)
def test_bad_arguments(model, options, message):
    with pytest.raises(ValueError, match=message):
        PyspecLM(model.runner, **options)


def test_settings_that_cannot_be_honoured_are_refused(model):
    with pytest.raises(ValueError, match="num_beams"):
        model.generate_until(requests_of(("Hello", {"num_beams": 4})), disable_tqdm=True)
    with pytest.raises(ValueError, match="max_gen_toks must leave room"):
        model.generate_until(requests_of(("Hello", {"max_gen_toks": 10**6})), disable_tqdm=True)
    with pytest.raises(ValueError, match="add_generation_prompt"):
        model.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=False)
