"""The files that drafts are trained from: a model's own texts, and what its layers said of every token.

A folder holds `settings.json` and shards `shard-00000.safetensors`, ..., each of the same number of texts one after
another, each text a prompt and its answer:

    tokens    [N] int32
    answer    [N] bool           the model chose the token; else it is of the prompt
    offsets   [texts + 1] int64  where texts begin, and N
    features  [N, taps, hidden]  float16: the residual stream at the layers `taps` of the settings

`python -m training.data` writes them; DraftData reads them, also while more are being written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["Batch", "DraftData", "Text", "read_settings", "shard_path", "write_shard"]

SETTINGS = "settings.json"
HELD_OUT = 50  # one text of so many is kept to judge by
LARGEST = torch.finfo(torch.float16).max


class Text(NamedTuple):
    """One text.

    Attributes:
        tokens: [n] int32, prompt and answer.
        answer: where the answer begins.
        features: [n, taps, hidden]; the last token's, of which nothing is predicted, are 0.
    """

    tokens: Tensor
    answer: int
    features: Tensor


class Batch(NamedTuple):
    """Texts one after another.

    Row t holds what the target said after it read token t: `features[t, -1]`, normed and multiplied by the target's
    head, is the law of token t + 1. It is worth learning where `answer[t + 1]` holds and both are of one text. The last
    row of a text has no features (they are 0) and nothing to predict.

    Attributes:
        tokens: [n] int64.
        features: [n, taps, hidden] float16 of the layers `DraftData.taps`: the residual stream, not normed, as
            pyspec.runners.Runner.prefill gives it; the last of the taps is what the target's last norm takes in.
        answer: [n] bool, whether the model chose the token (else the token is of a prompt).
        positions: [n] int64, from 0 in each text.
        texts: [n] int64, which of the batch's texts the row is of, from 0.
    """

    tokens: Tensor
    features: Tensor
    answer: Tensor
    positions: Tensor
    texts: Tensor


class DraftData:
    """The texts of a folder, to train drafts from.

        data = DraftData("folder")
        for texts in data.batches(4096, seed=epoch)[done:]:
            batch = data.read(texts)

    Args:
        folder: that `python -m training.data` writes.
        held_out: gives the 2% of the texts that no draft learns from, instead of the others.

    Attributes:
        settings: of the folder: "model", and how its texts were made.
        taps: layers of the features, ascending; the last is the number of the model's layers.
        lengths: [texts] int64, tokens of each text.

    Raises:
        FileNotFoundError: the folder has no settings, or no shard yet.
    """

    def __init__(self, folder: str | Path, *, held_out: bool = False):
        folder = Path(folder)
        self.settings = read_settings(folder)
        if self.settings is None:
            raise FileNotFoundError(f"folder must hold {SETTINGS}, which python -m training.data writes, got {folder}")
        self.taps: tuple[int, ...] = tuple(self.settings["taps"])
        self._shards, self._places = [], []  # (shard, begin, end) of each text
        while (path := shard_path(folder, len(self._shards))).is_file():
            shard = safe_open(path, "pt")  # mapped, and read where it is asked for
            bounds = shard.get_tensor("offsets").tolist()
            first = len(self._shards) * (len(bounds) - 1)
            for number, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False), first):
                if ((number + 1) % HELD_OUT == 0) == held_out:
                    self._places.append((len(self._shards), begin, end))
            self._shards.append(shard)
        if not self._shards:
            raise FileNotFoundError(f"folder must hold shards, {shard_path(folder, 0)} is not there")
        self.lengths = np.array([end - begin for _, begin, end in self._places], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._places)

    def batches(self, size: int, *, seed: int = 0) -> list[list[int]]:
        """The numbers of all texts in an order that a seed draws, split so that each part has at most `size` tokens.

        A text longer than that is a part of its own. The same seed gives the same parts, so that training can go on
        with part k.
        """
        parts, room = [], 0
        for text in np.random.default_rng(seed).permutation(len(self)).tolist():
            if not parts or self.lengths[text] > room:
                parts.append([])
                room = size
            parts[-1].append(text)
            room -= int(self.lengths[text])
        return parts

    def read(self, texts: Sequence[int]) -> Batch:
        """Some texts, by number, one after another."""
        found = [self._of_text(text) for text in texts]
        tokens, answer, features = (torch.cat(parts) for parts in zip(*found, strict=True))
        lengths = torch.tensor([len(part[0]) for part in found])
        positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
        return Batch(
            tokens.long(), features, answer, positions, torch.repeat_interleave(torch.arange(len(found)), lengths)
        )

    def tokens(self, *, answers: bool = True) -> np.ndarray:
        """[n] int32: the tokens of all answers, or of all texts, one after another."""
        found = [self._of_text(text, ("tokens", "answer")) for text in range(len(self))]
        return torch.cat([tokens[answer] if answers else tokens for tokens, answer in found]).numpy()

    def _of_text(self, text: int, names: Sequence[str] = ("tokens", "answer", "features")) -> list[Tensor]:
        shard, begin, end = self._places[text]
        return [self._shards[shard].get_slice(name)[begin:end] for name in names]


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard is, or will be."""
    return folder / f"shard-{number:05}.safetensors"


def read_settings(folder: Path) -> dict | None:
    """The settings of a folder; None if it has none."""
    path = folder / SETTINGS
    return json.loads(path.read_text()) if path.is_file() else None


def write_shard(path: Path, texts: Sequence[Text]) -> None:
    """Writes texts; an interruption leaves nothing under that name.

    Raises:
        ValueError: features are beyond what float16 holds.
    """
    features = torch.cat([text.features for text in texts])
    if (largest := float(features.abs().max())) > LARGEST:
        raise ValueError(f"features must be at most {LARGEST} for float16, got {largest} in {path.name}")
    lengths = [0, *(len(text.tokens) for text in texts)]
    tensors = {
        "tokens": torch.cat([text.tokens for text in texts]),
        "answer": torch.cat([torch.arange(len(text.tokens)) >= text.answer for text in texts]),
        "offsets": torch.tensor(lengths).cumsum(0),
        "features": features.half(),
    }
    part = path.with_suffix(".part")
    save_file(tensors, part)
    part.replace(path)
