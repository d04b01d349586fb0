"""A Mamba and a Mamba-2 whose recurrences run on the CUDA kernels: on a GPU all of the model, else these kernels on the
CPU through tests/cuda_on_host, between ops of the CPU."""

import importlib
import random

import numpy as np
import pytest
import torch

import pyspec.runners.recurrent
import pyspec.runners.static_rounds
from pyspec import DraftTree, generate
from pyspec.architectures.mamba import MambaConfig, MambaRunner
from pyspec.architectures.mamba2 import Mamba2Config, Mamba2Runner
from pyspec.ops.mamba_layers import mamba_layers_reference
from pyspec.runners.recurrent import StateSpaceWeights
from pyspec.runners.verified import Verified
from tests.helpers.cuda_on_host import op_on_host
from tests.helpers.on_gpu import assert_close
from tests.helpers.random_llama import VOCABULARY, by_slot, random_tokens, random_tree, root_path, verify_all

HAS_GPU = torch.cuda.is_available()
SHARED = {"vocab_size": VOCABULARY, "hidden_size": 48, "layers": 2, "conv_taps": 4, "norm_epsilon": 1e-5}
MODELS = {
    "mamba": (MambaRunner, MambaConfig(**SHARED, channels=96, state_size=16, dt_rank=16)),
    "mamba2": (Mamba2Runner, Mamba2Config(**SHARED, heads=3, head_dim=32, groups=1, state_size=32)),
}


def random_runner(kind: str, device: str, dtype: torch.dtype):
    runner, config = MODELS[kind]
    weights, generator = StateSpaceWeights.empty(config, dtype, torch.device(device)), torch.Generator().manual_seed(0)
    for name, tensor in weights.named(config).items():
        mean, deviation = (1.0, 0.2) if tensor.dim() == 1 else (0.0, 0.3)
        if "dt" in name and "bias" in name or "A_log" in name:
            mean, deviation = -2.0, 1.0
        tensor.copy_(torch.normal(mean, deviation, tensor.shape, generator=generator))
    return runner(config, weights)


@pytest.fixture
def device(monkeypatch):
    if HAS_GPU:
        return "cuda"

    def by_ops(hidden, weights, last_norm, *state, dt_rank, epsilon, dtype):
        *state, round = state
        return mamba_layers_reference(hidden, weights, last_norm, *state, *round.tensors(), dt_rank, epsilon, dtype)

    for name in ("selective_state", "causal_conv"):
        module = importlib.import_module(f"pyspec.ops.{name}")  # the function has its name too
        monkeypatch.setattr(module, "_OP", op_on_host(name)[0])
    monkeypatch.setattr(pyspec.runners.recurrent, "mamba_layers", by_ops)
    return "cpu"


@pytest.mark.parametrize("kind", MODELS)
def test_logits_are_those_of_the_cpu(kind, device, monkeypatch):
    runner = random_runner(kind, device, torch.float32)
    prompt, tree = random_tokens(30), random_tree(17)
    found = [runner.prefill([prompt])[0], runner.verify({0: tree})[0].logits]
    runner.commit({0: root_path(tree, 16)})
    found.append(runner.verify({0: random_tree(3)})[0].logits)
    monkeypatch.undo()
    runner = random_runner(kind, "cpu", torch.float32)
    expected = [runner.prefill([prompt])[0], runner.verify({0: tree})[0].logits]
    runner.commit({0: root_path(tree, 16)})
    expected.append(runner.verify({0: random_tree(3)})[0].logits)
    for ours, other in zip(found, expected, strict=True):
        assert_close(ours.cpu(), other, atol=2e-3 if HAS_GPU else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_rounds_of_a_ragged_batch_have_the_bits_of_plain_decoding(kind, device):
    runner = random_runner(kind, device, torch.bfloat16)
    plain = type(runner)(runner.config, runner.weights)
    generator, texts = random.Random(0), [random_tokens(length, length) for length in (3, 9)]
    runner.prefill(texts)
    for turn in range(12):
        trees = [random_tree(size, turn) if size else None for size in generator.choices((0, 1, 2, 7), k=2)]
        found = verify_all(runner, trees)
        paths = [tree and root_path(tree, generator.randrange(len(tree))) for tree in trees]
        runner.commit(by_slot(paths))
        for text, tree, path, logits in zip(texts, trees, paths, found, strict=True):
            if tree is None:
                continue
            plain.prefill([text])
            for node in path:
                alone = plain.verify({0: DraftTree.chain([int(tree.tokens[node])])})[0].logits
                assert torch.equal(alone[0], logits[node]), turn
                plain.commit({0: [0]})
                text.append(int(tree.tokens[node]))
    assert runner.lengths() == list(map(len, texts))


class FakeRecorder:
    """Repeats a step; as with a graph, it is run once to record it, and every result lies in the same memory."""

    def __init__(self, device):
        pass

    def __call__(self, step):
        result = step()

        def replay():
            for memory, values in zip(result, step(), strict=True):
                if memory is not None:
                    memory.copy_(values)
            return result

        return replay


@torch.inference_mode()
@pytest.mark.parametrize("kind", MODELS)
def test_rounds_of_fixed_shape_have_the_bits_of_launches(kind, device, monkeypatch):
    """Padding, sequences that sit out, more rows than have a graph, records that grow, and a second batch."""
    if not HAS_GPU:
        monkeypatch.setattr(pyspec.runners.recurrent, "GraphRecorder", FakeRecorder)
    monkeypatch.setattr(pyspec.runners.static_rounds, "ROWS", (4, 16))
    static = random_runner(kind, device, torch.bfloat16)
    dynamic = type(static)(static.config, static.weights)
    static._is_static, dynamic._is_static = True, False
    generator = random.Random(0)
    for batch in range(2):
        prompts = [random_tokens(length + batch, length) for length in (3, 9, 1)]
        for ours, other in zip(static.prefill(prompts), dynamic.prefill(prompts), strict=True):
            assert torch.equal(ours, other)
        cache = static._cache
        cache.states[:, 2], cache.windows[:, 2] = torch.nan, torch.nan  # sits out, always
        for turn in range(14):
            sizes = generator.choices((0, 1, 2, 7 if turn < 5 else 17), k=2)
            trees = [*(random_tree(size, turn) if size else None for size in sizes), None]
            found, expected = verify_all(static, trees), verify_all(dynamic, trees)
            for ours, other in zip(found, expected, strict=True):
                assert ours is other is None or torch.equal(ours, other)
            paths = [tree and root_path(tree, generator.randrange(len(tree))) for tree in trees]
            if turn % 5 == 4:
                paths = [None] * 3
            static.commit(by_slot(paths))
            dynamic.commit(by_slot(paths))
        assert static._rounds._replays and dynamic._rounds is None
        assert static._cache is static._rounds.cache and static.lengths() == dynamic.lengths()
        assert torch.equal(cache.states[:, :2], dynamic._cache.states[:, :2])
        assert cache.states[:, 2].isnan().all() and not cache.states[:, :2].isnan().any()


@torch.inference_mode()
def test_what_a_round_gives_outlives_the_next(device, monkeypatch):
    if not HAS_GPU:
        monkeypatch.setattr(pyspec.runners.recurrent, "GraphRecorder", FakeRecorder)
    runner = random_runner("mamba2", device, torch.bfloat16)
    runner._is_static = True
    runner.prefill([[1, 2]])
    verified = runner.verify({0: random_tree(3)})[0]
    first = verified.logits
    before, statistics = first.clone(), Verified(first.clone()).statistics
    second = runner.verify({0: random_tree(3, 1)})[0].logits
    assert not torch.equal(second, before) and torch.equal(first, before)
    assert all(map(np.array_equal, verified.statistics, statistics))


@torch.inference_mode()
@pytest.mark.parametrize("sequences", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_recorded_nor_launched_after_warm(kind, sequences, device, monkeypatch):
    """And all has the bits of launches: prompts, trees of up to 64 nodes, long paths, and a second batch."""
    if not HAS_GPU:
        monkeypatch.setattr(pyspec.runners.recurrent, "GraphRecorder", FakeRecorder)
    static = random_runner(kind, device, torch.bfloat16)
    dynamic = type(static)(static.config, static.weights)
    static._is_static, dynamic._is_static = True, False
    static.warm(sequences=sequences)
    assert static.lengths() == []
    monkeypatch.setattr(static._rounds.cache, "round", lambda *args: pytest.fail("launched"))
    recorded = dict(static._rounds._replays)
    for batch in range(2):
        prompts = [random_tokens(length + batch, length) for length in (70, 1)[:sequences]]
        for ours, other in zip(static.prefill(prompts), dynamic.prefill(prompts), strict=True):
            assert torch.equal(ours, other)
        for size in (64, 1, 33, 5):
            trees = [DraftTree.chain(random_tokens(size)), random_tree(size)][:sequences]
            for ours, other in zip(verify_all(static, trees), verify_all(dynamic, trees), strict=True):
                assert torch.equal(ours, other)
            for runner in (static, dynamic):
                runner.commit(by_slot([range(size), [0]][:sequences]))
    assert static._rounds._replays == recorded
    static.warm(sequences=sequences)
    assert static._rounds._replays == recorded


@pytest.mark.parametrize("kind", MODELS)
def test_drafts_do_not_change_the_text(kind, device):
    runner = random_runner(kind, device, torch.bfloat16)
    plain = generate(runner, random_tokens(6), drafter=None, max_new_tokens=20).tokens
    assert generate(runner, random_tokens(6), drafter="merged", budget=5, max_new_tokens=20).tokens == plain
