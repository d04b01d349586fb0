"""ResidualVqCache: the commit rule over codes, its bits, and codebooks that are saved, damaged or of another model."""

import dataclasses

import pytest
import torch
from test_gear_cache import HEAD_DIM, HEADS, LAYERS, chunks_of, feed, start, state, text_of, write

from pyspec.caches import Codebooks, ResidualVqCache, cache_from_name
from pyspec.caches.codebooks import DEMO_FILE, demo_codebooks
from pyspec.ops import residual_vq_decode
from pyspec.ops.gear import BLOCK
from pyspec.trees import DraftTree


def codebooks(depth=4, codes=256, layers=LAYERS, heads=HEADS, name="toy"):
    words = torch.randn(layers, 2, depth, codes, 32, generator=torch.Generator().manual_seed(depth))
    words *= 0.8 * 0.8 ** torch.arange(depth)[:, None, None]
    return Codebooks(words.half(), heads, HEAD_DIM, name)


SETTINGS = ResidualVqCache(codebooks())


@pytest.mark.parametrize("tokens", [1, 128, 191, 192, 450])
def test_the_chunks_of_a_text_change_no_bit(tokens):
    text, caches = text_of(tokens), []
    for chunks in ([1] * tokens, chunks_of(tokens, SETTINGS.largest_tree, 0), chunks_of(tokens, 3, 2)):
        cache = start(SETTINGS)
        feed(cache, 1, text, chunks)
        caches.append(state(cache, 1))
    for other in caches[1:]:
        for part, expected in zip(other, caches[0], strict=True):
            assert torch.equal(part, expected)
    packed, exact = caches[0]
    assert torch.equal(exact, text[..., tokens - exact.shape[3] :, :])
    for layer in range(LAYERS):  # each by its own layer's codebooks
        k, v = residual_vq_decode(packed[layer, None], SETTINGS.codebooks.tables[layer], HEAD_DIM)
        for found, x in ((k, text[layer, 0]), (v, text[layer, 1])):
            x = x[:, : found.shape[2]]
            assert not len(x[0]) or float((found[0] - x).norm() / x.norm()) < 0.75


def test_a_rejected_tree_leaves_no_trace():
    text = text_of(300)
    for length in (122, 128, 250):
        for kept in (1, 3, 5):
            touched, clean = start(SETTINGS), start(SETTINGS)
            for cache in (touched, clean):
                feed(cache, 0, text, chunks_of(length, SETTINGS.largest_tree, 3))
            nodes = torch.full((LAYERS, 2, HEADS, 6, HEAD_DIM), 55.0)
            nodes[..., :kept, :] = text[..., length : length + kept, :]
            write(touched, 0, nodes)
            touched.commit(0, range(kept))
            for token in range(length, length + kept):
                write(clean, 0, text[..., token : token + 1, :])
                clean.commit(0, [0])
            for part, expected in zip(state(touched, 0), state(clean, 0), strict=True):
                assert torch.equal(part, expected)


def test_nothing_outside_the_buffers_is_written():
    cache, guards = start(SETTINGS), []
    for attribute in ("packed", "keys_values"):
        buffer = getattr(cache, attribute)
        wide = torch.full((buffer.nbytes + 512,), 171, dtype=torch.uint8)
        inside = wide[256 : 256 + buffer.nbytes].view(buffer.dtype).view(buffer.shape)
        inside.copy_(buffer)
        setattr(cache, attribute, inside)
        guards.append(wide)
    feed(cache, 1, text_of(850), chunks_of(850, SETTINGS.largest_tree, 1))
    write(cache, 1, text_of(3))
    rows = cache.rows(1, DraftTree.chain([0] * 3))
    assert cache.attend(1, 1, torch.randn(3, 6, HEAD_DIM), rows).isfinite().all()
    for wide in guards:
        assert (wide[:256] == 171).all() and (wide[-256:] == 171).all()


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, 1e6])
@pytest.mark.parametrize("side, what", [(0, "keys"), (1, "values")])
def test_what_cannot_be_packed_is_refused_and_named(value, side, what):
    cache, text = start(SETTINGS), text_of(256)
    feed(cache, 1, text, [64] * 3)
    before = [part.clone() for part in state(cache, 1)]
    bad = text[..., 192:256, :].clone()
    bad[1, side, 2, 8, 33] = value
    write(cache, 1, bad)
    with pytest.raises(ValueError, match=rf"{what} must be .* layer 1, head 2, position 200, channel 33 of sequence 1"):
        cache.commit(1, range(64))
    assert cache.lengths == [0, 192]
    for part, expected in zip(state(cache, 1), before, strict=True):
        assert torch.equal(part, expected)


def test_effective_bits():
    """At most 3.2 at 8k tokens, of a model with 3 KV heads of 64 as of one with 8 of 128; 2.25 and less a token."""
    small = ResidualVqCache(codebooks(8, layers=1))
    tables = torch.zeros(1, 2, 8, 256, 32, dtype=torch.float16)
    large = ResidualVqCache(Codebooks(tables, 8, 128, "large"))
    assert 2.25 < small.effective_bits(64, 8192) <= 3.2 and 2.125 < large.effective_bits(128, 8192) <= 2.6
    assert small.record_bytes(64) * 8 / (2 * 64 * BLOCK) == 2.25 and large.record_bytes(128) * 8 / 2**15 == 2.125
    paper = ResidualVqCache(Codebooks(tables[..., :1, :].expand(-1, -1, -1, 2048, -1), 8, 128, "large"))
    assert paper.record_bytes(128) * 8 / (2 * 128 * BLOCK) == 2.875  # the paper's 5.5x
    cache = small.start(1, 1, HEADS, 1000, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    cache.lengths = [1000]
    held = cache.packed.nbytes + 2 * 2 * HEADS * HEAD_DIM * (1000 - cache.starts[0]) + small.codebooks.tables.nbytes
    assert small.effective_bits(64, 1000) == pytest.approx(8 * held / (2 * HEADS * HEAD_DIM * 1000), rel=1e-3)


# ==== codebooks ====


def test_codebooks_come_back_as_they_were_saved(tmp_path):
    path, books = tmp_path / "books.safetensors", codebooks(5, 2048)
    books.save(path)
    again = Codebooks.load(path)
    assert again == books and hash(again) == hash(books) and torch.equal(again.tables, books.tables)
    assert again != codebooks(5, 256) and str(books) == str(again)
    assert [file.name for file in tmp_path.iterdir()] == ["books.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    path, books = tmp_path / "books.safetensors", codebooks()
    books.save(path)
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="books.safetensors is cut off or damaged"):
            Codebooks.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"7"'))
    with pytest.raises(ValueError, match="is of format version 7, this pyspec reads 1"):
        Codebooks.load(path)
    save_file({"tables": books.tables}, path)
    with pytest.raises(ValueError, match="does not hold codebooks"):
        Codebooks.load(path)
    with pytest.raises(FileNotFoundError):
        Codebooks.load(tmp_path / "none")


def test_codebooks_that_do_not_exist():
    good = codebooks()
    bad = good.tables.clone()
    bad[1, 0, 2, 9, 3] = torch.nan
    for change, error, message in (
        ({"tables": good.tables.float()}, TypeError, "tables must be float16"),
        ({"tables": good.tables[0]}, ValueError, r"tables must be \[layers, 2, depth, codes, 32\]"),
        ({"tables": bad}, ValueError, "tables must be finite, those of layer 1 are not"),
        ({"head_dim": 80}, ValueError, "head_dim must be one of"),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(good, **change)
    with pytest.raises(TypeError, match="codebooks must be Codebooks, got str"):
        ResidualVqCache("books.safetensors")
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ResidualVqCache(good, window=0)


def test_codebooks_of_another_model_are_refused():
    good = (LAYERS, HEADS, HEAD_DIM, "toy")
    SETTINGS.check_model(*good)
    for place, other in enumerate((7, 4, 128, "other")):
        model = (*good[:place], other, *good[place + 1 :])
        with pytest.raises(ValueError, match="codebooks must be those of .*: train them with python -m"):
            SETTINGS.check_model(*model)


@pytest.mark.skipif(not DEMO_FILE.is_file(), reason="the demo model's codebooks are not there")
def test_the_name_is_the_demo_models():
    cache = cache_from_name("rvq")
    assert cache == ResidualVqCache(demo_codebooks()) and cache.codebooks is demo_codebooks()
    assert cache.codebooks.tables.shape == (30, 2, 8, 256, 32) and cache.effective_bits(64, 8192) <= 3.2
