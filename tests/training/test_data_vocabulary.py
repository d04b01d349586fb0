"""The tokens of a head: single bytes and special ones always, then the most frequent of answers."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("safetensors")
from training.data_vocabulary import coverage, head_vocabulary  # noqa: E402

SPELLED = {0: b"", 1: b"a", 2: b"b", **{token: b"word" for token in range(3, 18)}}  # 18 and 19 are padding
TOKENIZER = SimpleNamespace(
    backend=SimpleNamespace(id_to_token=lambda token: "token" if token < 18 else None), token_bytes=SPELLED.get
)
MODEL = SimpleNamespace(tokenizer=TOKENIZER, vocab_size=20, eos_tokens=frozenset({17}))


def texts(*tokens):
    return SimpleNamespace(tokens=lambda: np.array(tokens, dtype=np.int32))


def test_what_is_said_most_is_kept():
    data = texts(9, 9, 9, 5, 5, 12, 4, 2)
    assert head_vocabulary(data, MODEL, 6).tolist() == [0, 1, 2, 5, 9, 17]
    assert head_vocabulary(data, MODEL, 7).tolist() == [0, 1, 2, 4, 5, 9, 17]  # of equals the lower
    assert head_vocabulary(data, MODEL, 20).tolist() == list(range(20))
    assert coverage(head_vocabulary(data, MODEL, 6), texts(9, 2, 3, 12)) == 0.5


@pytest.mark.parametrize("size", (3, 21))
def test_sizes_that_cannot_be(size):
    with pytest.raises(ValueError, match=rf"size must be in \[4, 20\], .* got {size}"):
        head_vocabulary(texts(5), MODEL, size)
