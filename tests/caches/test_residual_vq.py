"""ResidualVqSettings: its bits, and codebooks that are saved, damaged or of another model.

When blocks are quantised is in test_blocks.py.
"""

import dataclasses

import pytest
import torch

from pyspec.caches import Codebooks, ResidualVqSettings, cache_from_name
from pyspec.caches.codebooks import DEMO_FILE, demo_codebooks
from pyspec.ops.gear import BLOCK
from tests.helpers.quantised_caches import FREQUENCIES, HEAD_DIM, HEADS, LAYERS, SETTINGS, codebooks


def test_effective_bits():
    """At most 3.2 at 8k tokens, of a model with 3 KV heads of 64 as of one with 8 of 128; 2.25 and less a token."""
    small = ResidualVqSettings(codebooks(8, layers=1))
    tables = torch.zeros(1, 2, 8, 256, 32, dtype=torch.float16)
    large = ResidualVqSettings(Codebooks(tables, 8, 128, "large"))
    assert 2.25 < small.effective_bits(64, 8192) <= 3.2 and 2.125 < large.effective_bits(128, 8192) <= 2.6
    assert small.record_bytes(64) * 8 / (2 * 64 * BLOCK) == 2.25 and large.record_bytes(128) * 8 / 2**15 == 2.125
    paper = ResidualVqSettings(Codebooks(tables[..., :1, :].expand(-1, -1, -1, 2048, -1), 8, 128, "large"))
    assert paper.record_bytes(128) * 8 / (2 * 128 * BLOCK) == 2.875  # the paper's 5.5x
    cache = small.start(1, 1, HEADS, 1000, HEAD_DIM, torch.bfloat16, torch.device("cpu"))
    cache.lengths = [1000]
    held = cache.quantised.nbytes + 2 * 2 * HEADS * HEAD_DIM * (1000 - cache.starts[0]) + small.codebooks.tables.nbytes
    assert small.effective_bits(64, 1000) == pytest.approx(8 * held / (2 * HEADS * HEAD_DIM * 1000), rel=1e-3)


# ==== codebooks ====


@pytest.mark.parametrize("frequencies, keys, version", [(None, "post-rope", "1"), (FREQUENCIES, "pre-rope", "2")])
def test_codebooks_come_back_as_they_were_saved(tmp_path, frequencies, keys, version):
    from safetensors import safe_open

    path, books = tmp_path / "books.safetensors", codebooks(5, 2048, frequencies=frequencies)
    books.save(path)
    again = Codebooks.load(path)
    assert again.keys == books.keys == keys and (frequencies is None or torch.equal(again.frequencies, frequencies))
    with safe_open(path, "pt") as file:  # the file says which it is, and older versions refuse what they cannot read
        assert (file.metadata()["keys"], file.metadata()["version"]) == (keys, version)
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
    with pytest.raises(ValueError, match="is of format version 7, this pyspec reads 1 and 2"):
        Codebooks.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(ValueError, match="cut off or damaged: .*frequencies"):
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
        ({"frequencies": torch.ones(64)}, ValueError, r"frequencies must be float32 \[32\] for head_dim 64, got .*64"),
        ({"frequencies": torch.ones(32).half()}, ValueError, "frequencies must be float32"),
    ):
        with pytest.raises(error, match=message):
            dataclasses.replace(good, **change)
    with pytest.raises(TypeError, match="codebooks must be Codebooks, got str"):
        ResidualVqSettings("books.safetensors")
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        ResidualVqSettings(good, window=0)


def test_codebooks_of_another_model_are_refused():
    good = (LAYERS, HEADS, HEAD_DIM, "toy", FREQUENCIES)
    codes, pre_rope = SETTINGS["codes"], SETTINGS["pre-rope codes"]
    codes.check_model(*good)
    pre_rope.check_model(*good)
    for place, other in enumerate((7, 4, 128, "other")):
        model = (*good[:place], other, *good[place + 1 :])
        with pytest.raises(ValueError, match="codebooks must be those of .*: train them with python -m"):
            codes.check_model(*model)
    stretched = FREQUENCIES.clone()
    stretched[7] /= 2
    codes.check_model(*good[:4], stretched)
    with pytest.raises(ValueError, match="pre-rope keys must have the rotary frequencies of the model, .* channel 7,"):
        pre_rope.check_model(*good[:4], stretched)


@pytest.mark.skipif(not DEMO_FILE.is_file(), reason="the demo model's codebooks are not there")
def test_the_name_is_the_demo_models():
    cache = cache_from_name("rvq")
    assert cache == ResidualVqSettings(demo_codebooks()) and cache.codebooks is demo_codebooks()
    assert cache.codebooks.tables.shape == (30, 2, 8, 256, 32) and cache.effective_bits(64, 8192) <= 3.2
