"""generate as a text comes: stop strings, streams, interruptions and errors keep what is there."""

import random

import pytest
import torch

from pyspec.generate import generate
from pyspec.sequence import TextStream
from pyspec.tree import DraftTree
from tests.helpers.fake_drafters import Drafts, Oracle, RandomTrees
from tests.helpers.fake_runner import WORDS, FakeRunner, FakeTokenizer, ScriptedRunner

PROMPT = list(b"once upon a time")


def word(text):
    return 256 + WORDS.index(text)


@pytest.mark.parametrize("budget", [1, 4, 16])
@pytest.mark.parametrize(
    "script, stop, text",
    [
        (b"one two three", "two", "one "),
        ([*b"it", word(b" the"), *b"re is"], "here", "it t"),  # begins inside a token and ends in another
        ([*b"a", word(b"\n\n"), *b"b"], "\n", "a"),  # ends inside a token
        ([*b"go ", word(b"st"), word(b"op!"), *b" on"], ("halt", "stop"), "go "),
        (b"ababac", "abac", "ab"),  # a false start that overlaps the real one
        (b"xyz", "nothing", "xyz"),
        (b"abcdef", ("cdef", "de"), "abc"),  # the one that is complete first
        ([*b"a", word(b" the"), *b"b"], ("he", " th"), "a"),  # both in one token: the one that begins first
    ],
)
def test_stop_strings(script, stop, text, budget):
    model = ScriptedRunner(script)
    pieces = []
    result = generate(model, [65], drafter=Oracle(model), budget=budget, stop=stop, stream=pieces.append)
    assert result.text == "".join(pieces) == text
    assert result.finish_reason == ("stop" if text != "xyz" else "eos")


def test_tokens_of_a_stopped_text_end_with_the_stop_string():
    model = ScriptedRunner(b"one two three")
    for budget in (1, 16):
        assert generate(model, [65], drafter=Oracle(model), budget=budget, stop="two").tokens == list(b"one two")


# ---- channels

MARKS = {1: "<|start|>", 2: "<|channel|>", 3: "<|message|>"}


@pytest.mark.parametrize(
    "script, text",
    [
        (b"\2analysis\3Hm, wait.\0\1assistant\2final\3It is 4.", "It is 4."),
        (b"\2final <json>\3{}", "{}"),
        (b"\2commentary to=functions.f\3{}\0\1assistant\3Plain.\1assistant\2finally\3no", "Plain."),
        (b"no marks", "no marks"),
        (b"behind a head in the prompt\1assistant\2analysis", "behind a head in the prompt"),
    ],
)
def test_the_text_is_that_of_the_final_channel(script, text):
    class Tokenizer(FakeTokenizer):
        channel_marks = MARKS

        def token_bytes(self, token):
            return b"" if token < 4 else super().token_bytes(token)

    model = ScriptedRunner(script)
    model.tokenizer = Tokenizer()
    for budget in (1, 8):
        pieces = []
        result = generate(model, [65], drafter=Oracle(model), budget=budget, stream=pieces.append)
        assert result.text == "".join(pieces) == text
        assert result.tokens[: len(script)] == list(script)


# ---- streaming


def test_streaming_never_splits_a_character_nor_shows_part_of_a_stop_string():
    tree = [word(b"\xf0\x9f"), word(b"\x8c\xb3")]
    model = ScriptedRunner([*b"a ", *tree, *"é".encode(), *b" st", *b"ep ", word(b"st"), *b"op!"])
    pieces = []
    result = generate(model, [65], drafter=None, stop="stop", stream=pieces.append)
    assert result.text == "a 🌳é step " == "".join(pieces)
    assert pieces == ["a", " ", "🌳", "é", " ", "ste", "p", " "]


def test_text_that_ends_inside_a_character():
    model = ScriptedRunner([*b"ok", word(b"\xf0\x9f"), *b"more"])
    pieces = []
    result = generate(model, [65], drafter=None, max_new_tokens=3, stream=pieces.append)
    assert result.text == "".join(pieces) == "ok\ufffd"


def test_streaming_a_batch_names_the_prompt():
    pieces = {0: "", 1: ""}

    def stream(index, piece):
        pieces[index] += piece

    result = generate(FakeRunner(), [PROMPT, PROMPT[:3]], drafter=RandomTrees(), max_new_tokens=20, stream=stream)
    assert [pieces[0], pieces[1]] == result.text


@pytest.mark.parametrize("seed", range(20))
def test_pieces_are_always_beginnings_of_the_final_text(seed):
    chooser = random.Random(seed)
    alphabet = "ab🌳é"
    text = "".join(chooser.choice(alphabet) for _ in range(60))
    stop = ["".join(chooser.choice(alphabet) for _ in range(chooser.randint(2, 5))) for _ in range(2)]
    stream, shown = TextStream(FakeTokenizer(), stop), ""
    for byte in text.encode():
        stream.push(byte)
        shown += stream.take()
        if stream.stopped:
            break
    stream.finish()
    shown += stream.take()
    first = min((text.find(each) + len(each), text.find(each)) if each in text else (99, 99) for each in stop)
    assert shown == stream.text
    assert all(each not in shown for each in stop)
    assert len(shown) <= first[0] and text.startswith(shown)
    assert stream.stopped == (first != (99, 99))


# ---- interruption and errors


@pytest.mark.parametrize("calls", [1, 3])
def test_interruption_in_the_stream_keeps_the_text(calls):
    pieces = []

    def stream(piece):
        pieces.append(piece)
        if len(pieces) >= calls:
            raise KeyboardInterrupt

    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=30)
    model = FakeRunner()
    result = generate(model, PROMPT, drafter=Oracle(model), budget=4, max_new_tokens=30, stream=stream)
    assert result.finish_reason == "interrupted"
    assert 0 < len(result.tokens) < 30
    assert plain.tokens[: len(result.tokens)] == result.tokens and plain.text.startswith(result.text)
    assert result.stats.total_seconds > 0


@pytest.mark.parametrize("call, tokens", [("prefill", 0), ("verify", 1), ("commit", 5)])
def test_interruption_in_the_runner_keeps_the_text(call, tokens):
    model = FakeRunner()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    setattr(model, call, interrupted)
    result = generate(model, PROMPT, drafter=Oracle(FakeRunner()), budget=4)
    assert (len(result.tokens), result.finish_reason) == (tokens, "interrupted")
    assert len(result.text) == tokens


def test_interruption_shows_what_was_held_back():
    model = ScriptedRunner(b"go st")
    pieces = []

    def verify(trees):
        if model.verified == 4:
            raise KeyboardInterrupt
        return ScriptedRunner.verify(model, trees)

    model.verify = verify
    result = generate(model, [65], drafter=None, stop="stop", stream=pieces.append)
    assert result.text == "go st" == "".join(pieces)


def test_a_second_interruption_does_not_lose_the_text():
    def stream(piece):
        raise KeyboardInterrupt

    result = generate(ScriptedRunner([*b"go", word(b" the")]), [65], drafter=None, stop="go there", stream=stream)
    assert result.text == "go the" and result.finish_reason == "eos"

    model = ScriptedRunner(b"go on")
    model.verify = lambda trees: stream("")
    result = generate(model, [65], drafter=None, stop="go there", stream=stream)
    assert (result.text, result.finish_reason) == ("g", "interrupted")


class NotANumber(FakeRunner):
    """NaN logits after so many tokens of context."""

    def __init__(self, at, value=torch.nan, **settings):
        super().__init__(**settings)
        self.at, self.value = at, value

    def logits(self, context):
        logits = super().logits(context)
        if len(context) == self.at:
            logits[5] = self.value
        return logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_names_the_node_and_keeps_the_text(temperature):
    settings = dict(temperature=temperature, seed=5)
    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=20, **settings)
    model = NotANumber(len(PROMPT) + 3)
    result = generate(model, PROMPT, drafter=None, max_new_tokens=20, **settings)
    assert (result.tokens, result.text) == (plain.tokens[:3], plain.text[:3])
    assert result.finish_reason == "error"
    token = plain.tokens[2]
    assert f"node 0 (depth 0, position {len(PROMPT) + 2}, token {token} {bytes([token])!r}) are NaN" in result.error


def test_nan_inside_a_tree_names_the_node_and_gives_the_plain_text():
    model = NotANumber(len(PROMPT) + 3)
    plain = generate(model, PROMPT, drafter=None)
    result = generate(model, PROMPT, drafter=Oracle(FakeRunner()), budget=8)
    assert "node 2 (depth 2," in result.error and "are NaN" in result.error
    assert (result.tokens, result.text) == (plain.tokens, plain.text) and len(plain.tokens) == 3


def test_nan_off_the_path_changes_nothing():
    class NanAfterZ(FakeRunner):
        def logits(self, context):
            logits = super().logits(context)
            return logits * torch.nan if context[-1] == 250 else logits

    class DraftsZ(Drafts):
        def propose(self, context, budget):
            return DraftTree([context[-1], 250], [-1, 0])

    plain = generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=12)
    assert generate(NanAfterZ(), PROMPT, drafter=DraftsZ(), max_new_tokens=12).tokens == plain.tokens


def test_nan_after_the_prompt_and_in_a_batch():
    model = NotANumber(len(PROMPT))
    result = generate(model, [PROMPT, PROMPT[:3]], drafter=None, max_new_tokens=5)
    assert result.finish_reason == ["error", "length"]
    assert result.tokens[0] == [] and len(result.tokens[1]) == 5
    assert f"position {len(PROMPT) - 1}," in result.error[0] and result.error[1] is None
