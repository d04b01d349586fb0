"""How words are split by the rules of each name: what llama.cpp makes of the same text."""

import pytest
import tokenizers
from tokenizers import pre_tokenizers

from pyspec.checkpoints.pre_tokenizers import IGNORE_MERGES, OVER_CHARACTERS, SPLITS, WANTS_BOS

TEXTS = ("Hello World's IT'S 12345\n\n  x", "HTTPServer getX été/\n//x_1 (a) 東京 かな!?")
WORDS = {  # by one name for each list of patterns, what llama.cpp splits the texts into, with | between words
    "default": (
        "Hello| World|'|s| IT|'|S| |123|45|\n\n | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| |(|a|)| 東京| かな|!?",
    ),
    "gpt-2": ("Hello| World|'s| IT|'|S| 12345|\n\n | x", "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| 東京| かな|!?"),
    "smollm": (
        "Hello| World|'s| IT|'|S| |1|2|3|4|5|\n\n | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "llama-bpe": (
        "Hello| World|'s| IT|'S| |123|45|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "qwen2": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "qwen35": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "ufakzeka": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "laguna": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "minicpm5": (
        "Hello| World|'s| IT|'S| |123|45|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "jais-2": ("Hello| World|'s| IT|'S| |123|45|\n\n| | x", "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?"),
    "seed-coder": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "bailingmoe": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "exaone-moe": (
        "Hello World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer getX été|/\n|//|x|_|1| (|a|)| 東京 かな|!?",
    ),
    "tekken": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| get|X| été|/\n//|x|_|1| (|a|)| 東京| かな|!?",
    ),
    "gpt-4o": ("Hello| World's| IT'S| |123|45|\n\n| | x", "HTTPServer| get|X| été|/\n//|x|_|1| (|a|)| 東京| かな|!?"),
    "deepseek-v3": (
        "Hello| World|'s| IT|'S| |123|45|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "spark2_5": (
        "Hello| World|'s| IT|'S| |1|2|3|4|5|\n|\n| | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "deepseek-coder": (
        "Hello| World|'|s| IT|'|S| |1|2|3|4|5|\n|\n| | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "deepseek-llm": (
        "Hello| World|'|s| IT|'|S| |12345|\n|\n| | x",
        "HTTPServer| getX| é|t|é|/|\n|//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "superbpe": ("Hello World's IT'S |12|345|\n\n  x", "HTTPServer getX été/\n//x_|1| (a) 東京 かな!?"),
    "kimi-k2": ("Hello| World's| IT'S| |123|45|\n\n| | x", "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| |東京| かな|!?"),
    "falcon": (
        "Hello| World|'|s| IT|'|S| |123|45|\n\n | x",
        "HTTPServer| getX| été|/|\n|//|x|_|1| |(|a|)| 東京| かな|!?",
    ),
    "afmoe": (
        "Hello| World|'s| IT|'S| |12|345|\n\n| | x",
        "HTTPServer| getX| été|/\n|//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "tiny_aya": ("Hello| World's| IT'S| |12|345|\n\n| | x", "HTTPServer| getX| été|/\n//|x|_|1| (|a|)| 東京| かな|!?"),
    "youtu": (
        "Hello| World's| IT'S| |1|2|3|4|5|\n\n| | x",
        "HTTPServer| getX| été|/\n//|x|_|1| (|a|)| |東京| |かな|!?",
    ),
    "chameleon": (
        "Hello| World|'|s| IT|'|S| |1|2|3|4|5|\n|\n|  |x",
        "HTTPServer| getX| été|/|\n|/|/|x|_|1| |(|a|)| 東京| かな|!|?",
    ),
    "gemma4": ("Hello World's IT'S 12345|\n\n|  x", "HTTPServer getX été/|\n|//x_1 (a) 東京 かな!?"),
    "poro-chat": ("Hello| World's| IT'S| 12345|\n\n | x", "HTTPServer| getX| été/|\n|//x_1| (|a|)| 東京| かな|!?"),
    "viking": ("Hello| World's| IT'S| |1|2|3|4|5|\n\n | x", "HTTPServer| getX| été/|\n|//x_|1| (|a|)| 東京| かな|!?"),
}


def split(name, text):
    patterns = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in SPLITS[name]]
    return [word for word, _ in pre_tokenizers.Sequence(patterns).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", WORDS)
def test_words_are_those_of_llama_cpp(name):
    assert tuple("|".join(split(name, text)) for text in TEXTS) == WORDS[name]


def test_every_list_of_patterns_is_here():
    assert {tuple(SPLITS[name]) for name in WORDS} == {*map(tuple, SPLITS.values())}
    assert IGNORE_MERGES | WANTS_BOS | OVER_CHARACTERS <= SPLITS.keys()


@pytest.mark.parametrize("name", WORDS)
def test_nothing_is_lost(name):
    for text in (*TEXTS, "", "\r\n\t \u3000\u2006x  ", "e\u0301🎉👩\u200d👧ﬁ½Ⅷ٣", "".join(map(chr, range(1, 300)))):
        assert "".join(split(name, text)) == text
