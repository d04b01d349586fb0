"""What the caller has set for torch as a whole changes nothing: default device and dtype, modes, threads, autocast."""

import contextlib
from functools import cache

import pytest
import torch
from random_llama import random_llama, random_tokens, random_tree

import pyspec
from pyspec import generate
from pyspec.caches import CACHES, GearCache
from pyspec.drafting import NAMES, new_drafter
from pyspec.drafting.layer_skip import LayerSkipDrafter
from pyspec.drafting.model import ModelDrafter
from pyspec.growth.dyspec import DySpecThreshold


@contextlib.contextmanager
def default_device():
    """A script's set_default_device("cuda"); meta stands for it on every machine."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def other_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS = {
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
    "threads": other_threads,
    "autocast bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", dtype=torch.float16),
}
PROMPTS = [random_tokens(40, seed=2) * 2, random_tokens(7, seed=3)]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 5}


@cache
def source(name: str):
    """What a runner is made of: a transformers model, made before any setting is."""
    if name == "llama":
        return None
    pytest.importorskip("transformers")
    if name == "bamba":
        from test_bamba import tiny_bamba

        return tiny_bamba("bamba")
    if name.startswith("mamba"):
        from tiny_mambas import tiny_mamba

        return tiny_mamba(name)
    from test_transformers import SUPPORTED, tiny_model

    return tiny_model(name, SUPPORTED[name])


def runner_of(name: str):
    return random_llama(dtype=torch.bfloat16) if name == "llama" else pyspec.models.from_transformers(source(name))


RUNNERS = ["llama", "mamba", "mamba2", "bamba", "GPT2", "Qwen3", "Phi", "Falcon"]


def texts(name: str):
    """Plain and speculated texts of a model, by way of everything that is made on the way."""
    if name == "llama":
        return llama_texts()
    runner = runner_of(name)
    found = [generate(runner, PROMPTS, drafter=None, max_new_tokens=12).tokens]
    found += [generate(runner, PROMPTS, drafter="merged", budget=7, max_new_tokens=12, **SAMPLED).tokens]
    logits = runner.prefill(PROMPTS, capacity=128)
    return found, [row.clone() for row in logits + runner.verify([random_tree(9), None])[:1]]


def llama_texts():
    with torch.device("cpu"), default_dtype(torch.float32):
        source = random_llama(dtype=torch.bfloat16)
    runner = type(source)(source.config, source.weights)
    found = []
    for drafter in [new_drafter(name, runner) for name in NAMES if name != "layer_skip"] + [
        None,
        LayerSkipDrafter(runner, skipped=[0]),
        ModelDrafter(type(source)(source.config, source.weights), runner),
    ]:
        found.append(generate(runner, PROMPTS, drafter=drafter, budget=7, max_new_tokens=12).tokens)
    drawn = ModelDrafter(type(source)(source.config, source.weights), runner, DySpecThreshold(0.05))
    for rule in ("recursive", "traversal"):
        found.append(generate(runner, PROMPTS, drafter=drawn, acceptance=rule, budget=7, max_new_tokens=12, **SAMPLED))
        found[-1] = found[-1].tokens
    long = [random_tokens(190, seed=4)]
    for packed in (*CACHES.values(), GearCache(4, 64, keep=0.5), GearCache(4, 64, key_channels=48, rank=1)):
        found.append(generate(runner, long, drafter="lookup", budget=7, max_new_tokens=12, cache=packed).tokens)
    return found, [row.clone() for row in runner.prefill(PROMPTS)]


@cache
def expected(name: str):
    return texts(name)


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_texts_and_logits_are_the_same(name, setting):
    said, logits = expected(name)
    with SETTINGS[setting]():
        found, rows = texts(name)
    assert found == said
    if not (setting == "threads" and name in ("GPT2", "Qwen3", "Phi", "Falcon")):  # those promise no bits
        assert all(torch.equal(row, other) for row, other in zip(rows, logits, strict=True))
