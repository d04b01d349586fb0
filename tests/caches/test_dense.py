import pytest
import torch

from pyspec.caches import DenseCache
from pyspec.caches.dense import MixedCache


def filled_cache(length, written, sequences=3):
    """A cache whose keys at slot s of sequence b in layer l are 1000 l + 100 b + s, and whose values are minus that."""
    cache = DenseCache(2, sequences, 4, 12, 8, torch.float32, torch.device("cpu"))
    for b in range(sequences):
        for layer in range(2):
            slots = 1000.0 * layer + 100 * b + torch.arange(length + written)
            for part, values in zip(cache.keys_values[layer], (slots, -slots), strict=True):
                part[b, :, : length + written] = values[:, None]
        cache.lengths[b] = length
    return cache


@pytest.mark.parametrize("path", [[0], [0, 1, 2], [0, 2], [0, 2, 5], [0, 1, 3, 4, 6], [0, 3, 4, 5, 6]])
def test_commit_keeps_the_path_in_all_layers(path):
    cache = filled_cache(length=4, written=7)
    before = [cache.keys_values[layer, 0].clone() for layer in range(2)]
    cache.commit(1, path)
    assert cache.lengths == [4, 4 + len(path), 4]
    kept = [0, 1, 2, 3, *(4 + node for node in path)]
    for layer in range(2):
        keys, values = cache.keys_values[layer]
        expected = 1000.0 * layer + 100 + torch.tensor(kept)
        assert torch.equal(keys[1, :, : len(kept)], expected[:, None].expand(4, -1, 8))
        assert torch.equal(values[1, :, : len(kept)], -keys[1, :, : len(kept)])
        for other in (0, 2):
            assert torch.equal(keys[other, :, :11], before[layer][other, :, :11])


def test_room_is_checked_against_the_capacity():
    cache = filled_cache(length=4, written=1)
    cache.check_room(0, 8)
    with pytest.raises(ValueError, match="sequence 2 has 4 of 12 slots committed and needs 9 more"):
        cache.check_room(2, 9)


def test_layers_may_differ_in_heads_and_share_keys():
    """Of five layers two write narrow keys and one wide ones, which the last two read."""
    cache = MixedCache(
        [(4, 8), (1, 16), (4, 8), (1, 16), (4, 8)], [0, 1, 2, 1, 2], 2, 12, torch.float32, torch.device("cpu")
    )
    assert [tuple(part.shape) for part in cache.keys_values[:2]] == [(2, 2, 4, 12, 8), (2, 2, 1, 12, 16)]
    assert cache.slots == 12 and cache.device == torch.device("cpu")
    for layer, owner in enumerate([0, 1, 2, 1, 2]):
        assert cache.keys_values[layer].data_ptr() == cache.keys_values[owner].data_ptr()
    for layer in range(3):
        cache.keys_values[layer][:] = 100.0 * layer + torch.arange(12)[:, None]
    view = cache.view([1], 6)
    assert [tuple(part.shape) for part in view.keys_values[:2]] == [(2, 1, 4, 6, 8), (2, 1, 1, 6, 16)]
    view.keys_values[1][:] *= 2  # of the second sequence alone
    cache.lengths[1] = 2
    cache.commit(1, [0, 2])
    cache.copy_prefix(1, 0, 4)
    assert cache.lengths == [4, 4]
    for layer in range(5):
        owner = (0, 1, 2, 1, 2)[layer]
        expected = (100.0 * owner + torch.tensor([0, 1, 2, 4])) * (1 + (owner == 1))
        for sequence in range(2):
            keys = cache.keys_values[layer][:, sequence, :, :4]
            assert torch.equal(keys, expected[:, None].expand_as(keys))
