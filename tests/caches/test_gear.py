"""GearSettings: room, names and bits. When blocks are quantised is in test_blocks.py."""

import pytest
import torch

from pyspec.caches import DenseCache, GearSettings, cache_from_name
from tests.helpers.quantised_caches import HEAD_DIM, feed, start, text_of


def test_room_and_tree_size_are_checked():
    cache = start(GearSettings(window=20), capacity=40)
    feed(cache, 0, text_of(30), [15, 15])
    cache.check_room(0, 10)
    with pytest.raises(ValueError, match="sequence 0 has 30 of 40 slots committed and needs 11 more"):
        cache.check_room(0, 11)
    with pytest.raises(ValueError, match=r"at most 21 nodes with GearSettings\(.*window=20.*\), got 22"):
        cache.check_room(0, 22)


def test_names():
    assert cache_from_name("dense") is None and cache_from_name("gear-2bit") == GearSettings(
        2, 64, rank=4, outliers=2, fitted=True
    )
    assert cache_from_name(GearSettings(8)) == GearSettings(8)
    with pytest.raises(ValueError, match="cache must be one of dense, gear-2bit, .*, or a GearSettings, got 'gear'"):
        cache_from_name("gear")
    with pytest.raises(TypeError, match="cache must be a name or a GearSettings, got 4"):
        cache_from_name(4)
    for window, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="window must be"):
            GearSettings(window=window)


@pytest.mark.parametrize(
    "name, most",
    [("int8", 8.6), ("int4", 4.6), ("gear-2bit", 4.4), ("gear-l-2bit", 3.8), ("kivi-2bit", 3.5)],
)
def test_effective_bits(name, most):
    assert cache_from_name(name).effective_bits(128, 8192) <= most
    assert cache_from_name(name).effective_bits(64, 8192) <= most + 0.05


def test_effective_bits_are_what_is_allocated():
    """Records and the rows that may be read, to the byte."""
    settings = cache_from_name("gear-2bit")
    cache = settings.start(1, 1, 1, 1000, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    cache.lengths = [1000]
    held = cache.quantised.nbytes + 2 * 2 * HEAD_DIM * (1000 - cache.starts[0])
    assert settings.effective_bits(HEAD_DIM, 1000) == pytest.approx(8 * held / (2 * HEAD_DIM * 1000), rel=1e-3)
    dense = DenseCache(1, 1, 1, 8192, HEAD_DIM, torch.bfloat16, torch.device("cpu")).keys_values.nbytes
    assert settings.start(1, 1, 1, 8192, HEAD_DIM, torch.bfloat16, torch.device("cpu")).nbytes < 0.33 * dense
