"""GGUF files of hybrids say what the folders say that they were made from."""

import gguf
import pytest
import torch

from pyspec import generate, load
from pyspec.checkpoints.gguf import GGUFFile, read_gguf_config
from tests.helpers.hybrid_gguf import write_hybrid_gguf
from tests.helpers.random_llama import random_tokens
from tests.helpers.runner_checks import check_last
from tests.helpers.tiny_hybrids import tiny_hybrid

pytest.importorskip("transformers")
KIND = gguf.GGMLQuantizationType
KINDS = ["granite", "granite_moe", "falcon_h1", "falcon_h1_gated_first", "lfm2", "lfm2_moe", "nemotron_h"]
KINDS += ["nemotron_h_moe", "jamba", "jamba_moe"]


def load_cpu(path, dtype=torch.float32):
    return load(str(path), dtype=dtype, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_model(kind, tmp_path):
    model = tiny_hybrid(kind)
    write_hybrid_gguf(tmp_path / "tiny.gguf", model)
    runner, prompt = load_cpu(tmp_path / "tiny.gguf"), random_tokens(20)
    check_last(runner, model, tolerance=1e-3)
    plain = generate(runner, prompt, drafter=None, max_new_tokens=20).tokens
    assert generate(runner, prompt, budget=8, max_new_tokens=20).tokens == plain


@pytest.mark.parametrize("kind", ["granite_moe", "falcon_h1", "lfm2_moe", "nemotron_h_moe", "jamba_moe"])
def test_matrices_keep_their_bits(kind, tmp_path):
    sizes = {"hidden_size": 256, "num_attention_heads": 4}
    write_hybrid_gguf(tmp_path / "tiny.gguf", tiny_hybrid(kind, **sizes | _WIDE.get(kind, {})), KIND.Q8_0)
    kept, floats = load_cpu(tmp_path / "tiny.gguf", None), load_cpu(tmp_path / "tiny.gguf")
    assert "int8" in str(kept.weight_dtype)
    prompt = random_tokens(20)
    for ours, exact in zip(kept.prefill([prompt]), floats.prefill([prompt]), strict=True):
        assert torch.nn.functional.cosine_similarity(ours, exact, dim=0) > 0.97
    plain = generate(kept, prompt, drafter=None, max_new_tokens=16).tokens
    assert generate(kept, prompt, budget=8, max_new_tokens=16).tokens == plain


_WIDE = {
    "granite_moe": {"mamba_n_heads": 16, "intermediate_size": 64, "shared_intermediate_size": 64},
    "falcon_h1": {},
    "lfm2_moe": {"moe_intermediate_size": 64},
    "nemotron_h_moe": {"moe_intermediate_size": 64},
    "jamba_moe": {"mamba_dt_rank": 32},
}


def test_what_is_not_there_is_named(tmp_path):
    for kind, changed, message in (
        ("granite", {"ssm.time_step_rank": 7}, "must be heads that share 256 channels, got 7"),
        ("nemotron_h_moe", {"moe_latent_size": 64}, "has expert_group_count above 1 or moe_latent_size"),
        ("lfm2", {"attention.head_count_kv": [1, 1]}, "head_count_kv must be a number for each of 4 layers"),
    ):
        write_hybrid_gguf(tmp_path / "tiny.gguf", tiny_hybrid(kind), **changed)
        with pytest.raises(ValueError, match=message):
            read_gguf_config(GGUFFile(tmp_path / "tiny.gguf"))
