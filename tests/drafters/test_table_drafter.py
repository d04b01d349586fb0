"""STAND, ADED, N-Grammys, and any of the model-free drafters merged into one tree and kept in a file."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.drafters import new_drafter
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.ngrammys import NgrammysRows, model_bigrams
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.drafters.tables.aded import Aded
from pyspec.drafters.tables.bigrams import Bigrams, common_tokens
from pyspec.drafters.tables.lookup import Lookup
from pyspec.drafters.tables.recycling import Recycling
from pyspec.drafters.tables.stand import Stand
from pyspec.drafters.tables.suffix import Suffix
from pyspec.generate import generate
from pyspec.machine import store
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree
from tests.helpers.fake_runner import EOS, FakeRunner

VOCAB = 30
PROMPT = list(b"once upon a time")
LEARNING = {"recycling": Recycling, "suffix": Suffix, "stand": Stand, "aded": Aded}
SUCCESSORS = np.array([[(token + step) % VOCAB for step in range(1, 9)] for token in range(VOCAB)], np.int32)


def drafting_from(name, vocab_size=VOCAB, fingerprint="tiny", **settings):
    return TableDrafter([LEARNING[name](vocab_size, **settings)], fingerprint)


def logits_of(laws):
    """[T, VOCAB] logits of some {token: share}."""
    logits = torch.full((len(laws), VOCAB), -torch.inf)
    for row, law in zip(logits, laws, strict=True):
        for token, share in law.items():
            row[token] = np.log(share)
    return logits


def children(tree, node=0):
    return [int(tree.tokens[child]) for child in tree.children(node)]


# ---- STAND


def test_stand_backs_off_from_the_longest_ngram():
    made = drafting_from("stand")
    texts = {(1, 2, 3, 4): {10: 1.0}, (9, 2, 3, 4): {11: 1.0}, (8, 8, 3, 4): {12: 1.0}}
    for text, law in texts.items():
        made.observe(DraftTree.chain(text), Verified(logits_of([{0: 1.0}] * (len(text) - 1) + [law])), [0])
    assert children(made.start([1, 2, 3, 4]).propose([1, 2, 3, 4], 4))[0] == 10
    assert set(children(made.start([7, 2, 3, 4]).propose([7, 2, 3, 4], 4))[:2]) == {10, 11}
    assert set(children(made.start([7, 7, 7, 4]).propose([7, 7, 7, 4], 4))) == {10, 11, 12}


def test_stand_remembers_what_stands_before_a_tree():
    made = drafting_from("stand").start([1, 2])
    tree = made.propose([1, 2], 1)
    made.observe(tree, Verified(logits_of([{5: 1.0}])), [0])
    keys = made.tables[0].sources[0].saved()[0]
    assert len(keys) == 2  # after 2, and after 1 2


def test_stand_drafts_what_the_noise_will_choose():
    """With the target's own law in its memory and the sampler's noise, nearly every draw is foreseen."""
    model, settings = FakeRunner(), dict(temperature=1.0, max_new_tokens=80)
    drafter = new_drafter("stand", model)
    for seed in range(6):  # the fake model's law depends on two tokens, so it soon is known
        generate(model, PROMPT, drafter=drafter, budget=16, seed=seed, **settings)
    coupled = generate(model, PROMPT, drafter=drafter, budget=8, seed=99, **settings)
    drafter.coupled_to = lambda sampler: drafter
    alone = generate(model, PROMPT, drafter=drafter, budget=8, seed=99, **settings)
    assert coupled.tokens == alone.tokens
    assert coupled.stats.mean_accepted_length > 1.3 * alone.stats.mean_accepted_length


# ---- ADED


def test_aded_prefers_what_the_newest_tokens_said():
    made = drafting_from("aded")
    for _ in range(3):
        made.read_text([1, 2, 10])
        made.read_text([1, 2, 11])
    context = [1, 2, 11, 5, 1, 2]
    started = made.start(context)
    for _ in range(20):
        tree = started.propose(context, 3)
    assert children(tree)[0] == 11
    assert len(made.start([2, 1]).propose([2, 1], 4)) == 1 and len(made.start([1]).propose([1], 4)) == 1
    for corpus in ([], [7], [7, 8]):  # no trigram
        made.read_text(corpus)
    assert len(made.start([7, 8]).propose([7, 8], 4)) == 1


# ---- N-Grammys


class Counting(FakeRunner):
    fingerprint = "counting"
    runs = 0

    def prefill(self, tokens, **settings):
        Counting.runs += 1
        return super().prefill(tokens, **settings)


def test_bigrams_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, done = Counting(), []
    bigrams = model_bigrams(model, lambda *progress: done.append(progress))
    assert done == [(256, EOS + 1), (EOS + 1, EOS + 1)]
    for token in (0, 97, EOS):
        logits = model.logits([token])
        assert logits[bigrams[token].tolist()].tolist() == logits.topk(8).values.tolist()
    runs = Counting.runs
    assert (model_bigrams(Counting()) == bigrams).all() and Counting.runs == runs
    (file,) = store.folder().glob("bigrams-*")
    kept = json.loads(file.read_text())
    key, table = kept["key"], kept["entry"]
    for damaged in (None, 3, [1], "", "a", "?" + table[1:], table[:-32], "////f" + table[5:]):
        store.keep("bigrams", key, damaged)
        runs = Counting.runs
        assert (model_bigrams(Counting()) == bigrams).all() and Counting.runs > runs
    other = Counting()
    other.fingerprint = "another model"
    before = Counting.runs
    model_bigrams(other)
    assert Counting.runs > before


def test_bigrams_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert model_bigrams(Counting()).shape == (EOS + 1, 8)


def test_bigrams_are_chained_and_the_common_tokens_come_last():
    tree = TableDrafter([Lookup(VOCAB), Bigrams(VOCAB, SUCCESSORS)]).start([3]).propose([3], 40)
    assert children(tree)[0] == 4 and children(tree, tree.children(0)[0])[0] == 5
    successors = np.full((VOCAB, 8), -1, np.int32)
    successors[:20, 0], successors[20:, 0], successors[:10, 1] = 7, 8, 9
    assert common_tokens(successors) == [7, 8, 9]
    tree = TableDrafter([Lookup(VOCAB), Bigrams(VOCAB, successors)]).start([25]).propose([25], 4)
    assert set(children(tree)[:2]) == {25, 8}  # the text's own token, and the bigram
    with pytest.raises(ValueError, match=r"bigrams must be \[31, 8\]"):
        Bigrams(31, SUCCESSORS)
    with pytest.raises(ValueError, match="from 0 to 30"):
        NgrammysRows(VOCAB, np.where(SUCCESSORS == 29, 30, SUCCESSORS))


def test_rows_are_the_papers():
    context = [1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 3, 0, 1, 9, 9, 9, 1]
    made = NgrammysRows(VOCAB, SUCCESSORS, rows=4, width=3).start(context)
    assert made._continuations(context) == [(2, 3, 0), (9, 9, 9), (4, 5, 0), (2, 3, 4)]
    tree = made.propose(context, 100)
    assert tree.tokens.tolist() == [1, 2, 3, 0, 9, 9, 9, 4, 5, 0, 4]
    assert tree.parents.tolist() == [-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 2]
    assert made.propose(context, 5).tokens.tolist() == tree.tokens.tolist()[:5]
    assert made.propose([1], 1).tokens.tolist() == [1]
    with pytest.raises(ValueError, match="rows must be at least 1"):
        NgrammysRows(VOCAB, SUCCESSORS, rows=0)


@pytest.mark.parametrize("sampled", [{}, dict(temperature=0.9, seed=4)])
def test_rows_give_the_plain_text(sampled):
    model = FakeRunner()
    drafter = NgrammysRows(model.vocab_size, model_bigrams(model))
    plain = generate(model, PROMPT * 2, drafter=None, max_new_tokens=60, **sampled)
    said = generate(model, PROMPT * 2, drafter=drafter, budget=40, max_new_tokens=60, **sampled)
    assert said.tokens == plain.tokens and said.stats.rounds < 59


# ---- merged


@given(
    names=st.lists(st.sampled_from(["lookup", *LEARNING]), min_size=1, unique=True),
    budget=st.sampled_from([1, 2, 7, 40]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1e30]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12, deadline=None)
def test_any_merge_gives_the_plain_text_from_valid_trees(names, budget, temperature, seed):
    model, call = FakeRunner(), dict(max_new_tokens=20, temperature=temperature, seed=seed)
    drafter = TableDrafter([table for name in names for table in new_drafter(name, model).tables], model.fingerprint)
    for _ in range(2):  # with empty tables, and with full ones
        plain = generate(model, PROMPT, drafter=None, **call)
        assert generate(model, PROMPT, drafter=drafter, budget=budget, **call).tokens == plain.tokens
    context = PROMPT + plain.tokens
    tree = drafter.start(context).propose(context, budget)
    edges = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    assert len(tree) <= budget and len(set(edges)) == len(edges) and edges[0] == (-1, context[-1])
    assert (np.diff(tree.chances) <= 0).all()


def test_what_cannot_be_merged():
    lookup, model = Lookup(VOCAB), FakeRunner()
    with pytest.raises(ValueError, match="vocabulary of 31 tokens, got 30"):
        TableDrafter([Recycling(31), lookup])
    with pytest.raises(ValueError, match="different kinds"):
        TableDrafter([lookup, Bigrams(VOCAB, SUCCESSORS), Lookup(VOCAB)])
    with pytest.raises(ValueError, match="at least one"):
        TableDrafter([])
    with pytest.raises(TypeError, match="got ModelDrafter"):
        TableDrafter([ModelDrafter(FakeRunner(), model)])
    with pytest.raises(ValueError, match="Lookup keeps no texts"):
        TableDrafter([lookup]).read_text([1, 2])


def test_merged_drafters_share_their_tables():
    suffix = Suffix(VOCAB)
    merged = TableDrafter([Lookup(VOCAB), suffix])
    TableDrafter([suffix]).read_text([1, 2, 3])
    assert merged.start([1]).propose([1], 3).tokens.tolist() == [1, 2, 3]


# ---- saved tables


def taught(name):
    random = np.random.default_rng(0)
    made = drafting_from(name)
    for _ in range(5):
        text = random.integers(0, VOCAB, 40).tolist()
        started = made.start(text)
        started.observe(DraftTree.chain(text), Verified(torch.randn(40, VOCAB)), range(40))
        started.propose(text, 8)
    return made, text


@pytest.mark.parametrize("name", LEARNING)
def test_saved_and_loaded(name, tmp_path):
    saved, text = taught(name)
    saved.save(tmp_path / "tables")
    loaded = drafting_from(name)
    loaded.load(tmp_path / "tables")
    saved.save(tmp_path / "again")
    assert (tmp_path / "tables").read_bytes() == (tmp_path / "again").read_bytes()
    fresh = TableDrafter(saved.tables)  # its rates are not saved
    trees = [made.start(text[:20]).propose(text[:20], 30) for made in (fresh, loaded)]
    assert len(trees[0]) > 2 and trees[0].tokens.tolist() == trees[1].tokens.tolist()
    for other in (drafting_from(name, VOCAB + 1), drafting_from(name, fingerprint="other tokenizer")):
        with pytest.raises(ValueError, match="vocab_size 30.*needs 31|fingerprint tiny.*needs 'other tokenizer'"):
            other.load(tmp_path / "tables")


@pytest.mark.parametrize("name", LEARNING)
def test_damaged_tables_change_nothing(name, tmp_path):
    made, _ = taught(name)
    made.save(tmp_path / "tables")
    with np.load(tmp_path / "tables") as archive:
        whole = dict(archive)
    tables = sorted(set(whole) - {"vocab_size", "fingerprint", "format_version"})
    for table in tables:
        for damaged in (None, whole[table][:-1], whole[table].astype(np.float64), whole[table][:, None]):
            if name == "suffix" and damaged is not None and damaged.shape == whole[table][:-1].shape:
                continue  # a text that lost its end is a text
            fields = {field: value for field, value in whole.items() if field != table}
            fields |= {} if damaged is None else {table: damaged}
            with open(tmp_path / "damaged", "wb") as file:
                np.savez(file, **fields)
            fresh = drafting_from(name)
            with pytest.raises(ValueError, match=f"{table}|rows"):
                fresh.load(tmp_path / "damaged")
            assert len(fresh.start([1]).propose([1], 4)) == 1


@pytest.mark.parametrize("name", ["stand", "aded"])
def test_tables_are_bounded(name):
    made = drafting_from(name, capacity=100)
    random = np.random.default_rng(0)
    for _ in range(30):
        text = random.integers(0, VOCAB, 50).tolist()
        made.start(text).observe(DraftTree.chain(text), Verified(torch.randn(50, VOCAB)), range(50))
    assert 50 <= len(made.tables[0].sources[0]) <= 100
    with pytest.raises(ValueError, match="capacity must be at least 2"):
        drafting_from(name, capacity=1)


def test_a_merge_is_saved_as_a_whole(tmp_path):
    merged = TableDrafter([kind(VOCAB) for kind in LEARNING.values()], "tiny")
    text = list(range(20))
    merged.start(text).observe(DraftTree.chain(text), Verified(torch.randn(20, VOCAB)), range(20))
    merged.save(tmp_path / "tables")
    alone = drafting_from("stand")
    alone.load(tmp_path / "tables")  # its own part of it
    assert len(alone.tables[0].sources[0]) > 20
    with pytest.raises(ValueError, match="no bigrams|no lookup|no stand_keys"):
        taught("recycling")[0].save(tmp_path / "tables")
        alone.load(tmp_path / "tables")
