"""Prompts to make a model's own texts from: topics out of WordNet, Python's standard library and sums.

They are about as various as what people ask: explain, write, list, translate, summarise, answer from a text, compute.
Everything is drawn from a NumPy generator, so that the same seed asks the same.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

__all__ = ["WORDNET", "Topics", "Word", "functions_of_python", "words_of_wordnet"]

WORDNET = Path("/usr/share/wordnet")  # where Debian's wordnet-base puts it
LONGEST = 1400  # characters of a text in a prompt
SHORTEST = 60  # of a docstring

ABOUT_WORDS = (
    "Explain what {word} is.",
    "What is {word}, and why does it matter?",
    "Explain {word} to a child.",
    "Give me five facts about {word}.",
    "What is the difference between {word} and {other}?",
    "How is {word} related to {other}?",
    "List the advantages and disadvantages of {word}.",
    "Write a short story about {word} and {other}.",
    "Write a poem about {word}.",
    "Write an email to a colleague about {word}.",
    "Write a paragraph for a travel guide that mentions {word} and {other}.",
    "Write a newspaper article of three paragraphs about {word}.",
    "Write a speech about {word} in the style of a famous author.",
    "Imagine you are an expert on {word}. What would you tell a beginner first?",
    "You are {word}. Introduce yourself and tell me about {other}.",
    "Plan a lesson about {word} for a class of ten year olds.",
    "Use the word {word} in three sentences.",
    "Which word means: {gloss}?",
    "Translate into French: {gloss}.",
    "Translate into German: {gloss}.",
    "Translate into Spanish: {gloss}.",
    "Say this in simpler words: {gloss}.",
    "Write a question whose answer is {word}, then answer it.",
    "When was {word} first described, and by whom?",
    "Does {word} have anything to do with {other}? Think step by step.",
    "Read the notes and answer the question.\n\n{notes}\n\nQuestion: what is {word}?",
    "Summarise these notes in two sentences.\n\n{notes}",
    "Make a table with the columns term and meaning from these notes.\n\n{notes}",
    "Extract the most important terms from the text as JSON.\n\n{notes}",
)
ABOUT_PYTHON = (
    "What does {name} do in Python?",
    "Show me an example of {name} in Python.",
    "When should I use {name} rather than {other}?",
    "Write a Python function that does the following: {first}",
    "Write a Python class with a method like this: {first} Then show how it is used.",
    "Summarise this documentation.\n\n{documentation}",
    "Explain this documentation to a beginner.\n\n{documentation}",
    "Use the documentation to answer the question.\n\n{documentation}\n\nQuestion: what does {name} give back?",
    "Explain this code.\n\n```python\n{source}\n```",
    "How can this code be improved?\n\n```python\n{source}\n```",
    "Write unit tests for this code.\n\n```python\n{source}\n```",
    "Write this in JavaScript.\n\n```python\n{source}\n```",
)
SUMS = (
    "What is {a} + {b}?",
    "What is {a} times {c}? Show your work.",
    "Solve for x: {c}x + {b} = {a}",
    "A shop has {a} of {word} and sells {c} of them every day. How many are left after {d} days?",
    "Anna buys {c} of {word} for {b} dollars each and pays with {a}00 dollars. How much does she get back?",
    "There are {c} boxes with {d} of {word} each. {c} people share them. How many does each of them get?",
    "A train travels {a} kilometres in {d} hours. How fast is it, and how far does it get in {c} hours?",
    "Tom is {c} years older than Maria, who is {b}. How old are they together in {d} years?",
    "The price of {word} rises from {b} dollars by {a} percent. What is the new price?",
)


class Word(NamedTuple):
    """A word of WordNet and what it means."""

    name: str
    gloss: str


class Function(NamedTuple):
    """A function or class of Python's standard library."""

    name: str
    documentation: str
    source: str


def words_of_wordnet(folder: Path) -> list[Word]:
    """The nouns that WordNet counted in texts, each in its first sense.

    Raises:
        FileNotFoundError: the folder is not WordNet's.
    """
    counted = {line.split("%", 1)[0] for line in (folder / "cntlist.rev").read_text(encoding="utf-8").splitlines()}
    words: dict[str, Word] = {}
    for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):  # the licence
            continue
        fields, gloss = line.split(" | ", 1)
        name = fields.split()[4]
        if name.lower() in counted and name not in words:
            words[name] = Word(name.replace("_", " "), gloss.split(";")[0].strip())
    return list(words.values())


def functions_of_python() -> list[Function]:
    """What has a docstring in the public modules of the standard library, read from their sources."""
    functions, root = [], Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        if module.startswith("_") or module in ("idlelib", "lib2to3", "test", "tkinter"):
            continue
        for path in (root / f"{module}.py", root / module / "__init__.py"):
            if path.is_file():
                functions += _functions_of(module, path.read_text(encoding="utf-8"))
    return functions


def _functions_of(module: str, text: str) -> list[Function]:
    lines, found = text.splitlines(), []

    def visit(owner: str, nodes: list[ast.stmt]) -> None:
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                name, documentation = f"{owner}.{node.name}", ast.get_docstring(node)
                if documentation is not None and len(documentation) >= SHORTEST:
                    source = "\n".join(lines[node.lineno - 1 : node.end_lineno])
                    found.append(Function(name, documentation[:LONGEST], source[:LONGEST]))
                if isinstance(node, ast.ClassDef):
                    visit(name, node.body)

    visit(module, ast.parse(text).body)
    return found


class Topics:
    """Prompts from topics.

    Args:
        words: from words_of_wordnet, or none.
    """

    def __init__(self, words: list[Word]):
        self.words, self.functions = words, functions_of_python()

    def question(self, random: Generator) -> str:
        """What a user might ask: half of it about words, where there are any, most of the rest about Python."""
        kinds = [self._about_words, self._about_python, self._sum]
        shares = np.array([0.5 if self.words else 0.0, 0.35, 0.15])
        return kinds[random.choice(3, p=shares / shares.sum())](random)

    def documented(self, random: Generator) -> tuple[str, str]:
        """A question and a text that answers it, as somebody wrote it: a gloss, or a docstring."""
        if self.words and random.random() < 0.5:
            word = _one_of(random, self.words)
            return f"Explain what {word.name} is.", f"{word.name.capitalize()}: {word.gloss}."
        function = _one_of(random, self.functions)
        return f"What does {function.name} do in Python?", function.documentation

    def beginning(self, random: Generator) -> str:
        """What a file of Python might go on from, for a model that nobody can ask."""
        lines = _one_of(random, self.functions).source.splitlines()
        return "\n".join(lines[: random.integers(2, 12)]) + "\n"

    def _about_words(self, random: Generator) -> str:
        word, other, *others = (_one_of(random, self.words) for _ in range(6))
        notes = " ".join(f"{each.name.capitalize()}: {each.gloss}." for each in (word, other, *others))
        return _one_of(random, ABOUT_WORDS).format(word=word.name, other=other.name, gloss=word.gloss, notes=notes)

    def _about_python(self, random: Generator) -> str:
        function, other = _one_of(random, self.functions), _one_of(random, self.functions)
        first = " ".join(function.documentation.split("\n\n")[0].split())
        return _one_of(random, ABOUT_PYTHON).format(**function._asdict(), first=first, other=other.name)

    def _sum(self, random: Generator) -> str:
        a, b, c, d = (int(random.integers(2, most)) for most in (1000, 100, 20, 10))
        word = _one_of(random, self.words).name if self.words else "apples"
        return _one_of(random, SUMS).format(a=a, b=b, c=c, d=d, word=word)


def _one_of(random: Generator, choices) -> Callable | Word | Function | str:
    return choices[random.integers(len(choices))]
