"""The files that models.py measures: what both engines read them as."""

import model_files
import pytest
import torch

import pyspec

TINY = {"llama": (64, None), "qwen3": (64, None), "gemma3": (64, 8)}


@pytest.mark.parametrize("architecture", TINY)
def test_random_files_load_with_every_tensor(architecture, tmp_path):
    head_dim, window = TINY[architecture]
    shape = model_files.Shape(architecture, 2, 128, 256, 2, 1, head_dim, 400, 1e4, window)
    model_files._write(shape, "tiny", tmp_path / "tiny.gguf")
    model = pyspec.load(tmp_path / "tiny.gguf", dtype=torch.float32)
    assert model.vocab_size == model.tokenizer.vocab_size == 400
    assert len(pyspec.generate(model, [1, 2, 3], drafter=None, max_new_tokens=2).tokens) > 0


def test_every_token_of_a_vocabulary_comes_of_a_merge():
    texts, merges = model_files.vocabulary(70000)
    assert len(set(texts)) == 70000
    assert [left + right for left, right in (merge.split(" ") for merge in merges)] == texts[256:-1]
