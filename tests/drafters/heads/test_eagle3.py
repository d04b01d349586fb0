"""EAGLE-3 heads say what their paper's computation says, in every layout, and never change the text."""

from itertools import product
from random import Random

import numpy as np
import pytest
import torch

from pyspec import DraftTree, generate
from pyspec.acceptance import RULES
from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.heads.eagle3_batch import HeadBatch, HeadLaws
from pyspec.drafters.heads.eagle3_room import HeadRoom
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.drafters.tables.lookup import Lookup
from pyspec.runners.foreign import TransformersRunner
from pyspec.runners.replay import Replays, Shape
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from tests.helpers.eagle3_heads import FLAGS, random_head, steps, write_head
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens, root_path
from tests.helpers.runner_checks import observed_taps

TAPS = (2, 3, 5)
COMBINATIONS = [
    dict(zip(FLAGS, flags, strict=True)) for flags in product((False, True), repeat=4) if not (flags[1] and flags[2])
]
KINDS = [("llama", "speculators"), ("qwen3", "speculators"), ("llama", "flat"), ("llama", "nemo")]


def name_of(flags):
    return "-".join(name for name, on in flags.items() if on) or "none"


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


def reading(drafter, target, prompt):
    """A drafter that has read a prompt but its last token."""
    reader = drafter.start(prompt[:-1])

    def observe(slot, chain, verified):
        reader.observe(chain, verified, range(len(chain)))

    target.prefill([prompt[:-1]], taps=drafter.taps, observe=observe)
    return reader


def said(drafter, target, prompt, guesses):
    """[1 + len(guesses), draft] of the head's laws along a chain of its own tokens below a text."""
    reader = reading(drafter, target, prompt)
    reader._batch.read({reader._sequence: prompt})
    laws = HeadLaws(reader._batch, reader._sequence, Sampler(1.0))
    found, tokens, parents = [], [0], [-1]
    for guess in [*guesses, 0]:
        found.append(laws.laws(tokens, parents, [len(tokens) - 1])[0])
        parents.append(len(tokens) - 1)
        tokens.append(guess)
    return torch.stack([torch.from_numpy(law) for law in found])


@torch.inference_mode()
@pytest.mark.parametrize("kind, layout", KINDS)
@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_laws_are_those_of_the_paper(target, tmp_path, kind, layout, flags):
    shape = {"kind": kind, "biases": layout == "nemo", "layers": 1 + (layout == "flat")}
    tensors = random_head(VOCABULARY, target.hidden_size, **shape, **flags)
    folder = write_head(tmp_path, tensors, VOCABULARY, kind=kind, layout=layout, taps=TAPS, **flags)
    drafter = Eagle3(folder, target, weights=torch.float32)
    prompt, guesses = random_tokens(40), [3, 17, 3]
    (taps,) = observed_taps(target, [prompt[:-1]], TAPS)
    of_target = drafter.head.target_tokens(torch.tensor(guesses).numpy()).tolist()
    expected = steps(tensors, taps, prompt[1:], of_target, flags).softmax(-1)
    found = said(drafter, target, prompt, guesses)
    assert expected.max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# ==== whole texts ====

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def a_head(tmp_path, target, **options):
    tensors = random_head(VOCABULARY, target.hidden_size, fc_norm=True, norm_output=True, **options)
    return write_head(tmp_path / "head", tensors, VOCABULARY, taps=TAPS, fc_norm=True, norm_output=True)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
def test_texts_are_those_of_plain_decoding(tmp_path, name, settings):
    target = random_llama(windows=(None,) * 6, dtype=DTYPES[name])
    drafter = Eagle3(a_head(tmp_path, target), target)
    prompts = [random_tokens(length, length) for length in (150, 2, 1, 20)]
    plain = generate(target, prompts, drafter=None, max_new_tokens=40, **settings)
    for budget in (2, 7, 20):
        drafted = generate(target, prompts, drafter=drafter, budget=budget, max_new_tokens=40, **settings)
        assert drafted.tokens == plain.tokens
    assert sum(drafted.stats.accepted_lengths[2:])  # some guesses are right


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("tables", [None, ()], ids=["merged", "alone"])
def test_sequences_of_a_batch_are_drafted_together(tmp_path, monkeypatch, tables, settings):
    """Each level of all trees is one call; what each sequence gets proposed is what it gets by itself."""
    target, calls, trees = random_llama(windows=(None,) * 6), [], []
    drafter = Eagle3(a_head(tmp_path, target), target, TopPaths(2, 3), tables=tables)
    guess, together = HeadBatch.guess, Eagle3.propose_together

    def counted(self, asked):
        calls.append(len(asked))
        return guess(self, asked)

    def compared(drafters, contexts, budgets):
        trees.append(together(drafters, contexts, budgets))
        for each, context, budget, tree in zip(drafters, contexts, budgets, trees[-1], strict=True):
            (alone,) = together([each], [context], [budget])
            assert alone.tokens.tolist() == tree.tokens.tolist() and alone.parents.tolist() == tree.parents.tolist()
        return trees[-1]

    prompts = [random_tokens(length, length) for length in (150, 2, 20)]
    with monkeypatch.context() as patch:
        patch.setattr(HeadRoom, "is_recorded", False)
        patch.setattr(HeadBatch, "guess", counted)
        generate(target, prompts, drafter=drafter, budget=9, max_new_tokens=12, **settings)
    assert calls[:3] == [3, 3, 3]
    if tables is None:
        return  # rates are learned from tree to tree
    monkeypatch.setattr(Eagle3, "propose_together", staticmethod(compared))
    generate(target, prompts, drafter=drafter, budget=9, max_new_tokens=12, **settings)
    assert {len(tree) for round_trees in trees for tree in round_trees} & {8, 9}


def test_padded_rows_guess_the_same(tmp_path, monkeypatch):
    """As on a GPU, where all sequences of a call have one number of rows."""
    target = random_llama(windows=(None,) * 6)
    drafter = Eagle3(a_head(tmp_path, target), target, TopPaths(3, 3), tables=())
    prompts = [random_tokens(length, length) for length in (150, 2, 20)]
    expected = generate(target, prompts, drafter=drafter, budget=9, max_new_tokens=12)
    shape_of, padded = Replays._shape, []

    def shape(self, trees):
        if len(self.cache.keys_values) > 1:  # the target's layers
            return shape_of(self, trees)
        nodes = 1 << (max(map(len, trees.values())) - 1).bit_length()
        padded.append(nodes > min(map(len, trees.values())))
        return Shape(nodes * len(prompts), nodes, (nodes + 63) // 32, None)

    is_launched = Replays._is_launched
    monkeypatch.setattr(HeadRoom, "is_recorded", False)
    monkeypatch.setattr(Replays, "_shape", shape)
    monkeypatch.setattr(
        Replays, "_is_launched", lambda self, shape, *rest: bool(shape.padded) or is_launched(self, shape, *rest)
    )
    found = generate(target, prompts, drafter=drafter, budget=9, max_new_tokens=12)
    assert any(padded) and found.tokens == expected.tokens
    assert found.stats.accepted_lengths == expected.stats.accepted_lengths


@torch.inference_mode()
def test_a_tree_grows_from_the_head_and_from_tables(tmp_path):
    """Where the head is wrong again and again, what tables know comes first; and guesses of both are in one tree."""
    target = random_llama(windows=(None,) * 6)
    drafter = Eagle3(a_head(tmp_path, target), target, TopPaths(2, 3), tables=[Lookup(VOCABULARY)])
    prompt = [*random_tokens(12), *[7, 8, 9, 10, 11] * 3, 7]
    reader = reading(drafter, target, prompt)
    alone = Eagle3(drafter.head, target, TopPaths(2, 3), tables=())
    guessed = reading(alone, target, prompt).propose(prompt, 9)
    first = reader.propose(prompt, 20)
    children = {int(first.tokens[node]) for node in first.children(0)}
    assert children >= {8, int(guessed.tokens[1])} and guessed.tokens[1] != 8
    for _ in range(30):
        tree = reader.propose(prompt, 20)
        said = torch.tensor([7 + (token - 6) % 5 for token in tree.tokens.tolist()])
        reader._merged.observe(tree, Verified(torch.nn.functional.one_hot(said, VOCABULARY).float()), [0])
    assert reader.propose(prompt, 2).tokens.tolist() == [7, 8]
    with pytest.raises(ValueError, match="tables must be .. beside FixedBranching, which draws, got 1"):
        Eagle3(drafter.head, target, FixedBranching((2,)), tables=[Lookup(VOCABULARY)])


@pytest.mark.parametrize("rule", [name for name in RULES if name != "unverified"])
def test_drawn_trees_go_with_the_rules_that_take_them(tmp_path, rule):
    """Greedily every rule gives the plain text; a drawn tree's q is the head's law over the target's tokens."""
    target = random_llama(windows=(None,) * 6)
    drafter = Eagle3(a_head(tmp_path, target), target, growth_for(rule), seed=3)
    prompt = random_tokens(9)
    plain = generate(target, prompt, drafter=None, max_new_tokens=30).tokens
    assert generate(target, prompt, drafter=drafter, budget=9, acceptance=rule, max_new_tokens=30).tokens == plain
    drawing = {"temperature": 1.0, "seed": 1, "max_new_tokens": 30}
    assert len(generate(target, prompt, drafter=drafter, budget=9, acceptance=rule, **drawing).tokens) == 30


@torch.inference_mode()
def test_what_was_drawn_is_drawn_from_q(target, tmp_path):
    drafter = Eagle3(a_head(tmp_path, target), target, FixedBranching((2, 2), "with replacement"))
    prompt = random_tokens(12)
    laws = said(drafter, target, prompt, [])
    tree = reading(drafter, target, prompt).propose(prompt, 7)
    kept = drafter.head.target_tokens(np.arange(drafter.head.vocab_size))
    assert tree.q.shape == (len(tree), VOCABULARY) and len(tree) == 7
    np.testing.assert_allclose(tree.q[0][kept], laws[0].numpy(), rtol=1e-6)
    assert np.count_nonzero(tree.q[0]) <= len(kept)
    assert all(tree.q[parent][token] > 0 for token, parent in zip(tree.tokens[1:], tree.parents[1:], strict=True))


@torch.inference_mode()
@pytest.mark.parametrize("rounds", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_acceptance_leaves_the_cache_of_the_text(tmp_path, rounds):
    """Keys of guesses are replaced: what is committed has the bits of a head that has read the text alone."""
    target, random = random_llama(windows=(None,) * 6), Random(7)
    drafter = Eagle3(a_head(tmp_path, target), target, TopPaths(2, 3), tables=())
    texts = [random_tokens(length, length) for length in (5, 40)]
    readers = [drafter.start(text) for text in texts]

    def observe(slot, chain, verified):
        readers[slot].observe(chain, verified, range(len(chain)))

    target.prefill(texts, taps=TAPS, capacity=2900, observe=observe)
    contexts = [[*text, 1] for text in texts]
    for _ in range(rounds):
        slots = random.sample((0, 1), random.randint(1, 2))
        trees = {slot: readers[slot].propose(contexts[slot], random.randint(1, 9)) for slot in slots}
        verified, paths = target.verify(trees), {}
        for slot, tree in trees.items():
            paths[slot] = root_path(tree, random.randrange(len(tree)))
            readers[slot].observe(tree, verified[slot], paths[slot])
            contexts[slot] += [*tree.tokens[paths[slot][1:]].tolist(), random.randrange(VOCABULARY)]
        target.commit(paths)
    for reader, context in zip(readers, contexts, strict=True):
        fresh = drafter.start(context[:-1])
        pieces = observed_taps_of(target, context[:-1])
        fresh.observe(DraftTree.chain(context[:-1]), Verified(pieces[:, 0], taps=pieces), range(len(pieces)))
        for each in (reader, fresh):
            each._batch.read({each._sequence: context})
        length = len(context) - 1
        kept = [each._batch.cache.keys_values[:, :, each._sequence, :, :length] for each in (reader, fresh)]
        assert fresh._batch.cache.lengths[fresh._sequence] == length > 60 and torch.equal(*kept)


def observed_taps_of(target, text):
    """[n, taps, hidden] of one text, by a fork, which leaves the target's batch alone."""
    return observed_taps(target.fork(), [text], TAPS)[0]


@torch.inference_mode()
def test_models_of_transformers_are_targets_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 6, "n_head": 2, "n_positions": 200}
    target = TransformersRunner(transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)))
    tensors = random_head(VOCABULARY, 64)
    folder = write_head(tmp_path, tensors, VOCABULARY, taps=TAPS, target_hidden_size=64)
    drafter, prompts = Eagle3(folder, target), [random_tokens(30), random_tokens(4)]
    plain = generate(target, prompts, drafter=None, max_new_tokens=30)
    assert generate(target, prompts, drafter=drafter, budget=6, max_new_tokens=30).tokens == plain.tokens


@torch.inference_mode()
@pytest.mark.parametrize("native", [False, True])
def test_transformers_generate_drafts_with_a_head(tmp_path, native):
    transformers = pytest.importorskip("transformers")
    from pyspec.integrations.transformers.generation import generate as custom_generate

    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    config = transformers.LlamaConfig(**shape, num_attention_heads=1, head_dim=64, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    tensors = random_head(VOCABULARY, 64)
    folder = write_head(tmp_path, tensors, VOCABULARY, taps=TAPS, target_hidden_size=64)
    drafter, ids = Eagle3(folder, TransformersRunner(model)), torch.tensor([random_tokens(20)])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    drafted = {"custom_generate": custom_generate, "drafter": drafter, "budget": 6, "native": native}
    assert torch.equal(model.generate(ids, **drafted, **options), expected)


# ==== what is left to the target ====


@torch.inference_mode()
def test_a_head_may_have_the_targets_embedding_and_head(tmp_path):
    target = random_llama(windows=(None,) * 6)
    tensors = random_head(VOCABULARY, target.hidden_size, draft=VOCABULARY)
    whole = Eagle3(write_head(tmp_path / "whole", tensors, VOCABULARY, taps=TAPS), target, weights=torch.float32)
    for name, values in (("embed_tokens", target.weights.embedding), ("lm_head", target.weights.head.unpack())):
        tensors[f"{name}.weight"].copy_(values)
    same = Eagle3(write_head(tmp_path / "same", tensors, VOCABULARY, taps=TAPS), target, weights=torch.float32)
    del tensors["embed_tokens.weight"], tensors["lm_head.weight"]
    folder = write_head(tmp_path / "bare", tensors, VOCABULARY, taps=TAPS, draft_vocab_size=VOCABULARY)
    bare = Eagle3(folder, target, weights=torch.float32)
    prompt = random_tokens(20)
    laws = [said(drafter, target, prompt, [5, 8]) for drafter in (whole, same, bare)]
    assert torch.equal(laws[1], laws[2]) and not torch.equal(laws[0], laws[1])


# ==== what does not fit ====


def wrong(change=lambda tensors: None, **entries):
    return change, entries


@pytest.mark.parametrize(
    "case, words",
    [
        (wrong(lambda t: t.pop("fc.weight")), "has no fc.weight, which its config.json asks for"),
        (wrong(norm_before_fc=True), "has no input_norm.weight"),
        (wrong(fc_norm=True), "has no fc_norm.0.weight"),
        (wrong(fc_norm=True, norm_before_fc=True), "norm_before_fc and fc_norm must not both be true"),
        (wrong(lambda t: t.update({"input_norm.weight": torch.ones(288)})), "has input_norm.weight, which contradicts"),
        (wrong(lambda t: t.update({"odd.weight": torch.ones(2)})), "has odd.weight, which contradicts"),
        (
            wrong(lambda t: t.update({"layers.0.self_attn.q_norm.weight": torch.ones(64)})),
            "of llama, but .*q_norm.* there",
        ),
        (wrong(lambda t: t["norm.weight"].fill_(float("nan"))), "has NaN or infinity in norm.weight"),
        (wrong(lambda t: t.update({"norm.weight": torch.ones(95)})), r"must have norm.weight \[96\], got \[95\]"),
        (wrong(lambda t: t["d2t"].fill_(90)), "d2t that names tokens outside of"),
        (wrong(lambda t: t["d2t"].copy_(-torch.arange(40))), "or one of them twice"),
        (wrong(lambda t: t.update({"d2t": torch.zeros(3, dtype=torch.int64)})), r"must have d2t \[40\] of integers"),
        (wrong(lambda t: t.pop("d2t")), "has no d2t, but 40 of the target's 97 tokens"),
        (
            wrong(lambda t: t.pop("lm_head.weight"), draft_vocab_size=40),
            "has no lm_head.weight, and the",
        ),
        (wrong(eagle_aux_hidden_state_layer_ids=[2, 4, 9]), r"in \[0, 6\] for 6 layers, got \[2, 4, 9\]"),
        (wrong(eagle_aux_hidden_state_layer_ids=[2, 4]), r"must have fc.weight \[96, 192\], got \[96, 288\]"),
        (wrong(target_hidden_size=64), "for a target with a hidden size of 64, got one of 96"),
        (wrong(speculators_model_type="mtp"), "must describe an EAGLE-3 head .* got 'mtp'"),
        (wrong(norm_output="yes"), "norm_output must be true or false, got 'yes'"),
        (wrong(transformer_layer_config={"model_type": "mistral"}), "layers of model_type 'mistral', supported are"),
    ],
)
def test_heads_that_do_not_fit_are_named(target, tmp_path, case, words):
    change, entries = case
    tensors = random_head(VOCABULARY, target.hidden_size)
    change(tensors)
    folder = write_head(tmp_path, tensors, VOCABULARY, **{"taps": TAPS, **entries})
    with pytest.raises(ValueError, match=words) as error:
        Eagle3(folder, target)
    assert str(tmp_path) in str(error.value)


def test_folders_without_a_head_and_pickles(target, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no model at .*nowhere"):
        Eagle3(tmp_path / "nowhere", target)
    tensors = random_head(VOCABULARY, target.hidden_size)
    folder = write_head(tmp_path / "pickled", tensors, VOCABULARY, layout="flat", taps=TAPS, pickled=True)
    Eagle3(folder, target)
    torch.save({"fc.weight": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin must hold tensors and nothing else"):
        Eagle3(folder, target)
    with pytest.raises(ValueError, match="for a target with a vocabulary of 90, got one of 97"):
        Eagle3(write_head(tmp_path / "other", random_head(90, 96), 90, taps=TAPS), target)
    with pytest.raises(ValueError, match="temperature must be above 0 for FixedBranching"):
        Eagle3(tmp_path / "head", target, FixedBranching((2,)), temperature=0)


@pytest.mark.parametrize(
    "layout, taps, given, found, words",
    [
        ("speculators", (1, 2, 3), None, (1, 2, 3), "names what layers take in"),
        ("flat", (1, 2, 3), None, (2, 3, 4), "names what layers give, for the first is 1"),
        ("flat", (2, 3, 4), None, (2, 3, 4), "names what layers take in"),
        ("flat", (1, 2, 3), (1, 2, 3), (1, 2, 3), None),
        ("flat", None, (0, 5, 6), (0, 5, 6), None),
    ],
)
def test_what_ids_of_layers_mean(target, tmp_path, layout, taps, given, found, words):
    tensors = random_head(VOCABULARY, target.hidden_size)
    folder = write_head(tmp_path, tensors, VOCABULARY, layout=layout, taps=taps)
    head = Eagle3(folder, target, taps=given).head
    assert head.config.taps == found
    assert words is None or any(words in choice for choice in head.config.choices)


def test_left_out_ids_are_the_default(tmp_path):
    target = random_llama(windows=(None,) * 12)
    folder = write_head(tmp_path, random_head(VOCABULARY, target.hidden_size), VOCABULARY)
    assert Eagle3(folder, target).taps == (2, 6, 9)
