"""Drafters of the command line that are more than a name: a second model, a trained head, what was learned before."""

import json

import pytest

import pyspec
from tests.drafters.heads.test_context_heads import write_head as write_context_head
from tests.helpers.command_line import fake_model, pyspec_text, run
from tests.helpers.eagle3_heads import random_head, write_head
from tests.helpers.fake_runner import FakeRunner
from tests.helpers.random_llama import VOCABULARY, random_llama

model = pytest.fixture(fake_model)


def test_generate_with_a_draft_model(model, capsys, monkeypatch):
    load = pyspec.load
    monkeypatch.setattr(pyspec, "load", lambda source, **options: load(source, **options) and FakeRunner())
    call = ("generate", "hello", "--draft-model", "small", "--json", "--max-new-tokens", 30, "--budget", 9)
    for acceptance in ("exact", "with_replacement", "recursive", "k_seq", "block", "traversal", "typical"):
        code, out, _ = run(capsys, *call, "--acceptance", acceptance)
        report = json.loads(out)
        assert code == 0 and (report["drafter"], report["acceptance"]) == ("small", acceptance)
        assert report["text"] == pyspec_text(model, "user: hello\n", 30) and report["plain"]["equal"]
        assert report["stats"]["mean_accepted_length"] > 1.3
    assert model.loads[-2:] == [("demo", None), ("small", None)]
    code, _, err = run(capsys, "generate", "hello", "--draft-model", "small", "--temperature", 1, "--budget", 9,
                       "--max-new-tokens", 60, "--acceptance", "traversal", "--seed", 3)  # fmt: skip
    assert code == 0 and "as it may with acceptance traversal" in " ".join(err.split())


def test_generate_with_a_draft_head(capsys, monkeypatch, tmp_path):
    target = random_llama(windows=(None,) * 6)
    target.tokenizer = Letters()
    monkeypatch.setattr(pyspec, "load", lambda source, **options: target)
    head = write_head(tmp_path / "head", random_head(VOCABULARY, target.hidden_size), VOCABULARY, taps=(1, 2, 3))
    call = ("generate", "hello", "--raw", "--json", "--max-new-tokens", 20, "--budget", 5)
    code, out, _ = run(capsys, *call, "--draft-head", head)
    report = json.loads(out)
    assert code == 0 and report["drafter"] == str(head) and report["plain"]["equal"]
    for wrong, words in ((tmp_path / "none", "there is no model at"), (tmp_path, "there is no draft head at")):
        code, _, err = run(capsys, *call, "--draft-head", wrong)
        assert code == 2 and words in " ".join(err.split())


def test_info_says_what_a_draft_head_is(capsys, monkeypatch, tmp_path):
    target = random_llama(windows=(None,) * 6)
    target.tokenizer = Letters()
    monkeypatch.setattr(pyspec, "load", lambda source, **options: target)
    tensors = random_head(VOCABULARY, target.hidden_size, norm_before_fc=True)
    options = {"layout": "flat", "taps": (1, 2, 3), "norm_before_fc": True}
    head = write_head(tmp_path / "head", tensors, VOCABULARY, **options)
    code, out, _ = run(capsys, "info", "--draft-head", head, "--json")
    found = json.loads(out)
    assert code == 0 and found["layout"] == "flat" and found["flags"] == "norm_before_fc"
    assert found["taps"].startswith("[2, 3, 4]") and found["embedding"] == found["head"] == "its own"
    assert found["vocabulary"] == "40 of the target's 97 tokens" and "for the first is 1" in found["choice 1"]
    code, out, _ = run(capsys, "info", "--draft-head", head)
    assert code == 0 and "an EAGLE-3 head for demo" in out
    code, _, err = run(capsys, "info", "--draft-head", tmp_path)
    assert code == 2 and "there is no draft head at" in " ".join(err.split())


@pytest.mark.parametrize("kind, title", [("dspark", "a DSpark block drafter"), ("chimera", "the style of Chimera")])
def test_other_kinds_of_heads_are_found(capsys, monkeypatch, tmp_path, kind, title):
    target = random_llama(windows=(None,) * 6)
    target.tokenizer = Letters()
    monkeypatch.setattr(pyspec, "load", lambda source, **options: target)
    write_context_head(tmp_path, target, kind)
    code, out, _ = run(capsys, "info", "--draft-head", tmp_path)
    assert code == 0 and title in out and "[2, 3, 5] of the target" in out and "40 of the target's 97 tokens" in out
    call = ("generate", "hello", "--raw", "--json", "--max-new-tokens", 20, "--budget", 5, "--draft-head", tmp_path)
    for more in ((), ("--acceptance", "recursive", "--temperature", 0)):
        code, out, _ = run(capsys, *call, *more)
        assert code == 0 and json.loads(out)["plain"]["equal"]


class Letters:
    """A tokenizer of a vocabulary of 97: letters are their codes, less 32."""

    fingerprint, eos_tokens, chat_template = "letters", frozenset(), None

    def encode(self, text, **options):
        return [(ord(letter) - 32) % VOCABULARY for letter in text]

    def token_bytes(self, token):
        return bytes([token + 32])


@pytest.mark.parametrize("drafter", ["recycling", "suffix", "stand", "aded"])
def test_generate_keeps_what_the_drafter_learned(drafter, model, capsys, tmp_path):
    state = tmp_path / "state.npz"
    arguments = ("generate", "hello", "--drafter", drafter, "--drafter-state", state, "--json", "--no-compare")
    reports = [json.loads(run(capsys, *arguments)[1]) for _ in range(2)]
    assert state.exists() and reports[0]["tokens"] == reports[1]["tokens"]
    assert reports[1]["stats"]["rounds"] < reports[0]["stats"]["rounds"]

    model.fingerprint = "another"
    del model._drafters  # a runner keeps its drafters; this stands for another runner
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and "fingerprint" in err and "another" in err
