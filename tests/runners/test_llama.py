from functools import cache

import pytest
import torch

import pyspec.runners.native
from pyspec import DraftTree, load
from pyspec.architectures.llama import LlamaWeights
from pyspec.ops.linear import LinearWeight
from tests.helpers.order_dependent import order_dependent_llamas
from tests.helpers.random_llama import random_tokens, random_tree
from tests.helpers.runner_checks import (
    alone_and_together,
    check_commits,
    check_nodes,
    check_prompt,
    check_prompts_refused,
    check_row_rule,
    check_taps,
    check_taps_of,
    check_trees_and_paths_refused,
    expected_logits,
    path_tokens,
)
from tests.helpers.tiny_models import KINDS, tiny_model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (transformers model, runner in fp32), made when first asked for."""

    @cache
    def get(kind):
        model = tiny_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        return model, load(str(folder), dtype=torch.float32, device="cpu")

    return get


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(models, kind, chunk, monkeypatch):
    monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
    model, runner = models(kind)
    check_prompt(runner, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_node_gets_the_logits_of_its_root_path(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(11)
    runner.prefill([prompt])
    check_nodes(runner, model, prompt, random_tree(40))


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_commit_extends_the_state_by_the_path(models, kind):
    model, runner = models(kind)
    check_commits(runner, model)


def test_verify_reads_only(models):
    _, runner = models("llama")
    runner.prefill([random_tokens(9)])
    tree = random_tree(12)
    first = runner.verify({0: tree})[0].logits
    runner.verify({0: random_tree(20, seed=5)})
    assert torch.equal(runner.verify({0: tree})[0].logits, first)
    assert runner.lengths() == [9]


def test_a_ragged_batch_gives_what_each_sequence_gives_alone(models):
    _, runner = models("mistral")
    for alone, together in alone_and_together(runner):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_sequence_that_sits_out_keeps_its_keys(models):
    _, runner = models("llama")
    runner.prefill([random_tokens(4), random_tokens(6, 1), random_tokens(5, 2)], capacity=32)
    before = runner._cache.keys_values[:, :, 1, :, :6].clone()
    runner.verify({0: random_tree(9), 2: random_tree(3)})
    runner.commit({0: [0]})
    assert runner.lengths() == [5, 6, 5]
    assert torch.equal(runner._cache.keys_values[:, :, 1, :, :6], before)


def test_observing_the_prompt_does_not_change_its_last_logits(models):
    _, runner = models("llama")
    prompt = random_tokens(21)
    (observed,) = runner.prefill([prompt], observe=lambda *piece: None)
    assert torch.equal(runner.prefill([prompt])[0], observed)


def test_taps(models):
    model, runner = models("llama")
    check_taps(runner)
    check_taps_of(runner, model)


def test_weights_exist_once(models):
    _, runner = models("llama_tied_with_biases")
    assert runner.weights.head is runner.weights.embedding
    dense = LlamaWeights.empty(runner.config, torch.float32, torch.device("cpu"))
    places = dense.named(runner.config)  # views of the fused matrices, no copies
    assert all(place.is_contiguous() for place in places.values())
    value = places["model.layers.0.self_attn.v_proj.weight"]
    assert value.untyped_storage().data_ptr() == dense.layers[0].qkv.data_ptr()
    for name, values in runner.weights.named(runner.config).items():
        places[name].copy_(values)
    dense.lay_out(torch.float32)
    assert dense.head is dense.embedding and all(
        isinstance(matrix, LinearWeight)
        for layer in dense.layers
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )
    assert torch.equal(dense.head.data, runner.weights.head.data)


def test_prefill_refuses_what_does_not_fit_and_keeps_the_batch(models):
    too_long = ([[1] * 129], {}, r"tokens\[0\] has 129 tokens, the model's context is 128")
    check_prompts_refused(models("llama")[1], too_long)


def test_verify_and_commit_refuse_what_does_not_fit(models):
    _, runner = models("llama")
    check_trees_and_paths_refused(runner)
    runner.prefill([[1, 2, 3]], capacity=8)
    with pytest.raises(ValueError, match="sequence 0 has 3 of 8 slots committed and needs 6 more"):
        runner.verify({0: DraftTree.chain([1] * 6)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int8], ids=str)
def test_rows_do_not_depend_on_what_is_beside_them(models, tmp_path, dtype):
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=dtype, device="cpu")
    check_row_rule(runner)
    prompt, tree = random_tokens(20), random_tree(24)
    runner.prefill([prompt])
    expected = expected_logits(model, prompt + path_tokens(tree, 0))[-1]
    assert (runner.verify({0: tree})[0].logits[0] - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_a_prompt_may_be_read_in_any_chunks(models, tmp_path, dtype, monkeypatch):
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=dtype, device="cpu")
    prompt, found = random_tokens(100), []
    for chunk in (100, 64, 7, 1):
        monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
        (logits,) = runner.prefill([prompt])
        found.append((logits, runner._cache.keys_values[..., : len(prompt), :].clone()))
    for logits, keys_values in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(keys_values, found[0][1])


def test_the_row_rule_tests_have_teeth(models):
    """Where a sum's order depends on the number of rows, so do a row's bits, and nothing but its last ones."""
    _, runner = models("llama")
    prompt, tree = random_tokens(20), random_tree(24)

    def verify(tree):
        runner.prefill([prompt])
        return runner.verify({0: tree})[0].logits

    first = DraftTree.chain([int(tree.tokens[0])])
    expected = verify(first)
    assert torch.equal(verify(tree)[:1], expected)
    with order_dependent_llamas():
        assert not torch.equal(verify(tree)[:1], verify(first))
        torch.testing.assert_close(verify(tree)[:1], expected, atol=1e-4, rtol=1e-4)
