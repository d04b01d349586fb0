"""What holds for every drafter."""

import sys
import warnings

import numpy as np
import pytest
import torch

import pyspec.host
from pyspec.drafters import DRAFTERS, drafter_from_name
from pyspec.drafters.table_drafter import TableDrafter
from pyspec.host import twins
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

VOCAB = 40
NAMES = [name for name in DRAFTERS if name not in ("layer_skip", "mtp")]  # which have tests of their own
PROMPT = [1, 2, 3, 4, 1, 2, 3, 5, 1, 2]


class Runner:
    vocab_size = VOCAB
    fingerprint, dtype = "tiny", torch.float32

    def prefill(self, prompts, *, capacity):
        return [torch.arange(VOCAB).eq(prompt[0] + 1).float() for prompt in prompts]


def logits_for(tree, seed=0):
    return torch.randn(len(tree), VOCAB, generator=torch.Generator().manual_seed(seed))


def started(name):
    """A drafter that has read the prompt and one chain of logits."""
    drafter = drafter_from_name(name, Runner()).start(PROMPT)
    chain = DraftTree.chain(PROMPT)
    drafter.observe(chain, Verified(logits_for(chain)), range(len(chain)))
    return drafter


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", [1, 2, 16, 4096])
def test_trees_keep_to_the_budget_and_name_no_child_twice(name, budget):
    tree = started(name).propose(PROMPT, budget)
    assert 1 <= len(tree) <= budget
    assert tree.tokens[0] == PROMPT[-1]
    assert len(tree) > 1 or budget == 1
    edges = list(zip(tree.parents.tolist(), tree.tokens.tolist(), strict=True))
    assert len(set(edges)) == len(edges)


@pytest.mark.parametrize("name", ["lookup", "recycling", "stand", "ngrammys"])  # others count a text that is read twice
def test_growing_with_the_context_is_reading_it_anew(name):
    drafter, context = started(name), list(PROMPT)
    for token in [3, 4, 1, 2, 3, 4, 1]:
        drafter.propose(context, 4)
        context.append(token)
    anew = drafter.start(context).propose(context, 16)
    grown = drafter.propose(context, 16)
    assert grown.tokens.tolist() == anew.tokens.tolist() and grown.parents.tolist() == anew.parents.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_budget_only_adds_nodes(name):
    drafter = started(name)
    large = drafter.propose(PROMPT, 20)
    for budget in range(1, len(large)):
        small = drafter.propose(PROMPT, budget)
        assert small.tokens.tolist() == large.tokens.tolist()[:budget]
        assert small.parents.tolist() == large.parents.tolist()[:budget]


def test_what_never_comes_true_is_offered_later():
    context = [7, 1, 0, 7, 1, 4, 7, 2, 5, 7]
    drafter = drafter_from_name("lookup", Runner()).start(context)
    assert drafter.propose(context, 2).tokens.tolist() == [7, 1]
    for _ in range(60):
        tree = drafter.propose(context, 2)
        if tree.tokens[1] == 2:
            break
        logits = torch.zeros(2, VOCAB)
        logits[0, 30] = 1
        drafter.observe(tree, Verified(logits), [0])
    assert tree.tokens.tolist() == [7, 2]
    assert drafter.start(context).propose(context, 2).tokens.tolist() == [7, 2]  # other sequences know it too


def test_what_comes_true_makes_trees_deeper():
    context = [7, 1, 8, 9, 7, 2, 8, 7]
    drafter = drafter_from_name("lookup", Runner()).start(context)
    deepest = drafter.propose(context, 4).depths.max()
    for _ in range(60):
        tree = drafter.propose(context, 4)
        logits = torch.zeros(len(tree), VOCAB)
        for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True):
            if (logits[parent] == 0).all():
                logits[parent, token] = 1
        drafter.observe(tree, Verified(logits), [0])
    assert drafter.propose(context, 4).depths.max() > deepest


def test_only_the_last_proposed_tree_counts_as_a_trial():
    drafter = started("merged")
    assert drafter._greedy.trials.sum() == 0
    stale = drafter.propose(PROMPT, 4)
    tree = drafter.propose([*PROMPT, 3], 4)
    drafter.observe(stale, Verified(logits_for(stale)), [0])
    assert drafter._greedy.trials.sum() == 0
    drafter.observe(tree, Verified(logits_for(tree)), [0])
    assert drafter._greedy.trials.sum() > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("budget", "error"),
    [(0, ValueError), (-1, ValueError), (4097, ValueError), (2.0, TypeError), (True, TypeError), ("8", TypeError)],
)
def test_bad_budgets(name, budget, error):
    with pytest.raises(error, match="budget"):
        started(name).propose(PROMPT, budget)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("token", [-1, VOCAB, 2**40])
def test_a_token_outside_the_vocabulary_changes_nothing(name, token):
    drafter = started(name)
    before = drafter.propose(PROMPT, 16)
    with pytest.raises(ValueError, match=r"context tokens must be in \[0, 40\)"):
        drafter.propose([*PROMPT, 7, token], 16)
    with pytest.raises(ValueError, match=r"context tokens must be in \[0, 40\)"):
        drafter.start([token])
    after = drafter.propose(PROMPT, 16)
    assert after.tokens.tolist() == before.tokens.tolist() and after.parents.tolist() == before.parents.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_contexts_that_do_not_fit(name):
    with pytest.raises(ValueError, match="at least one token"):
        drafter_from_name(name, Runner()).propose([], 4)
    with pytest.raises(ValueError, match="only grows"):
        started(name).propose(PROMPT[:-1], 4)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_do_not_fit(name):
    drafter = started(name)
    tree = drafter.propose(PROMPT, 4)
    for shape in [(len(tree) + 1, VOCAB), (len(tree), VOCAB + 1), (VOCAB,)]:
        with pytest.raises(ValueError, match="logits must be"):
            drafter.observe(tree, Verified(torch.zeros(shape)), [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_type_and_layout(dtype):
    tree = DraftTree.chain(PROMPT)
    logits = logits_for(tree).to(dtype)
    drafters = [drafter_from_name("merged", Runner()) for _ in range(2)]
    drafters[0].observe(tree, Verified(logits), [0])
    drafters[1].observe(tree, Verified(logits.T.contiguous().T.requires_grad_()), [0])
    first, second = (drafter.tables[-1].sources[0].successors for drafter in drafters)
    assert (first == second).all() and (first[PROMPT[-1]] == logits[-1].float().topk(8).indices.numpy()).all()


def test_names():
    assert drafter_from_name(None, Runner()) is None
    drafter = drafter_from_name("merged", Runner())
    assert isinstance(drafter, TableDrafter) and drafter_from_name(drafter, Runner()) is drafter
    with pytest.raises(ValueError, match="aded, layer_skip, lookup, merged, .* a Drafter or None, got .magic."):
        drafter_from_name("magic", Runner())


def test_requests_to_one_runner_share_a_drafter():
    runner = Runner()
    assert drafter_from_name("merged", runner) is drafter_from_name("merged", runner)
    assert drafter_from_name("merged", runner) is not drafter_from_name("recycling", runner)
    assert drafter_from_name("merged", runner) is not drafter_from_name("merged", Runner())


def test_without_the_compiled_module_drafting_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspec._host", None)
    monkeypatch.delattr("pyspec._host", raising=False)
    for found in (pyspec.host.compiled, pyspec.host.host):
        found.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="plain Python"):
            drafter = drafter_from_name("merged", Runner())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert pyspec.host.host() is twins
            assert len(drafter.start(PROMPT).propose(PROMPT, 4)) == 4
    finally:
        for found in (pyspec.host.compiled, pyspec.host.host):
            found.cache_clear()


def test_a_node_that_was_cut_off_counts_where_its_parent_was_verified():
    drafter = started("lookup")
    tree = drafter.propose(PROMPT, 40)
    children = int((tree.parents == 0).sum())
    assert 1 < children < len(tree) - 1
    drafter.observe(tree.first(1), Verified(logits_for(tree)[:1]), [0])
    assert drafter._greedy.trials.sum() == children


@pytest.mark.parametrize("name", NAMES)
def test_chances_never_rise_along_a_tree(name):
    drafter = started(name)
    drafter.observe(DraftTree.chain(PROMPT), Verified(logits_for(DraftTree.chain(PROMPT))), range(len(PROMPT)))
    chances = drafter.propose(PROMPT, 20).chances
    assert chances[0] == 1 and (np.diff(chances) <= 0).all() and (chances > 0).all()
