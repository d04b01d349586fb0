"""The families that run in AttentionRunner beside Llama's: transformers' logits, and the promises of all runners."""

from functools import cache

import pytest
import torch

from pyspec import load
from pyspec.runners.attention import AttentionRunner
from tests.helpers.random_llama import random_tokens, random_tree
from tests.helpers.runner_checks import (
    check_batches,
    check_commits,
    check_greedy_text,
    check_nodes,
    check_prompt,
    check_row_rule,
    expected_logits,
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
def test_batches_have_the_texts_of_plain_decoding(models, kind):
    _, runner = models(kind)
    check_batches(runner, 20)


@pytest.mark.parametrize("kind", IN_GGUF)
def test_a_gguf_file_is_the_same_model(kind, tmp_path):
    changed, metadata = IN_GGUF[kind]
    model = tiny_model(kind, **changed)
    write_gguf(tmp_path / "tiny.gguf", model, **metadata)
    check_prompt(load(str(tmp_path / "tiny.gguf"), dtype=torch.float32, device="cpu"), model)
