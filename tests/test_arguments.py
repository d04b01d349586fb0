"""Prompts, numbers and texts, by what they are: taken in every form that they come in, or refused by name."""

import array
import codecs
import itertools
import re
from fractions import Fraction

import numpy as np
import pytest
import torch

from pyspec import DraftTree, generate
from pyspec.arguments import decode_text, read_prompts
from pyspec.generate import check_limits
from pyspec.sampling.sampler import Sampler
from tests.helpers.fake_runner import FakeRunner

IDS = [5, 9, 17]
SHORT = [3, 44]
# left and right padding, as tokenizers make it
LEFT = {"input_ids": torch.tensor([[0, *SHORT], IDS]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
RIGHT = {"input_ids": np.array([[*SHORT, 7], IDS]), "attention_mask": np.array([[True, True, False], [True] * 3])}


class Encoding:
    """What a tokenizers.Encoding is like."""

    def __init__(self, ids, mask):
        self.ids, self.attention_mask = ids, mask


@pytest.mark.parametrize(
    "tokens",
    [
        IDS,
        tuple(IDS),
        (token for token in IDS),
        iter(IDS),
        np.array(IDS),
        np.array(IDS, np.uint8),
        np.array(IDS, object),
        torch.tensor(IDS),
        torch.tensor(IDS, dtype=torch.int16),
        [torch.tensor(token) for token in IDS],
        list(np.array(IDS, np.int32)),
        array.array("i", IDS),
        {"input_ids": IDS},
        {"input_ids": torch.tensor([0, *IDS]), "attention_mask": torch.tensor([0, 1, 1, 1])},
        Encoding([*IDS, 0], [1, 1, 1, 0]),
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_one_prompt(tokens):
    assert read_prompts(tokens, 100) == (False, [IDS])


@pytest.mark.parametrize(
    "tokens, prompts",
    [
        ([torch.tensor([token]) for token in IDS], [[token] for token in IDS]),
        ([np.array([token]) for token in IDS], [[token] for token in IDS]),
        ([torch.tensor(SHORT), torch.tensor(IDS)], [SHORT, IDS]),
        (torch.tensor([IDS, IDS]), [IDS, IDS]),
        (torch.tensor(IDS)[:, None], [[token] for token in IDS]),
        (np.array([IDS, IDS]), [IDS, IDS]),
        (np.array([SHORT, IDS], dtype=object), [SHORT, IDS]),
        ((iter(prompt) for prompt in (SHORT, IDS)), [SHORT, IDS]),
        ([SHORT, range(4), np.array(IDS)], [SHORT, [0, 1, 2, 3], IDS]),
        (LEFT, [SHORT, IDS]),
        (RIGHT, [SHORT, IDS]),
        ([{"input_ids": SHORT, "token_type_ids": [0, 0]}, {"input_ids": IDS}], [SHORT, IDS]),
        ([Encoding([0, *SHORT], [0, 1, 1]), Encoding(IDS, [1, 1, 1])], [SHORT, IDS]),
        (torch.zeros(2, 0, dtype=torch.int64), [[], []]),
    ],
)
def test_batches(tokens, prompts):
    assert read_prompts(tokens, 100) == (True, prompts)


def test_batch_encodings_of_transformers():
    transformers = pytest.importorskip("transformers")
    for padded in (LEFT, RIGHT):
        assert read_prompts(transformers.BatchEncoding(dict(padded)), 100) == (True, [SHORT, IDS])


def test_encodings_of_tokenizers():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 3, "b": 44, "pad": 0}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_padding(direction="left", pad_id=0, pad_token="pad")
    assert read_prompts(backend.encode_batch(["a b", "b a b"]), 100) == (True, [[3, 44], [44, 3, 44]])
    assert read_prompts(backend.encode("a b"), 100) == (False, [[3, 44]])


def test_an_iterator_without_end_is_read_no_further_than_the_context():
    counter = itertools.count()
    with pytest.raises(ValueError, match="tokens must leave room in the model's context of 4096 tokens, got 4097"):
        generate(FakeRunner(), (token % 7 for token in counter))
    assert next(counter) == 4097


@pytest.mark.parametrize(
    "tokens, words",
    [
        (None, "tokens must be token ids.*got None"),
        ("text", "tokens must be token ids.*got 'text'"),
        (b"text", "tokens must be token ids"),
        (5, "tokens must be token ids.*got 5"),
        (torch.tensor(5), r"tokens must be token ids.*got tensor\(5\)"),
        ({5, 9}, "tokens must be token ids"),
        (["text"], r"tokens\[0\] must be token ids.*got 'text'"),
        ([None], r"tokens\[0\] must be token ids.*got None"),
        ([True, False], "tokens must be token ids.*got True at 0"),
        ([5, 9.0], "tokens must be token ids.*got 9.0 at 1"),
        (np.array([5.0]), "tokens must be token ids.*got 5.0 at 0"),
        (torch.tensor([True]), "tokens must be token ids.*got True at 0"),
        ([5, [9]], r"tokens must be token ids.*got \[9\] at 1"),
        ([[5], 9], r"tokens\[1\] must be token ids.*got 9"),
        ([[[5]]], r"tokens\[0\] must be token ids.*got \[5\] at 0"),
        (torch.zeros(2, 2, 2, dtype=torch.int64), r"tokens\[0\] must be token ids"),
        (torch.tensor([5], device="meta"), "tokens must be token ids.*torch.int64 and shape"),
        ({"input_ids": None}, "tokens must be token ids.*got None"),
        ({"ids": IDS}, r"tokens must have input_ids .*\['ids'\]"),
        ({"input_ids": IDS, "pixel_values": 1}, "tokens must have nothing .*got 'pixel_values'"),
        ({"input_ids": IDS, "attention_mask": [1, 0, 1]}, "attention_mask must hide padding at the ends"),
        ({"input_ids": IDS, "attention_mask": [1, 1]}, "attention_mask must have a 0 or 1 for each of the 3"),
        ({"input_ids": IDS, "attention_mask": [1, 2, 1]}, "attention_mask must have a 0 or 1"),
        ({"input_ids": [IDS, IDS], "attention_mask": [[1, 1, 1]]}, "attention_mask must have a row for each of the 2"),
        ({"input_ids": [IDS], "attention_mask": [[0, 0, 0]]}, r"tokens\[0\] must not be empty"),
        ([], "tokens must not be empty"),
        (torch.zeros(0, 3, dtype=torch.int64), "tokens must not be empty"),
        ([IDS, []], r"tokens\[1\] must not be empty"),
        ([2**70], "tokens must hold tokens of the model's vocabulary.*got 1180591620717411303424"),
    ],
)
def test_other_prompts_are_refused_by_name(tokens, words):
    model = FakeRunner()
    model.prefill = None
    with pytest.raises((TypeError, ValueError), match=f"^{words}") as error:
        generate(model, tokens)
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


NUMBERS = [np.int64(3), np.array(3), torch.tensor(3), np.uint8(3)]


@pytest.mark.parametrize("three", NUMBERS, ids=lambda three: type(three).__name__)
def test_numbers_of_numpy_and_torch(three):
    expected = generate(FakeRunner(), IDS, drafter=None, max_new_tokens=3, temperature=3.0, top_k=3, seed=3)
    found = generate(
        FakeRunner(), IDS, drafter="lookup", budget=three, max_new_tokens=three, temperature=three, top_k=three,
        seed=three, top_p=np.float32(1.0),
    )  # fmt: skip
    assert found.tokens == expected.tokens and type(found.stats.seed) is int
    assert Sampler(temperature=Fraction(1, 2), top_p=torch.tensor(0.5)).temperature == 0.5


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"seed": -1}, ValueError, "seed must be in"),
        ({"seed": True}, TypeError, "seed must be an integer, got True"),
        ({"seed": 2**64}, ValueError, "seed must be in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer, got 1.0"),
        ({"seed": np.array([1])}, TypeError, r"seed must be an integer, got ndarray of int64 and shape \(1,\)"),
        ({"seed": torch.tensor(True)}, TypeError, r"seed must be an integer, got tensor\(True\)"),
        ({"temperature": float("nan")}, ValueError, "temperature must be finite"),
        ({"temperature": 10**400}, ValueError, "temperature must be finite"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": None}, TypeError, "temperature must be a number, got None"),
        ({"temperature": torch.tensor(float("nan"))}, ValueError, "temperature must be finite"),
        ({"temperature": torch.tensor(1.0, device="meta")}, TypeError, "temperature must be a number"),
        ({"top_p": np.float64("nan")}, ValueError, "top_p must be in"),
        ({"top_k": np.float32(1)}, TypeError, "top_k must be an integer"),
        ({"max_new_tokens": None}, TypeError, "max_new_tokens must be an integer, got None"),
        ({"max_new_tokens": torch.tensor([4])}, TypeError, "max_new_tokens must be an integer"),
        ({"budget": "all"}, TypeError, "budget must be an integer or \"auto\", got 'all'"),
        ({"budget": np.array([4, 5])}, TypeError, "budget must be an integer"),
        ({"stop": None}, TypeError, "stop must be a string or strings, got None"),
        ({"stop": b"x"}, ValueError, "stop must be strings that are not empty, got 120"),
        ({"stream": "x"}, TypeError, "stream must be a function or None, got 'x'"),
        ({"drafter": 5}, TypeError, "drafter must be one of .*got 5"),
        ({"drafter": FakeRunner}, TypeError, "drafter must be one of"),
        ({"acceptance": None}, TypeError, "acceptance must be one of .*got None"),
        ({"cache": None}, TypeError, "cache must be a name"),
        ({"model": "demo"}, TypeError, "model must be a runner, from pyspec.load .*got 'demo'"),
    ],
)
def test_other_arguments_are_refused_by_name(arguments, error, words):
    with pytest.raises(error, match=f"^{words}"):
        generate(**{"model": FakeRunner(), "tokens": IDS, "drafter": None} | arguments)


def test_limits_come_back_as_plain_integers():
    assert check_limits(np.int64(4), torch.tensor(7)) == (4, 7) and check_limits("auto", 1) == ("auto", 1)


# ---- trees


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([1.5], [-1]), r"tokens must be a list, an array or a tensor of integers, got \[1.5\]"),
        ((None, [-1]), "tokens must be a list.*got None"),
        (([True], [-1]), "tokens must be a list"),
        (("1", [-1]), "tokens must be a list"),
        (([1], [-1.0]), "parents must be a list"),
        (([1, 2], [-1, 2**32]), "parents must be nodes"),
        ((torch.tensor([1], device="meta"), [-1]), "tokens must be a list"),
        (([1], [-1], [0.5]), "q must be a floating point tensor"),
        (([1, 2], [-1, 0], torch.ones(1, 9)), "q must be of 2 dimensions and have 2 rows"),
        (([1], [-1], None, torch.ones(1, dtype=torch.int64)), "chances must be a floating point tensor"),
        (([1], [-1], None, torch.ones(2)), "chances must be of 1 dimensions and have 1 rows"),
    ],
)
def test_trees_of_other_things_are_refused(arguments, words):
    with pytest.raises((TypeError, ValueError), match=f"^{words}"):
        DraftTree(*arguments)


def test_trees_of_any_integers():
    for kind in (list, tuple, np.array, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int16)):
        tree = DraftTree(kind([3, 4, 5]), kind([-1, 0, 0]))
        assert (tree.tokens.tolist(), tree.parents.tolist()) == ([3, 4, 5], [-1, 0, 0])
        assert (tree.tokens.dtype, tree.parents.dtype) == (np.int64, np.int32)


# ---- texts


@pytest.mark.parametrize(
    "data",
    [
        "ü\nb\n".encode(),
        codecs.BOM_UTF8 + "ü\r\nb\r".encode(),
        "ü\nb\n".encode("utf-16"),
        codecs.BOM_UTF16_BE + "ü\nb\n".encode("utf-16-be"),
    ],
)
def test_texts_begin_with_a_byte_order_mark_or_not(data):
    assert decode_text("file", data) == "ü\nb\n"


@pytest.mark.parametrize("data, at", [(b"caf\xe9", "0xe9 at 3"), (b"\xff", "0xff at 0"), (b"\xff\xfea", "at 2")])
def test_texts_of_other_bytes_are_refused(data, at):
    with pytest.raises(ValueError, match=f"file must be UTF-8 text, got byte .*{re.escape(at)}"):
        decode_text("file", data)
