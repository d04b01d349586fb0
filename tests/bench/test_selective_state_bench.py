"""The rounds that bench_selective_state times: each leaves the state that it claims to."""

import io

import bench_selective_state as bench
import pytest
import torch
from rich.console import Console

from pyspec import DraftTree
from pyspec.architectures.mamba import MambaConfig
from pyspec.architectures.mamba2 import Mamba2Config
from tests.helpers.random_llama import verify_all

SHARED = {"vocab_size": 64, "hidden_size": 32, "layers": 2, "conv_taps": 4, "norm_epsilon": 1e-5}
SHAPES = {
    "Mamba": MambaConfig(**SHARED, channels=64, state_size=16, dt_rank=4),
    "Mamba-2 130M": Mamba2Config(**SHARED, heads=2, head_dim=32, groups=1, state_size=32),
}


def test_every_round_is_timed_and_shown():
    output = io.StringIO()
    for shape, batch in (("Mamba", 1), ("Mamba-2 130M", 16)):
        found = bench.run(shape, "bf16", batch, 2, sizes=(1, 6), shapes=SHAPES)
        ways = {name.split()[0] for name in found["seconds"]}
        assert ways == {"replay", "snapshots", "joint", "recompute", "transformers"}
        assert found["over_plain"]["replay 1"] == 1.0
        bench.show(Console(file=output, width=120), found, sizes=(1, 6))
    assert "snapshots of 6 nodes take" in output.getvalue()


def test_recompute_ends_where_replay_ends():
    states = []
    for way in ("replay", "recompute"):
        torch.manual_seed(0)
        rounds = bench.Rounds(bench.random_model(SHAPES["Mamba-2 130M"], torch.float32, "cpu"), 2)
        getattr(rounds, way)(13)()
        verify_all(rounds.model, [DraftTree.chain([0])] * 2)  # which replays the round before
        states.append(rounds.model.cache.states)
    assert torch.equal(*states)


def test_texts_of_a_trained_model_are_continued(tmp_path):
    pytest.importorskip("tokenizers")
    from training.mamba import Recipe, train

    texts = {"functions": [f"def f{index}(x):\n    return x + {index}\n" * 12 for index in range(100)]}
    recipe = Recipe(vocabulary=280, hidden=32, layers=1, state=16, length=32, batch=2, steps=2, warmup=1)
    train(tmp_path, recipe, texts, torch.device("cpu"))
    found, output = bench.continue_texts(str(tmp_path), "fp32", 3), io.StringIO()
    assert found["equal_to_plain"]["lookup"] == found["equal_to_plain"]["merged"] == bench.PROMPTS
    bench.show_texts(Console(file=output, width=120), found)
    assert "goal 1.5x" in output.getvalue()


def test_bytes_are_those_of_the_published_shapes():
    config = bench.SHAPES["Mamba-2 130M"]
    assert (config.channels, config.heads, config.conv_channels) == (1536, 24, 1792)
    state = config.layers * config.channels * config.state_size * 4
    assert round(state / 1e6, 1) == 18.9
