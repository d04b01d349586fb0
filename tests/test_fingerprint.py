"""Fingerprints: two fine-tunes of one shape are two models, and one model is one in every dtype."""

import pytest
import torch

from pyspec import GearSettings, from_transformers, generate, load
from pyspec.drafters.ngrammys import model_bigrams
from pyspec.fingerprint import WeightSample, fingerprint_of
from pyspec.machine import store
from tests.helpers.random_llama import random_llama
from tests.helpers.table_drafters import drafter_of
from tests.helpers.tiny_mambas import tiny_mamba


def sample(**tensors) -> str:
    return WeightSample().add(tensors.items()).hexdigest()


@pytest.mark.parametrize(
    "shape", [(), (1,), (70,), (5000,), (3, 7), (300, 500), (1, 9000), (9000, 1), (4, 3, 50), (0, 3)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.bool])
def test_a_sample_is_of_any_tensor_however_it_lies(shape, dtype):
    values = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = sample(w=values)
    assert found == sample(w=values.clone())
    if values.dim() > 1:
        assert found == sample(w=values.mT.contiguous().mT)
    if values.numel() > 1:
        assert found != sample(w=~values if dtype == torch.bool else 1 - values)
    assert found != sample(v=values)


def test_a_small_change_of_all_values_is_seen_and_bits_below_bfloat16_are_not():
    weight = torch.randn(2000, 700, generator=torch.Generator().manual_seed(1))
    update = torch.randn(2000, 1) @ torch.randn(1, 700) * 1e-3  # of rank 1
    assert sample(w=weight) != sample(w=weight + update)
    assert sample(w=weight) == sample(w=weight.bfloat16()) == sample(w=weight.bfloat16().float())


def test_values_of_no_memory_are_left_out():
    assert sample(w=torch.empty(3, 4, device="meta")) == sample(w=torch.empty(3, 4, device="meta"))


def test_description_and_weights_both_count():
    names = {fingerprint_of("llama", *rest) for rest in [("a", "b"), ("a", "c"), ("b", "b")]}
    assert len(names) == 3 and all(name.startswith("llama-") for name in names)


def fine_tuned(model, name: str):
    with torch.no_grad():
        parameter = model.get_parameter(name)
        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
    return model


def tiny_llama():
    import transformers

    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config).eval()


def tiny_gpt2():
    import transformers

    torch.manual_seed(3)
    config = transformers.GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize(
    "build", [tiny_llama, lambda: tiny_mamba("mamba2"), tiny_gpt2], ids=["llama", "mamba2", "gpt2"]
)
def test_every_tensor_of_a_model_counts_in_every_dtype(build):
    if build is tiny_gpt2:
        dtypes = (torch.float32, torch.bfloat16)
        fingerprints = {from_transformers(build().to(dtype)).fingerprint for dtype in dtypes}
    else:
        dtypes = (torch.float32, torch.bfloat16, torch.int8)
        fingerprints = {from_transformers(build(), dtype=dtype).fingerprint for dtype in dtypes}
    assert len(fingerprints) == 1
    names = [name for name, _ in build().named_parameters()]
    for name in names:
        fingerprints.add(from_transformers(fine_tuned(build(), name)).fingerprint)
    assert len(fingerprints) == 1 + len(names)


def test_nothing_of_one_fine_tune_is_taken_for_anothers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = from_transformers(tiny_llama())
    other = from_transformers(fine_tuned(tiny_llama(), "model.layers.1.self_attn.v_proj.weight"))
    one.prefill([[1, 2, 3]], capacity=99, cache=GearSettings(8, 64))
    one.save_cache(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"cache of model {one.fingerprint}, not of {other.fingerprint}"):
        other.load_cache(tmp_path / "cache")
    drafter_of("merged", 97, one.fingerprint).save(tmp_path / "tables")
    with pytest.raises(ValueError, match="fingerprint"):
        drafter_of("merged", 97, other.fingerprint).load(tmp_path / "tables")
    for model in (one, other):
        model_bigrams(model)
        generate(model, [1, 2, 3], max_new_tokens=240)  # whose rounds tell the costs, which are kept now and then
    for kind in ("bigrams", "costs"):
        assert len(list(store.folder().glob(f"{kind}-*"))) == 2


def test_weights_that_come_from_no_checkpoint_have_one_too():
    assert random_llama().fingerprint == random_llama().fingerprint
    assert random_llama(biases=True).fingerprint != random_llama().fingerprint


def test_a_model_is_the_same_from_memory_and_from_its_folder(tmp_path):
    model = tiny_gpt2()
    model.save_pretrained(tmp_path)
    assert from_transformers(model).fingerprint == load(tmp_path, dtype=torch.bfloat16).fingerprint
