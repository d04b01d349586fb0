"""What the caller has set for torch as a whole changes nothing: default device and dtype, modes, threads, autocast."""

from functools import cache

import pytest
import torch

from pyspec import from_transformers, generate, load
from pyspec.caches import CACHES, GearSettings, cache_from_name
from pyspec.drafters import DRAFTERS, new_drafter
from pyspec.drafters.layer_skip import LayerSkipDrafter
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes.dyspec import DySpecThreshold
from pyspec.runners.attention import AttentionRunner
from tests.helpers.random_llama import random_llama, random_tokens, random_tree
from tests.helpers.torch_settings import SETTINGS, default_dtype

PROMPTS = [random_tokens(40, seed=2) * 2, random_tokens(7, seed=3)]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 5}


@cache
def source(name: str):
    """What a runner is made of: a transformers model, made before any setting is."""
    pytest.importorskip("transformers")
    if name == "bamba":
        from tests.helpers.tiny_hybrids import tiny_hybrid

        return tiny_hybrid("bamba")
    if name.startswith("mamba"):
        from tests.helpers.tiny_mambas import tiny_mamba

        return tiny_mamba(name)
    from tests.runners.test_foreign import SUPPORTED, tiny_model

    return tiny_model(name, SUPPORTED[name])


FOREIGN = ["GPT2", "Qwen3", "Phi", "Falcon"]  # which promise no bits
RUNNERS = ["llama", "mamba", "mamba2", "bamba", *FOREIGN]


def texts(name: str):
    """Plain and speculated texts of a model, by way of everything that is made on the way."""
    if name == "llama":
        return llama_texts()
    runner = from_transformers(source(name))
    found = [generate(runner, PROMPTS, drafter=None, max_new_tokens=12).tokens]
    found += [generate(runner, PROMPTS, drafter="merged", budget=7, max_new_tokens=12, **SAMPLED).tokens]
    logits = runner.prefill(PROMPTS, capacity=128)
    return found, [row.clone() for row in [*logits, runner.verify({0: random_tree(9)})[0].logits]]


def llama_texts():
    with torch.device("cpu"), default_dtype(torch.float32):  # the test's own weights
        source = random_llama(dtype=torch.bfloat16)
    runner, draft = (AttentionRunner(source.config, source.weights) for _ in range(2))
    drafters = [new_drafter(name, runner) for name in DRAFTERS if name not in ("layer_skip", "mtp")]
    drafters += [None, LayerSkipDrafter(runner, skipped=[0]), ModelDrafter(draft, runner)]
    calls = [{"drafter": drafter} for drafter in drafters]
    drawn = {"drafter": ModelDrafter(draft, runner, DySpecThreshold(0.05))} | SAMPLED
    calls += [drawn | {"acceptance": rule} for rule in ("recursive", "traversal")]
    found = [generate(runner, PROMPTS, budget=7, max_new_tokens=12, **call).tokens for call in calls]
    long = [random_tokens(190, seed=4)]
    named = [cache for cache in map(cache_from_name, CACHES) if isinstance(cache, GearSettings)]
    for quantised in (*named, GearSettings(4, 64, keep=0.5), GearSettings(4, 64, key_channels=48, rank=1)):
        found.append(generate(runner, long, drafter="lookup", budget=7, max_new_tokens=12, cache=quantised).tokens)
    return found, [row.clone() for row in runner.prefill(PROMPTS)]


@cache
def expected(name: str):
    return texts(name)


@pytest.mark.parametrize("name", ["GPT2", "bamba"])
def test_loading_is_the_same(name, tmp_path):
    source(name).save_pretrained(tmp_path)
    expected = load(str(tmp_path), dtype=torch.bfloat16, device="cpu").prefill(PROMPTS)
    for setting, enter in SETTINGS.items():
        with enter():
            found = load(str(tmp_path), dtype=torch.bfloat16, device="cpu")
        logits = found.prefill(PROMPTS)
        assert all(torch.equal(row, other) for row, other in zip(logits, expected, strict=True)), setting


CASES = [(name, setting) for name in RUNNERS for setting in SETTINGS if name not in FOREIGN or setting != "threads"]


@pytest.mark.parametrize("name, setting", CASES)
def test_texts_and_logits_are_the_same(name, setting):
    said, logits = expected(name)
    with SETTINGS[setting]():
        found, rows = texts(name)
    assert found == said
    assert all(torch.equal(row, other) for row, other in zip(rows, logits, strict=True))
