"""longrope: texts behind a switch have other frequencies at all positions, and are read again when they get there."""

import math

import pytest
import torch

from pyspec import DraftTree, from_transformers, generate, load
from pyspec.caches import cache_from_name
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import random_tokens, random_tree, root_path
from tests.helpers.runner_checks import (
    CLOSE,
    check_greedy_text,
    check_prompt,
    expected_logits,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_models import tiny_model, write_gguf

pytest.importorskip("transformers")
SWITCH = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model("longrope")


@pytest.fixture(scope="module")
def runner(model):
    found = from_transformers(model)
    assert found.config.rope_switch == SWITCH
    return found


@pytest.mark.parametrize("length", [5, SWITCH, SWITCH + 1, 60])
def test_a_prompt_has_the_frequencies_of_its_length(model, runner, length):
    prompt = random_tokens(length)
    torch.testing.assert_close(runner.prefill([prompt])[0], expected_logits(model, prompt)[-1], **CLOSE)


def test_greedy_text_is_that_of_transformers_across_the_switch(model, runner):
    prompt = random_tokens(10, seed=2)
    options = {"max_new_tokens": 34, "do_sample": False, "eos_token_id": None}
    text = model.generate(torch.tensor([prompt]), **options)[0].tolist()
    expected = [expected_logits(model, text[:end])[-1] for end in range(len(prompt), len(text))]
    check_greedy_text(runner, prompt, expected)


@pytest.mark.parametrize("is_graph", [False, True])
def test_batches_across_the_switch_have_the_texts_and_bits_of_each_alone(runner, is_graph, monkeypatch):
    runner = runner.fork()
    if is_graph:
        monkeypatch.setattr("pyspec.runners.native.GraphRecorder", FakeRecorder)
        with_graphs(runner)
    prompts = [random_tokens(length, length) for length in (20, 30, 3, 23)]
    prompts.append(prompts[1][:22])  # begins as a long one does, but is none
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        settings |= {"max_new_tokens": 20}
        alone = [generate(runner, prompt, drafter=None, **settings).tokens for prompt in prompts]
        assert generate(runner, prompts, drafter="merged", budget=6, **settings).tokens == alone


def test_a_tree_behind_the_switch_has_the_bits_of_its_paths(runner):
    prompt, tree = random_tokens(SWITCH - 1), random_tree(12)
    runner.prefill([prompt])
    runner.verify({0: DraftTree.chain([7])})
    runner.commit({0: [0]})
    logits = runner.verify({0: tree})[0].logits
    assert torch.equal(runner.verify({0: tree})[0].logits, logits)
    node = 11
    runner.prefill([prompt])
    steps = plain_steps(runner, [7, *path_tokens(tree, node)])
    assert torch.equal(steps[-1], logits[node])
    runner.prefill([[*prompt, 7, *path_tokens(tree, node)]])  # long from its beginning
    last = runner.verify({0: DraftTree.chain([9])})[0].logits
    runner.prefill([[*prompt, 7]])
    runner.verify({0: tree})
    runner.commit({0: root_path(tree, node)})
    assert torch.equal(runner.verify({0: DraftTree.chain([9])})[0].logits, last)


def test_trees_stay_on_one_side(runner):
    runner.prefill([random_tokens(20)])
    assert runner.room(0) == 4
    runner.verify({0: DraftTree.chain([1] * 4)})
    with pytest.raises(
        ValueError, match=r"trees\[0\] must not reach from one side of position 24 .* positions 20 to 24"
    ):
        runner.verify({0: DraftTree.chain([1] * 5)})
    runner.prefill([random_tokens(25)])
    assert runner.room(0) == runner.context_length - 25


def test_an_interrupt_while_reading_again_is_made_good(runner, monkeypatch):
    prompt = random_tokens(SWITCH)
    runner.prefill([prompt])
    expected = runner.verify({0: DraftTree.chain([5])})[0].logits
    runner.prefill([prompt])
    with monkeypatch.context() as patch:
        patch.setattr(runner._cache, "advance", lambda *piece: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.verify({0: DraftTree.chain([5])})
    assert runner.lengths() == [SWITCH]
    assert torch.equal(runner.verify({0: DraftTree.chain([5])})[0].logits, expected)


def test_quantised_caches_are_refused(runner):
    with pytest.raises(ValueError, match="cache must be dense for a model that turns texts of 24 tokens otherwise"):
        runner.prefill([[1, 2]], cache=cache_from_name("int8"))


def test_a_gguf_file_is_the_same_model(model, tmp_path):
    growth = math.sqrt(1 + math.log(128 / SWITCH) / math.log(SWITCH))
    metadata = {"rope.dimension_count": 48, "rope.scaling.original_context_length": SWITCH}
    write_gguf(tmp_path / "tiny.gguf", model, **metadata, **{"rope.scaling.attn_factor": growth})
    check_prompt(load(str(tmp_path / "tiny.gguf"), dtype=torch.float32, device="cpu"), model)
