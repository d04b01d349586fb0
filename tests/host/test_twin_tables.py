"""The tables of the model-free drafters: the host module does what its plain-Python twin does, within its bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyspec.host import twins
from pyspec.ops.row_statistics import TOP
from pyspec.sampling.sampler import Sampler

host = pytest.importorskip("pyspec._host")

VOCAB = 11  # few tokens, so that n-grams come back
MODULES = (host, twins)


def top_of(random, nodes):
    """The 8 best of random logits, some of them no law at all, and some rows with fewer tokens."""
    logits = random.normal(scale=2, size=(nodes, VOCAB)).astype(np.float32)
    tokens = np.argsort(-logits, axis=1, kind="stable")[:, :TOP].astype(np.int32)
    values = np.take_along_axis(logits, tokens, 1)
    for row in range(nodes):
        if random.random() < 0.2:
            known = int(random.integers(0, TOP))
            tokens[row, known:], values[row, known:] = -1, -np.inf
    return tokens, values


def random_parents(random, nodes):
    return np.array([-1] + [int(random.integers(max(0, node - 3), node)) for node in range(1, nodes)], np.int32)


def sources_of(module, capacity, successors):
    return {
        "index": module.NgramIndex(),
        "pairs": module.Adjacency(VOCAB, 2),
        "memory": module.NgramMemory(capacity),
        "trigrams": module.Trigrams(capacity),
        "bigrams": module.Bigrams(successors, [3, 1]),
        "suffixes": module.SuffixLookup(capacity),
        "guesses": module.GuessedTree(),
    }


def random_guesses(random, text):
    """What a GuessedTree holds: siblings have different tokens, and the likelier come first."""
    parents, taken, tokens = random_parents(random, int(random.integers(1, 12))), set(), [text[-1]]
    chances = [1.0]
    for parent in parents[1:].tolist():
        tokens.append(next(token for token in random.permutation(VOCAB).tolist() if (parent, token) not in taken))
        taken.add((parent, tokens[-1]))
        chances.append(min(chances[-1], chances[parent]) * random.uniform(0.3, 1))
    return np.array(tokens), parents, np.array(chances, np.float32), min(len(text), 32)


@given(
    kinds=st.sets(
        st.sampled_from(["index", "pairs", "memory", "trigrams", "bigrams", "suffixes", "guesses"]), min_size=1
    ),
    capacity=st.sampled_from([1, 2, 7, 40, 100_000]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 50.0]),
    rounds=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 5)), min_size=1, max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=80, deadline=None)
def test_the_same_trees_from_the_same_history(kinds, capacity, temperature, rounds, seed):
    random = np.random.default_rng(seed)
    successors = np.array([random.permutation(VOCAB)[:TOP] for _ in range(VOCAB)], np.int32)
    successors[random.integers(0, TOP, VOCAB)[:, None] <= np.arange(TOP)] = -1
    sides = []
    for module in MODULES:
        made = sources_of(module, capacity, successors)
        sources = [made[kind] for kind in sorted(kinds)]
        noise = module.SamplerNoise(seed, temperature) if temperature else None
        estimates = module.Estimates([source.priors() for source in sources], 4.0)
        sides.append((module, made, sources, estimates, noise, [module.Cursor()]))
    text = random.integers(0, VOCAB, int(random.integers(1, 30))).tolist()
    fresh, read = text, 0
    for budget, steps in rounds:
        trees, guesses = [], random_guesses(random, text)
        for module, made, sources, estimates, noise, cursor in sides:
            made["guesses"].hold(*guesses)
            made["index"].extend(fresh)
            made["trigrams"].extend(text, read)
            made["trigrams"].reward(text)
            cursor[0] = made["suffixes"].extend(cursor[0], fresh)
            grown = module.grow(sources, estimates, text[-32:], budget, noise, len(text))
            trees.append([values.tolist() for values in grown])
        assert trees[0] == trees[1]
        tokens, parents, cells = (np.array(values) for values in trees[0][:3])
        top_tokens, top_logits = top_of(random, len(tokens))
        emitted = random.integers(0, VOCAB, steps).tolist()
        for _, made, _, estimates, _, _ in sides:
            tree = tokens.astype(np.int64), parents.astype(np.int32)
            made["memory"].update(*tree, text[:-1][-31:], top_tokens, top_logits)
            made["pairs"].update(*tree, ([-1] + text)[-2], top_tokens, top_logits)
            if temperature:
                estimates.learn_emitted(*tree, cells, emitted)
            else:
                estimates.learn(*tree, cells, top_tokens)
        read, fresh = len(text), emitted
        text = text + emitted
    ours, theirs = sides[0], sides[1]
    for name in ("hits", "trials"):
        np.testing.assert_array_equal(getattr(ours[3], name), getattr(theirs[3], name))
    for name in ("memory", "trigrams"):
        for table, other in zip(by_key(ours[1][name].saved()), by_key(theirs[1][name].saved()), strict=True):
            np.testing.assert_array_equal(table, other)
    for name in ("memory", "trigrams", "suffixes"):
        assert len(ours[1][name]) == len(theirs[1][name]) <= max(capacity, 2)
    for name in ours[1]:
        assert ours[1][name].priors() == theirs[1][name].priors()


def by_key(saved):
    order = np.argsort(saved[0])
    return [table[order] for table in saved]


@pytest.mark.parametrize("module", MODULES)
def test_the_noise_is_the_samplers(module):
    for seed, position in [(0, 0), (7, 3), (2**64 - 1, 2**33), (2**63 + 5, 1)]:
        tokens = np.array([0, 1, 2, 3, 4, 5, 48, 49_999])
        expected = Sampler(1.0, seed=seed)._gumbel(tokens, position)
        noise = module.SamplerNoise(seed, 1.0)
        assert [noise.gumbel(position, int(token)) for token in tokens] == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("module", MODULES)
def test_a_mean_law_is_the_mean_of_laws(module):
    memory = module.NgramMemory(100)
    laws = np.array([[0.5, 0.3, 0.2, 0, 0, 0, 0, 0], [0.1, 0.2, 0.7, 0, 0, 0, 0, 0], [0.2, 0.2, 0.6, 0, 0, 0, 0, 0]])
    for law in laws:
        order = np.argsort(-law, kind="stable").astype(np.int32)
        with np.errstate(divide="ignore"):
            memory.update(
                np.array([5]), np.array([-1], np.int32), [], order[None], np.log(law[order])[None].astype(np.float32)
            )
    _, counts, tokens, shares = memory.saved()
    assert counts.tolist() == [3] and tokens[0, :3].tolist() == [2, 0, 1]
    np.testing.assert_allclose(shares[0, :3], laws.mean(0)[[2, 0, 1]], atol=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_what_is_old_is_forgotten_and_what_comes_back_is_kept(module):
    memory, top = module.NgramMemory(20), np.arange(TOP, dtype=np.int32)[None]
    for token in range(200):
        for seen in (token, 0):  # 0 comes back again and again
            memory.update(np.array([seen]), np.array([-1], np.int32), [], top, np.zeros((1, TOP), np.float32))
    keys, counts, *_ = memory.saved()
    assert 10 <= len(keys) <= 20 and len(memory) == len(keys)
    assert counts.max() == 201  # its mean is that of all of them
    suffixes = module.SuffixLookup(20)
    suffixes.extend(module.Cursor(), list(range(100)))
    assert len(suffixes) <= 20
    estimates = module.Estimates([suffixes.priors()], 1.0)
    assert module.grow([suffixes], estimates, [98], 2)[0].tolist() == [98, 99]
    assert module.grow([suffixes], estimates, [5], 2)[0].tolist() == [5]


def test_suffixes_are_found_where_they_occur():
    """Against a search of the text, whatever the text."""
    random = np.random.default_rng(3)
    for alphabet in (1, 2, 3, 20):
        text = random.integers(0, alphabet, 3000).tolist()
        suffixes = host.SuffixLookup(10_000)
        suffixes.extend(host.Cursor(), text)
        estimates = host.Estimates([suffixes.priors()], 1.0)
        for _ in range(50):
            end = int(random.integers(20, 1000))  # of the first piece
            recent = text[end - int(random.integers(1, 20)) : end]
            tokens = host.grow([suffixes], estimates, recent, 20)[0].tolist()
            assert text[end] in tokens
        assert host.grow([suffixes], estimates, [alphabet + 1], 5)[0].tolist() == [alphabet + 1]


@pytest.mark.parametrize("step", [1, 100, 5000])
@pytest.mark.parametrize("module", MODULES)
def test_a_token_costs_no_more_than_a_piece_of_its_text(module, step):
    """A token is counted in all suffixes of what was read before it, so a text is read in pieces of 1024 tokens,
    however it comes: what a piece begins with follows nothing."""
    suffixes, cursor, text = module.SuffixLookup(10_000), module.Cursor(), list(range(3000))
    for start in range(0, len(text), step):
        cursor = suffixes.extend(cursor, text[start : start + step])
    estimates = module.Estimates([suffixes.priors()], 1.0)
    followed = [module.grow([suffixes], estimates, [token], 2)[0].tolist() == [token, token + 1] for token in text[:-1]]
    assert [token for token, is_followed in enumerate(followed) if not is_followed] == [1023, 2047]


def test_a_long_text_of_one_token_is_read():
    suffixes = host.SuffixLookup(400_000)
    suffixes.extend(host.Cursor(), [1] * 100_000)  # minutes, were it one piece
    assert len(suffixes) == 100_000
