"""Mamba and Mamba-2: the logits of transformers, and the bits of plain decoding whatever is drafted."""

import random
from functools import cache

import pytest
import torch

import pyspec.runners.native
from pyspec import DraftTree, from_transformers, generate
from pyspec.runners.replay import launch_by_launch
from pyspec.runners.tape import Tape
from tests.helpers.random_llama import random_tokens, random_tree, root_path, verify_all
from tests.helpers.runner_checks import (
    alone_and_together,
    check_batches,
    check_commits,
    check_greedy_text,
    check_nodes,
    check_prompt,
    check_prompts_refused,
    check_row_rule,
    check_taps,
    check_taps_of,
    check_trees_and_paths_refused,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_mambas import FAMILIES, KINDS, Knows, step_by_step, tiny_mamba

pytest.importorskip("transformers")
DTYPES = [torch.bfloat16, torch.float32, torch.float16, torch.int8, "int4"]


@pytest.fixture(scope="module")
def models():
    """kind and dtype -> (transformers model in fp32, runner), made when first asked for."""

    @cache
    def get(kind, dtype=torch.float32):
        model = tiny_mamba(kind)
        return model, from_transformers(model, dtype=dtype)

    return get


# ==== the logits of transformers ====


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(models, kind, chunk, monkeypatch):
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
    model, runner = models(kind)
    check_prompt(runner, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_node_gets_the_logits_of_its_root_path(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(2)  # shorter than the convolution
    runner.prefill([prompt])
    check_nodes(runner, model, prompt, random_tree(40))


@pytest.mark.parametrize("kind", KINDS)
def test_commit_extends_the_state_by_the_path(models, kind):
    model, runner = models(kind)
    check_commits(runner, model)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers_one_token_at_a_time(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(9)
    check_greedy_text(runner, prompt, step_by_step(model, prompt, 64))


# ==== bits ====


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_depend_on_what_is_beside_them(models, kind, dtype):
    check_row_rule(models(kind, dtype)[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_prompt_may_be_read_in_any_chunks(models, kind, dtype, monkeypatch):
    _, runner = models(kind, dtype)
    prompt, found = random_tokens(100), []
    for chunk in (100, 64, 7, 1):
        monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
        (logits,) = runner.prefill([prompt])
        found.append((logits, runner._cache.states.clone(), runner._cache.windows.clone()))
    runner.prefill([prompt[:1]])
    logits = plain_steps(runner, prompt[1:])[-1]
    runner.verify({0: DraftTree.chain([0])})  # which replays the last token
    found.append((logits, runner._cache.states, runner._cache.windows))
    for others in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(others, found[0], strict=True))


def test_verify_reads_only(models):
    _, runner = models("mamba2")
    runner.prefill([random_tokens(9)])
    runner.verify({0: random_tree(5)})
    runner.commit({0: [0]})
    tree = random_tree(12)
    first = runner.verify({0: tree})[0].logits
    runner.verify({0: random_tree(20, seed=5)})
    assert torch.equal(runner.verify({0: tree})[0].logits, first)
    assert runner.lengths() == [10]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_ragged_batch_has_the_bits_of_each_sequence_alone(models, kind):
    for alone, together in alone_and_together(models(kind)[1]):
        assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_thousand_rounds_do_not_drift(models, kind):
    """Random trees, paths, rounds that commit nothing and rounds without drafts: plain decoding's bits to the end."""
    _, runner = models(kind)
    _, plain = models(kind)[0], from_transformers(models(kind)[0])
    generator = random.Random(0)
    runner.prefill([random_tokens(3)])
    plain.prefill([random_tokens(3)])
    for turn in range(1000):
        tree = random_tree(generator.choice((1, 1, 2, 5, 9)), turn)
        logits = runner.verify({0: tree})[0].logits
        node = generator.randrange(-1, len(tree))
        if node < 0:
            continue
        path = root_path(tree, node)
        rows = plain_steps(plain, path_tokens(tree, node))
        assert torch.equal(torch.stack(rows), logits[path]), turn
        runner.commit({0: path})
    assert runner.lengths() == plain.lengths()
    assert runner._cache.states.isfinite().all()


@torch.inference_mode()
@pytest.mark.parametrize("kind", FAMILIES)
def test_sequences_that_sit_out_are_left_alone(models, kind):
    _, runner = models(kind)
    runner.prefill([random_tokens(4), random_tokens(6, 1), random_tokens(5, 2)])
    cache = runner._cache
    before = cache.states[:, 1].clone(), cache.windows[:, 1].clone()
    cache.states[:, 2] = cache.windows[:, 2] = torch.nan
    for _ in range(3):
        logits = runner.verify({0: random_tree(9)})[0].logits
        assert logits.isfinite().all()
        runner.commit({0: [0]})
        for record in (cache.records, cache.conv_records):
            record[:, :, 1:], record[:, :, 0, 1:] = torch.nan, torch.nan
    assert runner.lengths() == [7, 6, 5]
    assert torch.equal(cache.states[:, 1], before[0]) and torch.equal(cache.windows[:, 1], before[1])


def test_taps(models):
    check_taps(models("mamba2")[1])
    model, runner = models("mamba")
    check_taps_of(runner, model, first=1)  # what comes out of its layers, not what goes in


def test_a_new_prompt_starts_from_nothing(models):
    _, runner = models("mamba")
    (first,) = runner.prefill([random_tokens(9)])
    runner.verify({0: random_tree(30)})
    runner.commit({0: [0]})
    assert torch.equal(runner.prefill([random_tokens(9)])[0], first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_drafter_gives_the_plain_text(models, kind, dtype):
    _, runner = models(kind, dtype)
    prompt = random_tokens(12)
    plain = generate(runner, prompt, drafter=None, max_new_tokens=256)
    text = prompt + plain.tokens
    for drafts in ("right", "wrong", "half right", "branches", "sometimes none"):
        result = generate(runner, prompt, drafter=Knows(text, drafts), budget=9, max_new_tokens=256)
        assert result.tokens == plain.tokens, drafts
        assert (result.stats.mean_accepted_length > 8) == (drafts == "right")
        assert (result.stats.mean_accepted_length == 1) == (drafts == "wrong")
    for drafter in ("merged", "lookup", "recycling"):
        result = generate(runner, prompt, drafter=drafter, budget=12, max_new_tokens=64)
        assert result.tokens == plain.tokens[:64], drafter


@pytest.mark.parametrize("kind", FAMILIES)
def test_batches_and_sampling_give_the_plain_texts(models, kind):
    check_batches(models(kind, torch.bfloat16)[1], new_tokens=40)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_tape_gives_the_bits_of_its_ops(models, kind, dtype):
    _, runner = models(kind, dtype)
    trees = [random_tree(24), random_tree(5, 1)]

    def run():
        first = runner.prefill([random_tokens(70), random_tokens(5)])
        second = verify_all(runner, trees)
        runner.commit({0: root_path(trees[0], 23), 1: [0]})
        cache = runner._cache
        return [*first, *second, *verify_all(runner, trees[::-1]), cache.states, cache.windows]

    expected = run()
    with launch_by_launch():
        for found, other in zip(run(), expected, strict=True):
            assert torch.equal(found, other)


# ==== what does not fit ====


def test_prefill_refuses_what_does_not_fit_and_keeps_the_batch(models):
    check_prompts_refused(models("mamba")[1])


def test_verify_and_commit_refuse_what_does_not_fit(models):
    _, runner = models("mamba2")
    check_trees_and_paths_refused(runner)


def test_an_interrupted_verify_ends_the_batch(models, monkeypatch):
    _, runner = models("mamba2")
    runner.prefill([[1, 2, 3]])

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Tape, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.verify({0: DraftTree.chain([1])})
    with pytest.raises(RuntimeError, match="call prefill first"):
        runner.verify({0: DraftTree.chain([1])})
