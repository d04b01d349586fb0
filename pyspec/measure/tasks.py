"""Short tasks with one right answer, made by a seed: sums, and lines to copy."""

from __future__ import annotations

import random
from typing import NamedTuple

__all__ = ["KINDS", "Task", "tasks"]

WORDS = "apple bird chair door eagle fish green house island jacket king lamp moon night ocean paper queen".split()
EXAMPLES = 3  # before each question


class Task(NamedTuple):
    """A question whose answer is one line.

    Attributes:
        kind: of KINDS.
        prompt: examples and the question, as a text to be continued.
        answer: the right continuation, up to its line feed.
    """

    kind: str
    prompt: str
    answer: str

    def is_right(self, text: str) -> bool:
        """Whether a continuation begins with the right line."""
        return text.split("\n")[0].strip() == self.answer


def _sum(generator: random.Random) -> tuple[str, str]:
    left, right = generator.randrange(2, 60), generator.randrange(2, 40)
    return f"{left} + {right} =", str(left + right)


def _copy(generator: random.Random) -> tuple[str, str]:
    words = " ".join(generator.sample(WORDS, generator.randrange(3, 7)))
    return f"copy: {words} ->", words


KINDS = {"sums": _sum, "copies": _copy}


def tasks(count: int, seed: int = 0) -> list[Task]:
    """So many tasks, the kinds in turn; those of another seed are others."""
    generator, found = random.Random(seed), []
    for index in range(count):
        kind = list(KINDS)[index % len(KINDS)]
        *examples, (question, answer) = (KINDS[kind](generator) for _ in range(EXAMPLES + 1))
        found.append(Task(kind, "".join(f"{asked} {said}\n" for asked, said in examples) + question, answer))
    return found
