"""The rounds that hybrids.py times: all are shown, and a replay leaves the state of plain decoding."""

import io

import hybrids as bench
import pytest
import torch
from rich.console import Console

from pyspec import DraftTree

SHAPE = {
    **bench.SHAPES["Qwen3.5 0.8B"],
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


SPACE = {**bench.SHAPES["Mamba-2 130M"], "vocab_size": 600, "hidden_size": 64, "num_hidden_layers": 2}
SPACE |= {"num_heads": 2, "state_size": 16}


@pytest.mark.parametrize("shape", [SHAPE, SPACE], ids=["hybrid", "state space"])
def test_every_round_is_timed_and_shown(shape):
    pytest.importorskip("transformers")
    output = io.StringIO()
    found = bench.run("tiny", "bf16", 16, 2, sizes=(1, 6), shapes={"tiny": shape})
    assert {name.split()[0] for name in found["seconds"]} == {*bench.WAYS, "transformers"}
    assert found["over_plain"]["replay 1"] == 1.0
    bench.show(Console(file=output, width=120), found, sizes=(1, 6))
    assert "snapshots of 6 nodes take" in output.getvalue()


def test_a_round_leaves_the_state_of_plain_decoding():
    states = []
    for calls in ([6], [1] * 6):
        torch.manual_seed(0)
        rounds = bench.Rounds(bench.random_model(SHAPE, torch.float32, "cpu"), 1)
        for nodes in calls:
            rounds.replay(nodes)()
        rounds.model.verify({0: DraftTree.chain([0])})  # which replays the round before
        states.append(rounds.model.cache.state.states)
    assert torch.equal(*states)


def test_bytes_are_those_of_the_published_shape():
    config = bench.config_of(bench.SHAPES["Qwen3.5 0.8B"])
    assert (config.layers, config.attention_layers, config.head_dim, config.rope_width) == (24, 6, 256, 64)
    shape = config.recurrence
    assert (shape.channels, shape.conv_channels, shape.state_size) == (2048, 6144, 128)
    log, state = shape.record_width + shape.conv_channels, shape.channels * shape.state_size
    assert log / state < 0.05 and shape.record_width / state < 0.02
