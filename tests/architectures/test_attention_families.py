"""The families that run in AttentionRunner beside Llama's: transformers' logits, and the promises of all runners."""

from functools import cache

import pytest
import torch
from gguf import GGMLQuantizationType

from pyspec import from_transformers, load
from pyspec.caches import cache_from_name
from pyspec.runners.attention import AttentionRunner
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import random_tokens, random_tree, root_path
from tests.helpers.runner_checks import (
    check_batches,
    check_commits,
    check_greedy_text,
    check_nodes,
    check_prompt,
    check_row_rule,
    expected_logits,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_models import IN_GGUF, OTHER_KINDS, tiny_model, write_gguf

pytest.importorskip("transformers")
each_kind = pytest.mark.parametrize("kind", OTHER_KINDS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (transformers model, runner in fp32), made when first asked for."""

    @cache
    def get(kind):
        model = tiny_model(kind)
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        runner = load(str(folder), dtype=torch.float32, device="cpu")
        assert isinstance(runner, AttentionRunner)
        return model, runner

    return get


@each_kind
def test_logits_are_those_of_transformers(models, kind):
    model, runner = models(kind)
    check_prompt(runner, model)


@each_kind
def test_a_tree_has_the_logits_of_its_paths(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(11)
    runner.prefill([prompt])
    check_nodes(runner, model, prompt, random_tree(40))
    check_commits(runner, model)


@each_kind
def test_greedy_text_is_that_of_transformers(models, kind):
    model, runner = models(kind)
    prompt = random_tokens(9)
    text = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
    check_greedy_text(runner, prompt, expected_logits(model, text)[len(prompt) - 1 : -1])


@each_kind
def test_rows_do_not_depend_on_what_is_beside_them(models, kind):
    _, runner = models(kind)
    check_row_rule(runner)


@each_kind
@pytest.mark.parametrize("dtype", [torch.int8, "int4"], ids=str)
def test_rows_in_few_bits_do_not_depend_on_what_is_beside_them(models, kind, dtype):
    model, _ = models(kind)
    check_row_rule(from_transformers(model, dtype=dtype))


@each_kind
def test_batches_have_the_texts_of_plain_decoding(models, kind):
    _, runner = models(kind)
    check_batches(runner, 20)


@pytest.mark.parametrize("kind", IN_GGUF)
def test_a_gguf_file_is_the_same_model(kind, tmp_path):
    changed, metadata = IN_GGUF[kind]
    model = tiny_model(kind, **changed)
    write_gguf(tmp_path / "tiny.gguf", model, **metadata)
    check_prompt(load(str(tmp_path / "tiny.gguf"), dtype=torch.float32, device="cpu"), model)


@pytest.mark.parametrize("kind", ["qwen3", "granite", "olmo2"])
def test_quantised_caches_have_the_scores_of_the_family(kind):
    """int8 keys give about the logits of exact ones, and a tree those of its path, to the bit."""
    runner = from_transformers(tiny_model(kind, max_position_embeddings=1024))
    prompt, tree = random_tokens(400), random_tree(8)
    (dense,) = runner.prefill([prompt])
    (found,) = runner.prefill([prompt], cache=cache_from_name("int8"))
    assert 0 < (found - dense).abs().mean() < 0.05 * dense.std()
    logits = runner.verify({0: tree})[0].logits
    assert torch.equal(plain_steps(runner, path_tokens(tree, 7))[-1], logits[7])


def test_quantised_caches_are_refused_where_scores_are_capped(models):
    _, runner = models("gemma2")
    with pytest.raises(ValueError, match="cache must be dense for a model that caps its scores, got a quantised one"):
        runner.prefill([[1, 2, 3]], cache=cache_from_name("int8"))


@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gemma4", "gemma4_with_experts", "olmo3", "exaone4_with_windows"])
def test_rounds_as_a_gpu_has_them_have_the_same_bits(models, kind, monkeypatch):
    _, runner = models(kind)
    prompts, trees = [random_tokens(20), random_tokens(9, 1)], {0: random_tree(7), 1: random_tree(12, 1)}

    def rounds(runner):
        last = runner.prefill(prompts, capacity=80)
        first = runner.verify(trees)
        runner.commit({0: [0], 1: root_path(trees[1], 11)})
        second = runner.verify({1: trees[0]})
        return [*last, first[0].logits, first[1].logits, second[1].logits]

    expected = rounds(runner.fork())
    monkeypatch.setattr("pyspec.runners.native.GraphRecorder", FakeRecorder)
    for found, logits in zip(rounds(with_graphs(runner.fork())), expected, strict=True):
        assert torch.equal(found, logits)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "phi3", "smollm3", "mixtral", "qwen3_moe"])
def test_a_gguf_file_keeps_its_bits(kind, tmp_path):
    """Joined matrices, those in another order and of experts, and tied embeddings that are scaled, all in 4 bits."""
    changed, metadata = IN_GGUF[kind]
    write_gguf(tmp_path / "tiny.gguf", tiny_model(kind, **changed), GGMLQuantizationType.Q4_0, **metadata)
    exact, runner = (load(str(tmp_path / "tiny.gguf"), dtype=dtype, device="cpu") for dtype in (torch.float32, None))
    assert runner.weight_dtype == "q4_0"
    prompt = random_tokens(40)
    expected, found = exact.prefill([prompt])[0], runner.prefill([prompt])[0]
    assert (found - expected).abs().mean() < (0.2 if runner.config.layers > 2 else 0.1) * expected.std()
    check_row_rule(runner)
