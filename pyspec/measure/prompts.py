"""Prompts to measure on: four of our own, those of a file, and half of Spec-Bench (bench/data/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from pyspec.arguments import check_unicode
from pyspec.measure.results import BENCH


@dataclass(frozen=True)
class Prompt:
    """The user's turn of a chat; question_id is its number in its file, or the one that the file gives it."""

    question_id: int
    category: str
    text: str

    def tokens(self, model) -> list[int]:
        """The prompt's token ids, in the chat template of a runner's tokenizer."""
        return model.tokenizer.chat([{"role": "user", "content": self.text}])


OWN = (
    Prompt(1, "summary", "Summarise in three sentences why the sky is blue, and then say the same once more in simpler "
           "words."),
    Prompt(2, "code", "Write a Python function that returns the n-th Fibonacci number, then the same function with a "
           "cache."),
    Prompt(3, "extraction", "List every number in this text, in order: 3 apples, 12 pears and 7 plums cost 22 euros, "
           "not 25."),
    Prompt(4, "writing", "Write a short letter to a friend about a walk in the mountains."),
)  # fmt: skip


def spec_bench() -> list[Prompt]:
    """The prompts of Spec-Bench in a clone of pyspec, in the file's order."""
    file = BENCH / "data" / "spec_bench_dev.jsonl"
    return list(of_lines(file.read_text(encoding="utf-8"), str(file)))


def of_lines(text: str, name: str) -> Iterator[Prompt]:
    """The prompts of JSON lines, objects with "prompt" or "turns", and with "category" and "question_id" if they like.

    Args:
        name: what the text is called in errors.

    Raises:
        ValueError: there is no line, or one is something else.
    """
    # not splitlines, which takes characters for ends of lines that JSON has inside of its strings
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{name} holds no prompts")
    for number, line in lines:
        try:
            entry = json.loads(line)
            turns = [entry["prompt"]] if "prompt" in entry else entry["turns"]
            if not isinstance(turns, list) or not isinstance(turns[0], str) or not turns[0].strip():
                raise ValueError("no prompt")
            check_unicode("prompt", turns[0])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise ValueError(f'{name} line {number} must be a JSON object with "prompt" or "turns"') from None
        yield Prompt(entry.get("question_id", number), str(entry.get("category", "all")), turns[0])


def first_of_each_category(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Picks at most `limit` prompts of each category, category by category; all of them for None."""
    return [prompt for category in _by_category(prompts) for prompt in category[:limit]]


def across_categories(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts: the first of every category, then the second of every category, and so on."""
    rounds = zip_longest(*_by_category(prompts))
    return [prompt for prompt in chain.from_iterable(rounds) if prompt is not None][:count]


def _by_category(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    return list(categories.values())
