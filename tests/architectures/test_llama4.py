"""Llama 4: long texts in chunks, every dtype, what files say of its layers, and what is refused."""

import pytest
import torch

from pyspec import from_transformers
from pyspec.architectures import Unsupported
from pyspec.architectures.llama4 import Llama4Config
from pyspec.caches import GearSettings, cache_from_name
from pyspec.checkpoints.huggingface import read_config
from tests.helpers.fake_recorder import with_graphs
from tests.helpers.random_llama import random_tokens, random_tree
from tests.helpers.runner_checks import (
    CLOSE,
    check_quantised,
    check_row_rule,
    expected_logits,
    path_tokens,
    plain_steps,
)
from tests.helpers.tiny_models import tiny_model

SCOUT = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"}
TEXT = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "max_position_embeddings": 10485760,
    "no_rope_layers": [],
    "rope_scaling": {"factor": 16.0, "high_freq_factor": 2.0, "low_freq_factor": 1.0}
    | {"original_max_position_embeddings": 8192, "rope_type": "llama3"},
}


def described(**changed):
    _, config = read_config("here", SCOUT | {"text_config": TEXT | changed})
    return config


def test_a_description_of_each_kind_of_layers():
    config = described()
    assert isinstance(config, Llama4Config) and config.architecture == "llama4"
    assert config.windows[:4] == (8192, 8192, 8192, None) and config.turns[:4] == ("global",) * 3 + ("none",)
    assert all(config.expert_layers) and config.experts == 16 and config.shared_size == config.expert_size == 8192
    assert config.intermediate_size == 16384 and config.norms_heads and config.warming == (0.1, 8192)
    maverick = described(interleave_moe_layer_step=2, num_local_experts=128, use_qk_norm=False)
    assert maverick.expert_layers[:4] == (False, True, False, True) and not maverick.norms_heads
    assert not any(described(max_position_embeddings=8192).windows)


@pytest.mark.parametrize(
    "changed, error, message",
    [
        ({"num_experts_per_tok": 2}, Unsupported, "2 experts of a token, our kernels of Llama 4 have 1"),
        ({"no_rope_layers": [1, 2]}, ValueError, "no_rope_layers must be 0 or 1 for each of 48 layers"),
        ({"layer_types": ["sliding_attention"] * 48}, ValueError, "layer_types must be 48 of full_attention or"),
        ({"attention_chunk_size": 0}, ValueError, "attention_chunk_size must be at least 1, got 0"),
    ],
)
def test_what_is_refused_by_its_name(changed, error, message):
    with pytest.raises(error, match=message):
        described(**changed)


@pytest.mark.parametrize("chunk", [8, 64, 70])
def test_long_texts_are_read_in_chunks(chunk):
    """A prompt in one piece, across the ends of chunks, has the logits of transformers, and the bits of its tokens."""
    model, prompt = tiny_model("llama4", attention_chunk_size=chunk), random_tokens(110)
    runner, pieces = from_transformers(model), []
    runner.prefill([prompt], observe=lambda b, chain, verified: pieces.append(verified.logits))
    logits = torch.cat(pieces)
    torch.testing.assert_close(logits, expected_logits(model, prompt), **CLOSE)
    runner.prefill([prompt[:50]])
    assert torch.equal(torch.stack(plain_steps(runner, prompt[50:])), logits[50:])


def test_a_tree_crosses_the_end_of_a_chunk():
    model, tree = tiny_model("llama4"), random_tree(30)
    runner, prompt = from_transformers(model), random_tokens(22)  # chunks of 8
    runner.prefill([prompt])
    logits = runner.verify({0: tree})[0].logits
    assert max(tree.depths) > 2
    for node in range(30):
        expected = expected_logits(model, prompt + path_tokens(tree, node))[-1]
        torch.testing.assert_close(logits[node], expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, "int4"], ids=str)
def test_rows_do_not_depend_on_what_is_beside_them(dtype):
    check_row_rule(from_transformers(tiny_model("llama4").to(torch.bfloat16), dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_fewer_bits_say_about_the_same(dtype):
    model, prompt = tiny_model("llama4"), random_tokens(40)
    expected = from_transformers(model).prefill([prompt])[0]
    found = from_transformers(model, dtype=dtype).prefill([prompt])[0]
    assert (found - expected).abs().mean() < 0.2 * expected.std()


@pytest.mark.parametrize("chunk", [150, 128, 300])
@pytest.mark.parametrize("cache", ["gear-2bit", GearSettings(4, 64, rank=1, window=30)], ids=str)
def test_a_tree_over_a_quantised_cache_has_the_bits_of_plain_decoding(chunk, cache):
    """Trees that reach from one chunk into the next, whose ends blocks have or not."""
    model = tiny_model("llama4", max_position_embeddings=1024, attention_chunk_size=chunk).to(torch.bfloat16)
    cache = cache_from_name(cache) if isinstance(cache, str) else cache
    check_quantised(from_transformers(model), cache, lengths=(chunk - 3, 2 * chunk - 20, 311))


def test_quantised_keys_say_about_what_exact_ones_do():
    """In chunks, and not in windows or of all tokens."""
    model = tiny_model("llama4", max_position_embeddings=1024, attention_chunk_size=150)
    runner, prompt, tree, found = from_transformers(model), random_tokens(295), random_tree(12), []
    for options in ({}, {"cache": cache_from_name("int8")}):
        runner.prefill([prompt], **options)
        found.append(runner.verify({0: tree})[0].logits)
    dense, within = found
    assert 0 < (within - dense).abs().mean() < 0.05 * dense.std()


def test_quantised_caches_are_refused_on_a_gpu():
    runner = with_graphs(from_transformers(tiny_model("llama4")))
    with pytest.raises(ValueError, match="cache must be dense on a GPU for a model that attends in chunks"):
        runner.prefill([[1, 2, 3]], cache=cache_from_name("int8"))
