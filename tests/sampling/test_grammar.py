"""Grammars: what is said keeps to them, with speculation and without, and what cannot be said is told."""

import json
import re

import numpy as np
import pytest
import torch

from pyspec.generate import generate
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import Accepted, DraftTree
from tests.helpers.fake_drafters import AlwaysWrong, Oracle, RandomTrees
from tests.helpers.fake_runner import EOS, FakeRunner

pytest.importorskip("llguidance")

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMARS = {
    "json_schema": (SCHEMA, lambda text: json.loads(text).keys() == {"name", "age"}),
    "regex": ("(ab|ba){3,8}!", lambda text: re.fullmatch("(ab|ba){3,8}!", text)),
    "lark": (
        'start: "(" start ")" | "x" | "yes, certainly"',
        lambda text: re.fullmatch(r"\(*(x|yes, certainly)\)*", text),
    ),
}


class Babbler(FakeRunner):
    """Says every byte about as gladly as any other."""

    def logits(self, context):
        return torch.randn(self.vocab_size, generator=torch.Generator().manual_seed(hash(tuple(context[-3:])) % 2**31))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", GRAMMARS)
def test_texts_keep_to_the_grammar_and_speculation_does_not_change_them(kind, temperature):
    source, fits = GRAMMARS[kind]
    for seed in range(3):
        asked = dict(max_new_tokens=200, temperature=temperature, seed=seed, grammar={kind: source})
        plain = generate(Babbler(), [97, seed], drafter=None, **asked)
        if plain.finish_reason == "eos":
            assert fits(plain.text)
        for drafter in ("merged", Oracle(Babbler()), AlwaysWrong(Babbler()), RandomTrees()):
            result = generate(Babbler(), [97, seed], drafter=drafter, budget=8, **asked)
            assert (result.tokens, result.finish_reason) == (plain.tokens, plain.finish_reason)
    assert plain.finish_reason == "eos" or kind == "lark"


def test_what_the_grammar_forces_is_drafted():
    result = generate(Babbler(), [97], drafter=AlwaysWrong(Babbler()), budget=8, grammar={"regex": "certainly not[.]"})
    assert result.text == "certainly not."
    assert result.stats.rounds <= 3


def test_every_node_has_the_state_of_its_text():
    model = Babbler()
    drawing = Sampler(1.0, seed=0, grammar={"regex": "(ab|ba)c"}).start([97], model)
    #             root -> a -> b -> c, a -> a (not allowed) -> b, root -> b -> a
    tree = DraftTree([1, 97, 98, 99, 97, 98, 98, 97], [-1, 0, 1, 2, 1, 4, 0, 6])
    laws = drawing.laws(tree, Verified(torch.zeros(8, model.vocab_size)))
    allowed = [sorted(np.flatnonzero(laws(node)).tolist()) for node in (3, 7, 0, 6, 1, 2)]
    assert allowed == [[EOS], [99], [97, 98], [97], [98], [99]]
    assert laws(5).sum() == pytest.approx(1)  # below what is not allowed: a law, of which nothing is ever emitted
    drawing.extend(Accepted([0, 6], 97))
    assert np.flatnonzero(
        drawing.laws(DraftTree.chain([97]), Verified(torch.zeros(1, model.vocab_size)))(0)
    ).tolist() == [99]


@pytest.mark.parametrize(
    "grammar, message",
    [
        ("x", "grammar must be a mapping"),
        ({"regex": "a", "lark": "b"}, "grammar must be a mapping"),
        ({"gbnf": "a"}, "grammar must be a mapping"),
        ({"regex": 3}, "grammar's regex must be text"),
        ({"regex": "[a"}, "refused by llguidance.*unclosed"),
        ({"lark": "start: nothing"}, "refused by llguidance"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
    ],
)
def test_a_grammar_that_is_none_is_refused_before_any_work(grammar, message):
    model = FakeRunner()
    with pytest.raises(ValueError, match=message):
        generate(model, [97], max_new_tokens=3, grammar=grammar)
    assert model.now == 0


def test_a_model_without_text_takes_no_grammar():
    with pytest.raises(ValueError, match="needs a model with a tokenizer"):
        generate(FakeRunner(tokenizer=False), [97], max_new_tokens=3, grammar={"regex": "a"})


def test_where_no_token_fits_the_text_so_far_is_kept():
    banned = {"banned_tokens": [98, [97, 99]]}
    result = generate(Babbler(), [120], max_new_tokens=9, grammar={"regex": "aa(b|c)"}, **banned)
    assert result.text == "aa" and result.finish_reason == "error"
    assert "position 2" in result.error and "grammar" in result.error
