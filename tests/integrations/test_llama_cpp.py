import numpy as np
import pytest

llama_cpp = pytest.importorskip("llama_cpp")

from pyspec.checkpoints.sources import demo_file  # noqa: E402
from pyspec.integrations.llama_cpp import DraftModel, speculate  # noqa: E402
from tests.helpers.table_drafters import drafter_of  # noqa: E402

TEXT = b"one, two, three, four, five, six, seven, eight; one, two, three, four, five,"


@pytest.fixture(scope="module")
def llama():
    return llama_cpp.Llama(str(demo_file()), n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False)


def say(llama, tokens, count=24):
    llama.reset()
    said = llama.generate(tokens, temp=0.0, repeat_penalty=1.0)
    return [next(said) for _ in range(count)]


def check_same(llama, prompt, found, expected):
    """Texts may part where two tokens are nearly as likely: llama.cpp computes them together otherwise."""
    place = next((at for at, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs), None)
    if place is not None:
        llama.reset()
        llama.eval([*prompt, *expected[:place]])
        logits = llama.scores[llama.n_tokens - 1]
        assert logits.max() - min(logits[found[place]], logits[expected[place]]) < 0.3, place


@pytest.mark.parametrize("drafter", ["merged", "lookup", "recycling"])
def test_the_text_is_the_same_in_fewer_calls(llama, drafter, monkeypatch):
    # a call takes a second, and a little more for more tokens; drafting takes no time
    now, eval_tokens = [0.0], llama.eval
    monkeypatch.setattr(llama, "eval", lambda ids: now.append(now[-1] + 1 + 0.1 * len(ids) / 64) or eval_tokens(ids))
    monkeypatch.setattr(DraftModel, "clock", staticmethod(lambda: now[-1]))
    prompt, other = llama.tokenize(TEXT), llama.tokenize(b"def add(a, b):")
    llama.draft_model = None
    expected = say(llama, prompt)
    draft_model, calls = speculate(llama, drafter), []
    llama.draft_model = lambda ids, **settings: calls.append(len(ids)) or draft_model(ids, **settings)
    found = say(llama, prompt)
    assert len(calls) < 24 if drafter != "recycling" else calls, "a text that repeats itself"
    say(llama, other)
    calls.clear()
    again = say(llama, prompt)
    assert len(calls) < 24, "a text that was said before"
    llama.draft_model = None
    check_same(llama, prompt, found, expected)
    check_same(llama, prompt, again, expected)


def test_drafts_are_of_the_type_that_llama_cpp_reads(llama):
    drafts = speculate(llama, "lookup")(np.array(llama.tokenize(TEXT), np.intc))
    assert drafts.dtype == np.intc and drafts.ndim == 1


def test_bad_input(llama):
    with pytest.raises(ValueError, match="drafter must be"):
        speculate(llama, "nobody")
    with pytest.raises(ValueError, match="must not need a model"):
        speculate(llama, "layer_skip")
    drawn = drafter_of("lookup", llama.n_vocab())
    drawn.proposal = "sampled"
    with pytest.raises(ValueError, match="drafter must be one that chooses"):
        speculate(llama, drawn)
    dark = llama_cpp.Llama(str(demo_file()), n_ctx=64, vocab_only=True, verbose=False)
    with pytest.raises(ValueError, match="logits_all=True"):
        speculate(dark)
