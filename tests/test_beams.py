"""Beam search in groups: the beams of a search without a tree, and of transformers' own where it still has it."""

import random

import numpy as np
import pytest
import torch

import pyspec
from pyspec import DraftTree, GearSettings, generate
from pyspec import branches as branches_module
from pyspec.beams import beam_search
from pyspec.branches import Branches
from tests.helpers.fake_runner import EOS, FakeRunner
from tests.helpers.random_llama import random_llama, random_tokens
from tests.helpers.small_transformers import tiny as small_transformers

PROMPT = list(b"once upon")


class Ending(FakeRunner):
    """A model whose texts end now and then."""

    def logits(self, context):
        logits = super().logits(context)
        logits[EOS] = 1.5 if sum(context[-3:]) % 5 == 0 else -60.0
        return logits


def searched(law, prompt, ends, beams, groups, diversity, length_penalty, length):
    """(tokens, score, group) of diverse beam search as its paper and transformers have it, text by text."""
    size = beams // groups
    living = [[(0.0, ())] for _ in range(groups)]
    finished = [[] for _ in range(groups)]
    for step in range(1, length + 1):
        said = []
        for group in range(groups):
            if not living[group]:
                continue
            candidates = []
            for index, (total, tokens) in enumerate(living[group]):
                scores = law([*prompt, *tokens]) - diversity * np.bincount(said, minlength=len(law(prompt)))
                candidates += [(-(total + score), index, token) for token, score in enumerate(scores)]
            candidates.sort()
            picked = []
            for rank, (negative, index, token) in enumerate(candidates[: size * max(2, 1 + len(ends))]):
                tokens = (*living[group][index][1], token)
                if token not in ends and len(picked) < size:
                    picked.append((-negative, tokens))
                elif token in ends and rank < size:
                    finished[group].append((-negative / step**length_penalty, tokens))
            finished[group] = sorted(finished[group], reverse=True)[:size]
            said += [tokens[-1] for _, tokens in picked]
            is_full = len(finished[group]) == size
            if is_full and finished[group][-1][0] >= picked[0][0] / step**length_penalty:
                picked = []
                said = said[: -size or None]
            living[group] = picked
    for group in range(groups):
        ended = [(total / length**length_penalty, tokens) for total, tokens in living[group]]
        finished[group] = sorted([*finished[group], *ended], reverse=True)[:size]
    found = [(list(tokens), score, group) for group in range(groups) for score, tokens in finished[group]]
    return sorted(found, key=lambda each: -each[1])


def law_of(model):
    rows = {}

    def law(context):
        if tuple(context) not in rows:
            rows[tuple(context)] = model.logits(list(context)).double().log_softmax(0).numpy()
        return rows[tuple(context)]

    return law


@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("beams, groups, diversity", [(1, 1, 0.5), (4, 1, 0.5), (6, 3, 0.7), (4, 4, 5.0), (6, 2, 0.0)])
def test_the_beams_are_those_of_a_search_without_a_tree(beams, groups, diversity, penalty):
    expected = searched(law_of(Ending()), PROMPT, {EOS}, beams, groups, diversity, penalty, 24)
    found = beam_search(
        Ending(), PROMPT, beams=beams, groups=groups, diversity=diversity, length_penalty=penalty, max_new_tokens=24
    ).beams
    assert [(beam.tokens, beam.group) for beam in found] == [(tokens, group) for tokens, _, group in expected]
    assert [beam.score for beam in found] == pytest.approx([score for _, score, _ in expected], abs=1e-4)
    assert {beam.finish_reason for beam in found} <= {"eos", "length"}
    assert all((beam.tokens[-1] == EOS) == (beam.finish_reason == "eos") for beam in found)


def test_some_of_those_beams_end():
    found = beam_search(Ending(), PROMPT, beams=6, groups=3, max_new_tokens=24).beams
    assert {beam.finish_reason for beam in found} == {"eos", "length"}
    assert all("<end>" not in beam.text for beam in found)


def test_a_greedy_beam_is_greedy_text():
    (beam,) = beam_search(FakeRunner(), PROMPT, beams=1, max_new_tokens=80).beams
    assert beam.tokens == generate(FakeRunner(), PROMPT, drafter=None, max_new_tokens=80).tokens


def test_one_group_has_the_beams_of_transformers():
    model = small_transformers()
    prompt = [5, 6, 7, 5, 9]
    theirs = model.generate(
        torch.tensor([prompt]), num_beams=5, num_return_sequences=5, max_new_tokens=20, do_sample=False,
        eos_token_id=[3, 8], pad_token_id=0, return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    native = pyspec.from_transformers(model)
    native.eos_tokens = frozenset({3, 8})
    ours = beam_search(native, prompt, beams=5, max_new_tokens=20).beams
    for beam, tokens, score in zip(ours, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True):
        tokens = tokens[len(prompt) :]
        assert beam.tokens == tokens[: len(beam.tokens)] and set(tokens[len(beam.tokens) :]) <= {0}
        assert beam.score == pytest.approx(score, abs=1e-4)


# ==== branches ====


def plain_rows(runner, texts):
    """What plain decoding says after each text."""
    return [runner.prefill([text])[0] for text in texts]


@pytest.mark.parametrize("windows", [(None, None), (6, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_branches_have_the_bits_of_their_texts(windows, dtype, monkeypatch):
    """A random walk: nodes come anywhere, most die, and what is left is told as if nothing else had ever been."""
    monkeypatch.setattr(branches_module, "FEW_NODES", 12)
    runner = random_llama(dtype=dtype, windows=windows)
    plain, generator, prompt = runner.fork(), random.Random(1), random_tokens(9)
    branches = Branches.after(runner, prompt, 60)
    texts, pruned, committed = {0: prompt}, 0, len(prompt) - 1
    branches.rows()
    leaves = [0]
    for _ in range(25):
        parents = [generator.choice(leaves) for _ in range(4)]
        new = branches.add(parents, tokens := [generator.randrange(97) for _ in parents])
        texts |= {node: [*texts[parent], token] for node, parent, token in zip(new, parents, tokens, strict=True)}
        rows = branches.rows().logits
        for node, row, expected in zip(new, rows, plain_rows(plain, [texts[node] for node in new]), strict=True):
            assert torch.equal(row, expected), node
        leaves = generator.sample(new, 2)
        size, kept = len(branches), branches.prune(leaves)
        if len(branches) < size:
            pruned += 1
            old = [texts[leaf] for leaf in leaves]
            texts = dict(zip(kept, old, strict=True))
            leaves = kept
    assert pruned >= 3 and runner.lengths()[0] > committed


def test_later_nodes_need_a_cache_that_keeps_keys():
    runner, tree = random_llama(), DraftTree([1, 2, 3], [-1, 0, 0])
    runner.prefill([random_tokens(5)])
    runner.verify({0: tree.first(2)})
    later = runner.verify({0: tree.later(2)})[0].logits
    assert torch.equal(later, runner.verify({0: tree})[0].logits[2:])
    runner.commit({0: [0, 2]})
    assert runner.lengths() == [7]
    runner.prefill([random_tokens(5)], cache=GearSettings())
    runner.verify({0: tree.first(2)})
    with pytest.raises(ValueError, match="must be a whole tree"):
        runner.verify({0: tree.later(2)})


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (dict(beams=0), ValueError, "beams must be in"),
        (dict(beams=4, groups=5), ValueError, "groups must divide"),
        (dict(beams=4, groups=3), ValueError, "groups must divide"),
        (dict(diversity=-0.1), ValueError, "diversity must be"),
        (dict(length_penalty=float("inf")), ValueError, "length_penalty must be"),
        (dict(max_new_tokens=0), ValueError, "max_new_tokens must be"),
        (dict(tokens=[97]), ValueError, "tokens must be at least 2"),
        (dict(tokens=[[97, 98]]), TypeError, "one prompt"),
        (dict(beams=2.5), TypeError, "beams must be"),
    ],
)
def test_what_does_not_fit_is_refused(settings, error, message):
    model = FakeRunner()
    with pytest.raises(error, match=message):
        beam_search(model, **{"tokens": PROMPT} | settings)
    assert not model.verified and not model.committed
