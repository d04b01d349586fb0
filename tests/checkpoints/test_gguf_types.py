"""GGUF files of every type: values are gguf's own, matrices keep their bits or become what is nearest to them."""

import warnings

import gguf
import numpy as np
import pytest
import torch

from pyspec import load
from pyspec.checkpoints.rare_types import RARE_TYPES
from pyspec.ops.weight_formats import GGUF_KINDS
from tests.helpers import runner_checks
from tests.helpers.random_llama import random_tokens
from tests.helpers.tiny_models import tiny_model, write_gguf

KIND = gguf.GGMLQuantizationType
WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "tie_word_embeddings": True}
NAMES = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
MIXTURES = {  # what llama.cpp's mixtures have in their larger layers, the embedding, and the others
    "Q4_K_M": (KIND.Q6_K, KIND.Q6_K, KIND.Q4_K),
    "Q5_K_M": (KIND.Q6_K, KIND.Q6_K, KIND.Q5_K),
    "Q3_K_M": (KIND.Q5_K, KIND.Q6_K, KIND.Q3_K),
    "Q2_K": (KIND.Q4_K, KIND.Q6_K, KIND.Q2_K),
    "IQ4_XS": (KIND.Q5_K, KIND.Q6_K, KIND.IQ4_XS),
    "IQ3_M": (KIND.Q4_K, KIND.Q6_K, KIND.IQ3_S),
}


def file_of(tmp_path, quantization, kind="qwen2", **changed):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_model(kind, **WIDE | changed), quantization)
    return path


def load_cpu(path, dtype=None):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*of types that no kernel reads", RuntimeWarning)
        return load(str(path), dtype=dtype, device="cpu")


def values_in(path) -> dict[str, torch.Tensor]:
    """The matrices of a file, as gguf itself reads and dequantises them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found[tensor.name.removesuffix(".weight")] = torch.from_numpy(np.ascontiguousarray(values, np.float32))
    return found


def check_values(runner, path, tolerance=0.0):
    """Also of the rows that the embedding gives."""
    expected, named = values_in(path), runner.weights.named(runner.config)
    for layer in range(runner.config.layers):
        for name, ours in NAMES.items():
            found = named[f"model.layers.{layer}.{ours}.weight"]
            torch.testing.assert_close(found, expected[f"blk.{layer}.{name}"], rtol=tolerance, atol=0)
    tokens = torch.tensor([5, 0, 70, 5])
    found = runner.weights.embed(runner.config, tokens)
    torch.testing.assert_close(found, expected["token_embd"][tokens], rtol=tolerance, atol=0)


def check_logits(runner, exact):
    prompt = random_tokens(20)
    found, expected = runner.prefill([prompt])[0], exact.prefill([prompt])[0]
    assert (found - expected).std() < 0.2 * expected.std()  # x has 8 bits, activations have bfloat16's


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_types_that_keep_their_bits(kind, tmp_path):
    path = file_of(tmp_path, KIND[kind.upper()])
    runner, exact = load_cpu(path), load_cpu(path, torch.float32)
    kept = torch.int8 if kind == "q8_0" else kind
    assert runner.weight_dtype == kept and runner.weights.embedding is runner.weights.head
    check_values(runner, path)
    check_values(exact, path)
    assert runner.fingerprint == exact.fingerprint
    check_logits(runner, exact)


@pytest.mark.parametrize("kind", RARE_TYPES)
def test_rare_types_become_the_nearest_format(kind, tmp_path):
    path, rare = file_of(tmp_path, KIND[kind.upper()], kind="qwen2"), RARE_TYPES[kind]
    with pytest.warns(RuntimeWarning, match=rf"no kernel reads \(15 of {kind}\): they are kept as {rare.format}"):
        runner = load(str(path), device="cpu")
    assert runner.weight_dtype == rare.format
    check_values(runner, path, 0.0 if rare.is_exact or kind == "nvfp4" else 0.041)
    exact = load_cpu(path, torch.float32)
    check_values(exact, path)
    check_logits(runner, exact)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name, tmp_path):
    """Queries, keys and values in several types; trees and batches say what plain decoding says."""
    large, embedding, other = MIXTURES[name]

    def kind_of(tensor: str) -> KIND:
        if "embd" in tensor:
            return embedding
        return large if "attn_v" in tensor or tensor.startswith("blk.1.ffn_down") else other

    path = file_of(tmp_path, kind_of)
    runner = load_cpu(path)
    names = [
        RARE_TYPES[kind].format if kind in RARE_TYPES else kind for kind in (k.name.lower() for k in (other, large))
    ]
    layers = runner.weights.layers
    assert layers[0].qkv.dtype == ", ".join(names)
    assert [layer.down.dtype for layer in layers] == names and runner.weights.head.dtype == "q6_k"
    check_values(runner, path)
    check_logits(runner, load_cpu(path, torch.float32))
    runner_checks.check_row_rule(runner)
    runner_checks.check_batches(runner, 8)


@pytest.mark.parametrize("kind", ["Q4_K", "IQ3_S", "TQ2_0"])
def test_heads_in_another_order(kind, tmp_path):
    """llama.cpp's llama: rows of queries and keys are put back in order."""
    path = file_of(tmp_path, KIND[kind], kind="llama", tie_word_embeddings=False)
    queries = values_in(path)["blk.0.attn_q"].view(-1, 32, 2, 256).transpose(1, 2).flatten(0, 2)
    for dtype in (None, torch.float32):
        runner = load_cpu(path, dtype)
        named = runner.weights.named(runner.config)
        assert torch.equal(named["model.layers.0.self_attn.q_proj.weight"], queries)
        assert torch.equal(runner.weights.embed(runner.config, torch.tensor([9]))[0], values_in(path)["token_embd"][9])


@pytest.mark.parametrize("kind", [KIND.F16, KIND.BF16])
def test_floats(kind, tmp_path):
    path = file_of(tmp_path, kind)
    check_values(load_cpu(path, torch.float32), path)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0", "I8", "F64"])
def test_types_that_are_refused_by_name(kind, tmp_path):
    """Before anything is read."""
    path = file_of(tmp_path, lambda name: KIND.Q8_0 if "attn_q" in name else KIND.F32)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 2 * 8
    data[at : at + 4] = int(KIND[kind]).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"tensor blk.0.attn_q.weight has type {kind}, which the package gguf cannot"):
        load(str(path), device="cpu")


def test_values_that_are_not_finite(tmp_path):
    path = file_of(tmp_path, KIND.IQ3_S)
    (tensor,) = (tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_down.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    path.write_bytes(data)
    for dtype in (None, torch.float32):
        with pytest.raises(ValueError, match="tensor model.layers.1.mlp.down_proj.weight has values that are NaN"):
            load_cpu(path, dtype)
