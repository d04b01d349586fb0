"""Trains one draft of each kind on the same texts with the same budget, and says what the guesses of each are worth.

    python -m training.compare --model demo --data texts --output drafts --steps 75     Ctrl-C, and it goes on

Every kind sees the same texts in the same order: as many steps of as many tokens. "Chain" is tokens a round of four
guesses in a row with the model's own, "tree" the same where the first guess is three tokens and the second two, both on
held-out texts. What a draft costs is another question: see bench/trained_drafts.py. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

import pyspec
from training.chimera import Chimera
from training.command import NewHead, train
from training.data_files import DraftData
from training.data_vocabulary import head_vocabulary
from training.distill import RECIPE as STUDENT
from training.distill import Student
from training.drafts import Recipe
from training.dspark import RECIPE as BLOCK
from training.dspark import DSpark
from training.eagle3 import Eagle3

__all__ = ["KINDS", "compare", "main"]

KINDS: dict[str, tuple[NewHead, Recipe]] = {
    "eagle3": (Eagle3, Recipe()),
    "dspark": (DSpark, BLOCK),
    "chimera": (Chimera, Recipe()),
    "distill": (Student, STUDENT),
}
DEPTH, WIDTHS = 4, (3, 2)  # of the chain that is measured, and of the tree's first levels: 21 nodes


def compare(runner, data: Path, output: Path, steps: int, tokens: int, vocabulary: int) -> dict[str, dict]:
    """Trains what is not trained yet in folders of an output, by kind; the figures of each.

    Args:
        runner: the model, with fp32 weights.
        data: folder of texts, see training.data_files.
        steps, tokens: the budget of each, see Recipe.
        vocabulary: tokens that a head can guess; a small model guesses all.
    """
    found = {}
    for name, (kind, recipe) in KINDS.items():
        size = runner.vocab_size if kind is Student else vocabulary
        recipe = replace(recipe, warmup=min(recipe.warmup, steps // 4))
        recipe = replace(recipe, steps=steps, tokens=tokens, vocabulary=size, every=steps)

        def tokens_of(texts: DraftData, size: int = size):
            return range(size) if size == runner.vocab_size else head_vocabulary(texts, runner, size)

        run = train(output / name, data, recipe, runner, kind, tokens_of)
        run.recipe = replace(recipe, depth=DEPTH)  # of the measurement: a student's laws are learned one deep
        chain, tree = run.measure(), run.measure(WIDTHS)
        found[name] = {
            "parameters": sum(values.numel() for values in run.head.parameters()),
            "first": chain[0],
            "chain": 1 + sum(chain),
            "tree": 1 + sum(tree),
        }
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="what pyspec.load takes")
    parser.add_argument("--data", type=Path, required=True, help="folder of its texts, see training.data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the drafts and compared.json")
    for name, value in (("steps", 75), ("tokens", 2048), ("vocabulary", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default: {value}")
    options = parser.parse_args(arguments)
    runner = pyspec.load(options.model, dtype=torch.float32, device="cpu")
    budget = {"steps": options.steps, "tokens": options.tokens, "vocabulary": options.vocabulary}
    found = compare(runner, options.data, options.output, **budget)
    for name, row in found.items():
        print(
            f"{name:8} {row['parameters'] / 1e6:6.1f}M parameters, first {row['first']:.1%}, "
            f"chain {row['chain']:.2f}, tree {row['tree']:.2f}"
        )
    kept = {"model": options.model, **budget, "texts": len(DraftData(options.data)), "drafts": found}
    (options.output / "compared.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
