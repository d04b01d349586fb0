"""Which tokens a draft head guesses: those that the model says most, so that the head's last matrix is small.

python -m training.data_vocabulary FOLDER 8192      how much of the held-out answers they cover
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import pyspec
from training.data_files import DraftData

__all__ = ["coverage", "head_vocabulary", "main"]


def head_vocabulary(data: DraftData, model, size: int) -> np.ndarray:
    """[size] int64, ascending: all single bytes and special tokens, then what answers have most, lower ids first.

    Args:
        data: texts to learn from.
        model: its runner, for its tokenizer.
        size: tokens of the head.

    Raises:
        ValueError: size is larger than the model's vocabulary, or too small for bytes and special tokens.
    """
    tokenizer, counts = model.tokenizer, np.bincount(data.tokens(), minlength=model.vocab_size)
    known = [token for token in range(model.vocab_size) if tokenizer.backend.id_to_token(token) is not None]
    always = sorted({token for token in known if len(tokenizer.token_bytes(token)) <= 1} | model.eos_tokens)
    if not len(always) <= size <= model.vocab_size:
        raise ValueError(
            f"size must be in [{len(always)}, {model.vocab_size}], from bytes and special tokens to all, got {size}"
        )
    counts[always] = counts.max() + 1
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def coverage(vocabulary: np.ndarray, data: DraftData) -> float:
    """The share of the answers' tokens that a vocabulary has."""
    return float(np.isin(data.tokens(), vocabulary).mean())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that python -m training.data wrote")
    parser.add_argument("sizes", type=int, nargs="+", help="tokens of a head")
    options = parser.parse_args(arguments)
    data, held_out = DraftData(options.folder), DraftData(options.folder, held_out=True)
    model = pyspec.load(data.settings["model"])
    for size in options.sizes:
        print(f"{size} tokens: {coverage(head_vocabulary(data, model, size), held_out):.2%} of held-out answers")


if __name__ == "__main__":
    main()
