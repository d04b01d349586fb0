"""What layers with windows and chunks see, counted one by one, and what is said of layers that keep no keys."""

import pytest
import torch

from pyspec.runners.foreign_masks import Sight, masks_of, narrowed, sights_of
from tests.runners.test_foreign import _SHAPE as SHAPE

transformers = pytest.importorskip("transformers")
FULL, SLIDING = "full_attention", "sliding_attention"


def config_of(family, **options):
    return getattr(transformers, f"{family}Config")(**SHAPE, **options)


@pytest.mark.parametrize(
    "family, options, sights",
    [
        ("Llama", {}, {"all": Sight()}),
        ("Mistral", {"sliding_window": 7}, {"all": Sight("sliding_window", 7)}),
        ("Mistral", {"sliding_window": 64, "max_position_embeddings": 64}, {"all": Sight()}),  # it never slides
        ("Gemma2", {"sliding_window": 7}, {SLIDING: Sight("sliding_window", 7), FULL: Sight()}),
        (
            "Llama4Text",
            {"attention_chunk_size": 6, "no_rope_layers": [1, 0]},
            {"chunked_attention": Sight("attention_chunk_size", 6), FULL: Sight()},
        ),
    ],
)
def test_sights_are_those_of_the_configuration(family, options, sights):
    config = config_of(family, **options)
    assert sights_of(config, config.max_position_embeddings) == sights


@pytest.mark.parametrize(
    "family, options, reason",
    [
        ("Lfm2", {"layer_types": ["conv", FULL]}, "its layers of convolution keep a state"),
        ("Qwen3Next", {"layer_types": ["linear_attention", FULL]}, "its layers keep a recurrent state"),
        ("DeepseekV32", {}, "its layers choose the keys that they see by an index"),
    ],
)
def test_layers_without_keys_are_named(family, options, reason):
    assert sights_of(config_of(family, **options), 64).startswith(reason)


@pytest.mark.parametrize("setting", [None, "sliding_window", "attention_chunk_size"])
def test_a_mask_is_what_a_sight_says_by_position(setting):
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(2, 1, 5, 12, generator=generator) < 0.7
    positions, of_keys = (torch.randint(0, 20, (2, size), generator=generator) for size in (5, 12))
    sights = {"one": Sight(setting, 4 if setting else 0), "other": Sight("sliding_window", 2)}
    masks = masks_of(sights, visible, positions, of_keys, torch.float32, "cpu")
    for b, t, s in torch.cartesian_prod(*map(torch.arange, (2, 5, 12))).tolist():
        here, there = int(positions[b, t]), int(of_keys[b, s])
        seen = {None: True, "sliding_window": here - there < 4, "attention_chunk_size": here // 4 == there // 4}
        expected = 0.0 if visible[b, 0, t, s] and seen[setting] else torch.finfo(torch.float32).min
        assert float(masks["one"][b, 0, t, s]) == expected


def test_layers_that_see_the_same_share_a_mask():
    visible, positions = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.int64)
    mask = masks_of({"a": Sight(), "b": Sight()}, visible, positions, positions, torch.float32, "cpu")
    assert isinstance(mask, torch.Tensor) and mask.shape == (1, 1, 1, 1)


def test_a_configuration_is_itself_after_it_was_narrowed():
    config = config_of("Gemma2", sliding_window=7)
    with pytest.raises(KeyError), narrowed(config, sights_of(config, 64), 2) as sights:
        assert config.sliding_window == 2 and sights == {SLIDING: Sight("sliding_window", 2), FULL: Sight()}
        raise KeyError
    assert config.sliding_window == 7
