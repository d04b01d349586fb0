"""Joint Attainment and Advancement: another way to the same bits."""

import random

import pytest
import torch
from bench_selective_state import random_model
from joint import JointRounds

from pyspec import DraftTree
from pyspec.architectures.mamba import MambaConfig
from pyspec.architectures.mamba2 import Mamba2Config

SHARED = {"vocab_size": 64, "hidden_size": 32, "layers": 2, "conv_taps": 4, "norm_epsilon": 1e-5}
SHAPES = [
    MambaConfig(**SHARED, channels=64, state_size=16, dt_rank=4),
    Mamba2Config(**SHARED, heads=2, head_dim=32, groups=1, state_size=32),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.architecture)
def test_joint_rounds_have_the_bits_of_replay(shape, dtype):
    """In a ragged batch, with rounds that accept a path that is not the last tree's first nodes, or nothing."""
    replay, rng = random_model(shape, dtype, "cpu"), random.Random(1)
    prompts = [[rng.randrange(64) for _ in range(length)] for length in (3, 17, 1)]
    joint = JointRounds(replay.fork(), prompts)
    for found, expected in zip(joint.logits, replay.prefill(prompts), strict=True):
        assert torch.equal(found, expected)
    for _ in range(15):
        trees, paths = {}, {}
        for slot, size in enumerate(rng.choices((1, 2, 7), k=3)):
            parents = [-1] + [rng.randrange(node) for node in range(1, size)]
            trees[slot] = DraftTree([rng.randrange(64) for _ in range(size)], parents)
            node, path = rng.randrange(-1, size), []
            while node >= 0:
                path.insert(0, node)
                node = parents[node]
            paths[slot] = path
        found, expected = joint.verify(trees), replay.verify(trees)
        assert all(torch.equal(found[slot].logits, expected[slot].logits) for slot in trees)
        joint.commit(paths)
        replay.commit({slot: path for slot, path in paths.items() if path})
