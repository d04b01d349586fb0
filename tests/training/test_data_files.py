"""The files that drafts are trained from: what is written is read, in every order, and split by text."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("safetensors")
from training.data_files import HELD_OUT, DraftData, Text, shard_path, write_shard  # noqa: E402

TAPS, HIDDEN, EACH = [1, 2, 4], 8, 30  # texts of a shard


def made(number):
    """A text of its own length, whose tokens and features tell its number."""
    length = 3 + number % 7
    features = (number + torch.arange(length) / 16)[:, None, None].expand(-1, len(TAPS), HIDDEN).clone()
    features[-1] = 0
    return Text(torch.full((length,), number, dtype=torch.int32), 2, features)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps({"model": "tiny", "taps": TAPS}))
    for shard in range(4):
        write_shard(shard_path(tmp_path, shard), [made(EACH * shard + text) for text in range(EACH)])
    return tmp_path


def numbers(data, parts):
    return [int(data.read([text]).tokens[0]) for part in parts for text in part]


def test_texts_are_split_by_their_number(folder):
    learned, held_out = DraftData(folder), DraftData(folder, held_out=True)
    assert numbers(held_out, [range(len(held_out))]) == [HELD_OUT - 1, 2 * HELD_OUT - 1]
    assert sorted(numbers(learned, [range(len(learned))]) + [49, 99]) == list(range(4 * EACH))
    assert learned.taps == (1, 2, 4) and learned.settings["model"] == "tiny"


def test_a_batch_is_its_texts_one_after_another(folder):
    data = DraftData(folder)
    batch, texts = data.read([70, 3, 3]), [made(71), made(3), made(3)]  # 49 is held out
    assert torch.equal(batch.tokens, torch.cat([text.tokens for text in texts]).long())
    assert torch.equal(batch.features, torch.cat([text.features for text in texts]).half())
    lengths = [len(text.tokens) for text in texts]
    assert batch.positions.tolist() == [place for length in lengths for place in range(length)]
    assert batch.texts.tolist() == [text for text, length in enumerate(lengths) for _ in range(length)]
    assert torch.equal(batch.answer, batch.positions >= 2)
    assert batch.features.dtype == torch.float16 and batch.tokens.dtype == torch.int64


def test_parts_have_every_text_once_in_an_order_of_the_seed(folder):
    data = DraftData(folder)
    parts = data.batches(20, seed=3)
    assert sorted(text for part in parts for text in part) == list(range(len(data)))
    assert all(sum(data.lengths[part]) <= 20 for part in parts)
    assert all(sum(data.lengths[[*part, after[0]]]) > 20 for part, after in zip(parts, parts[1:], strict=False))
    assert parts == data.batches(20, seed=3) != data.batches(20, seed=4)
    assert all(len(part) == 1 for part in data.batches(2))  # each is longer


def test_tokens_of_answers(folder):
    data = DraftData(folder, held_out=True)
    assert data.tokens().tolist() == [49] * (made(49).tokens.numel() - 2) + [99] * (made(99).tokens.numel() - 2)
    assert np.array_equal(np.unique(data.tokens(answers=False)), [49, 99])


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"settings.json, which python -m training.data writes, got "):
        DraftData(tmp_path)
    (tmp_path / "settings.json").write_text(json.dumps({"taps": TAPS}))
    with pytest.raises(FileNotFoundError, match=r"shard-00000.safetensors is not there"):
        DraftData(tmp_path)
    text = made(0)
    text.features[1, 2, 3] = 7e4
    with pytest.raises(ValueError, match=r"at most 65504.0 for float16, got 70000.0 in shard-00000"):
        write_shard(shard_path(tmp_path, 0), [text])
    assert [path.name for path in tmp_path.iterdir()] == ["settings.json"]
