"""The prompts of the benchmarks: half of Spec-Bench, see data/README.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

FILE = Path(__file__).parent / "data" / "spec_bench_dev.jsonl"


@dataclass(frozen=True)
class Prompt:
    """The first turn of one question."""

    question_id: int
    category: str
    text: str

    def tokens(self, model) -> list[int]:
        """Its token ids, in the chat template of a pyspec runner's model."""
        return model.tokenizer.chat([{"role": "user", "content": self.text}])


def by_category() -> dict[str, list[Prompt]]:
    """All prompts, in the file's order."""
    categories: dict[str, list[Prompt]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        prompt = Prompt(question["question_id"], question["category"], question["turns"][0])
        categories.setdefault(prompt.category, []).append(prompt)
    return categories


def first_of_each_category(limit: int) -> list[Prompt]:
    """At most `limit` prompts of each category, category by category."""
    return [prompt for prompts in by_category().values() for prompt in prompts[:limit]]


def across_categories(count: int) -> Sequence[Prompt]:
    """`count` prompts: the first of every category, then the second of every category, and so on."""
    rounds = zip_longest(*by_category().values())
    return [prompt for prompt in chain.from_iterable(rounds) if prompt is not None][:count]
