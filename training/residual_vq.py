"""Trains the codebooks of a model's keys and values, for the cache "rvq" (docs/residual_vq.md).

    python -m training.residual_vq MODEL codebooks.safetensors      Ctrl-C, and the same command goes on
    python -m training.residual_vq demo out.safetensors --steps 8   a quick one
    python -m training.residual_vq MODEL codebooks.safetensors --keys pre-rope    of keys before rotary embedding

MODEL is what pyspec.load takes. The model reads pages of Python's documentation, the sources of its standard library
and what --texts names; of each step's keys and values every layer learns its codebooks, level by level: k-means of the
first step's, then exponential moving averages. Codewords that hardly anything is near move to where errors are.
The pages that bench/kv_cache.py measures on, the longest, are left out. Needs the extra `hf`.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor

from pyspec.caches.codebooks import KEYS, Codebooks
from pyspec.ops.gear import BLOCK
from pyspec.ops.residual_vq import (
    WIDTH,
    ResidualVqFormat,
    group_channels,
    nearest,
    rotary_of_blocks,
    scales_of,
    turn_keys,
)
from training.mamba import standard_library

__all__ = ["Quantiser", "Recipe", "documentation", "main", "train"]

HELD_OUT_PAGES = 8  # the longest
EPSILON = 1e-5  # added to the counts
FEW = 0.02  # of the mean count: codewords below it move


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Changing any of it but steps starts anew."""

    depth: int = 8
    codes: int = 256
    length: int = 2048  # tokens of a row
    rows: int = 4  # of a step
    steps: int = 20
    iterations: int = 5  # of the first k-means
    decay: float = 0.99
    seed: int = 0
    keys: str = "post-rope"  # as they are cached, or "pre-rope", before rotary embedding

    def __post_init__(self):
        if self.keys not in KEYS:
            raise ValueError(f"keys must be one of {', '.join(KEYS)}, got {self.keys!r}")


def documentation() -> list[str]:
    """Pages of the language reference, without the longest."""
    return sorted(topics.values(), key=len, reverse=True)[HELD_OUT_PAGES:]


class Reader:
    """Rows of text: a row is documents of one of the sources, drawn at random, one after another."""

    def __init__(self, tokenizer, sources: list[list[str]], recipe: Recipe):
        self.tokenizer, self.recipe = tokenizer, recipe
        self.sources = [source for source in sources if source]

    def rows(self, step: int) -> list[list[int]]:
        """The same for the same step, however often training was interrupted."""
        generator = np.random.default_rng((self.recipe.seed, step))
        found = []
        while len(found) < self.recipe.rows:
            source, row = self.sources[len(found) % len(self.sources)], []
            while len(row) < self.recipe.length:
                text = source[generator.integers(len(source))]
                start = int(generator.integers(max(1, len(text) - 4 * self.recipe.length)))
                row += self.tokenizer.encode(text[start : start + 8 * self.recipe.length])
            found.append(row[: self.recipe.length])
        return found


def vectors(keys_values: Tensor) -> Tensor:
    """[layers, 2, n, 32] fp32 of keys and values [layers, 2, ..., D]: what is quantised, the scale divided out."""
    x = keys_values.float()
    x = x / scales_of(x).float()[..., None]
    return torch.stack([group_channels(x[:, side], side == 1).flatten(1, -2) for side in range(2)], 1)


def _coded(keys_values: Tensor, frequencies: Tensor | None) -> Tensor:
    """Keys and values [2, ..., n, D] from position 0 on with the keys as they were before rotary embedding."""
    if frequencies is None:
        return keys_values
    k, v = keys_values
    rotary = rotary_of_blocks(frequencies, -(-k.shape[-2] // BLOCK))
    return torch.stack((turn_keys(k, rotary, back=True), v.float()))


def _nearest(x: Tensor, codewords: Tensor) -> Tensor:
    """`nearest`, in pieces whose distances stay in the processor's cache."""
    return torch.cat([nearest(part, codewords) for part in x.split(1024)])


class Quantiser:
    """The codebooks of one layer's keys or values as they learn.

    codewords [depth, codes, 32], counts [depth, codes] and sums [depth, codes, 32], all fp32: a codeword is the moving
    average of what was nearest to it, sums over counts.
    """

    def __init__(self, state: Tensor):
        self.state = state  # [depth, codes, 32 + 32 + 1], which a checkpoint holds
        self.codewords, self.sums, counts = state.split((WIDTH, WIDTH, 1), -1)
        self.counts = counts[..., 0]

    def start(self, x: Tensor, iterations: int, generator: torch.Generator) -> None:
        """k-means, level after level, of x [n, 32]."""
        for level in range(len(self.codewords)):
            codewords = x[torch.randperm(len(x), generator=generator)[: self.codewords.shape[1]]]
            for last in [False] * iterations + [True]:
                codes = _nearest(x, codewords)
                counts, sums = self._gather(x, codes, len(codewords))
                if not last:
                    codewords = sums / counts.clamp_min(1)[:, None]
                    self._move(codewords, counts, x, codes, generator)
            self.codewords[level], self.counts[level], self.sums[level] = codewords, counts, codewords * counts[:, None]
            x = x - codewords[codes]

    def step(self, x: Tensor, decay: float, generator: torch.Generator) -> list[float]:
        """One step of the moving averages on x [n, 32]; gives the mean squared error behind each level."""
        errors = []
        for level, codewords in enumerate(self.codewords):
            codes = _nearest(x, codewords)
            left = x - codewords[codes]
            counts, sums = self._gather(x, codes, len(codewords))
            self.counts[level].lerp_(counts, 1 - decay)
            self.sums[level].lerp_(sums, 1 - decay)
            total = self.counts[level].sum()
            smoothed = (self.counts[level] + EPSILON) / (total + len(codewords) * EPSILON) * total
            self.codewords[level] = self.sums[level] / smoothed[:, None]
            moved = self._move(self.codewords[level], self.counts[level], x, codes, generator)
            if len(moved):
                self.counts[level, moved] = total / len(codewords)
                self.sums[level, moved] = self.codewords[level, moved] * self.counts[level, moved, None]
            x = left
            errors.append(float((x * x).mean()))
        return errors

    @staticmethod
    def _gather(x: Tensor, codes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """How many of x have each code, and their sums."""
        counts = torch.bincount(codes, minlength=count).float()
        return counts, torch.zeros(count, WIDTH).index_add_(0, codes, x)

    @staticmethod
    def _move(codewords: Tensor, counts: Tensor, x: Tensor, codes: Tensor, generator: torch.Generator) -> Tensor:
        """Puts codewords with few counts on vectors of x, drawn by their squared errors; returns which."""
        dead = (counts < FEW * counts.mean()).nonzero()[:, 0]
        if len(dead):
            errors = (x - codewords[codes]).square().sum(-1)
            drawn = torch.multinomial(errors + 1e-12, min(len(dead), len(x)), generator=generator)
            dead = dead[: len(drawn)]
            codewords[dead] = x[drawn]
        return dead


def train(runner, out: Path, recipe: Recipe, sources: list[list[str]]) -> Codebooks:
    """Trains, or goes on, and writes the codebooks of a runner's model.

    Args:
        runner: a model with a KV cache, from pyspec.load, on the CPU.
        out: the safetensors file; a checkpoint of every step lies beside it until the end.
        recipe: what is trained.
        sources: lists of texts; every row is of one of them, in turn.

    Raises:
        ValueError: the recipe does not fit the model, or the checkpoint is of another recipe or model.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    config = runner.config
    ResidualVqFormat(recipe.depth, recipe.codes).check_head_dim(config.head_dim)
    vectors_a_step = recipe.rows * recipe.length * config.kv_heads * config.head_dim // WIDTH
    if vectors_a_step < 8 * recipe.codes:
        raise ValueError(f"a step must have {8 * recipe.codes} vectors or more, got {vectors_a_step}: use more rows")
    frequencies = config.rope_frequencies() if recipe.keys == "pre-rope" else None
    reader = Reader(runner.tokenizer, sources, recipe)
    fixed = {name: value for name, value in asdict(recipe).items() if name != "steps"} | {"model": runner.fingerprint}
    state = torch.zeros(config.layers, 2, recipe.depth, recipe.codes, 2 * WIDTH + 1)
    step, checkpoint = 0, out.with_name(out.name + ".checkpoint")
    if checkpoint.is_file():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["recipe"] != fixed:
            raise ValueError(f"{checkpoint} is of another recipe or model: choose another file")
        state, step = kept["state"], kept["step"]
    quantisers = [[Quantiser(part) for part in layer] for layer in state]

    def keep() -> None:
        part = checkpoint.with_name(checkpoint.name + ".part")
        torch.save({"recipe": fixed, "state": state, "step": step}, part)
        part.replace(checkpoint)

    out.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("first k-means", total=recipe.steps, completed=step)
        while step < recipe.steps:
            runner.prefill(reader.rows(step), capacity=recipe.length)
            errors = []
            for layer, keys_values in enumerate(runner.cache.keys_values[..., : runner.lengths()[0], :]):
                for side, x in enumerate(vectors(_coded(keys_values, frequencies)[None])[0]):
                    generator = torch.Generator().manual_seed(recipe.seed + (step * config.layers + layer) * 2 + side)
                    if step == 0:
                        quantisers[layer][side].start(x, recipe.iterations, generator)
                    errors.append(quantisers[layer][side].step(x, recipe.decay, generator)[-1])
            step += 1
            keys, values = (sum(errors[side::2]) / config.layers for side in range(2))
            progress.update(task, completed=step, description=f"error keys {keys**0.5:.3f} values {values**0.5:.3f}")
            keep()
    tables = state[..., :WIDTH].clamp(-100, 100).half()
    codebooks = Codebooks(tables, config.kv_heads, config.head_dim, runner.fingerprint, frequencies)
    codebooks.save(out)
    checkpoint.unlink()
    return codebooks


def main(arguments: list[str] | None = None) -> None:
    from pyspec import load

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='"demo", a GGUF file, a Hugging Face folder or hub id')
    parser.add_argument("out", type=Path, help="safetensors file of the codebooks; a checkpoint beside it goes on")
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="more text files to learn from")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, choices=KEYS if name == "keys" else None)
    options = vars(parser.parse_args(arguments))
    out, source, texts = options.pop("out"), options.pop("model"), options.pop("texts")
    prose = [*documentation(), *(path.read_text(encoding="utf-8") for path in texts)]
    try:
        train(load(source, device="cpu"), out, Recipe(**options), [prose, standard_library()])
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on from the last checkpoint") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
