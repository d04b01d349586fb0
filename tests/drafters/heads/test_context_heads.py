"""Block drafters and heads of three tokens say what their trainers' modules say, and never change the text."""

import json
from random import Random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pyspec import DraftTree, generate
from pyspec.acceptance import RULES
from pyspec.drafters import Chimera, DSpark, drafter_of_head
from pyspec.drafters.heads.eagle3_batch import Asked
from pyspec.drafters.heads.eagle3_room import GUESS, HeadRoom
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.shapes.static import FixedBranching
from pyspec.drafters.tables.lookup import Lookup
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from tests.helpers.drafter_enumeration import check_drawn_law, reading
from tests.helpers.random_llama import VOCABULARY, random_llama, random_tokens, root_path
from tests.helpers.runner_checks import observed_taps
from training.chimera import Chimera as ChimeraTrainer
from training.data_files import Batch
from training.drafts import Target
from training.dspark import BLOCK
from training.dspark import DSpark as DSparkTrainer

TAPS = (2, 3, 5)
KINDS = {"dspark": (DSparkTrainer, DSpark), "chimera": (ChimeraTrainer, Chimera)}
TOKENS = torch.arange(0, 80, 2)


@pytest.fixture(scope="module")
def target():
    return random_llama(windows=(None,) * 6)


def write_head(folder, target, kind, tokens=TOKENS):
    """A trainer's module, of numbers that are bfloat16's, and its folder."""
    torch.manual_seed(1)
    head = KINDS[kind][0](Target(target, tokens), TAPS)
    with torch.no_grad():
        for name, values in head.named_parameters():
            values.add_(0.05 * torch.randn(values.shape))
            if name == "confidence.bias":
                values.add_(1.5)
            values.copy_(values.bfloat16())
    folder.mkdir(exist_ok=True)
    head.write(folder, "random")
    return head


def said_of(drafter, target, prompt, guesses):
    """[1 + len(guesses), draft] logits of the drafter's along a chain of its own tokens below a text, and the laws."""
    reader = reading(drafter, target, prompt)
    reader._batch.read({reader._sequence: prompt})
    laws = reader._batch.laws(reader._sequence, Sampler(1.0))
    tokens, parents = [0, *guesses], [*range(-1, len(guesses))]
    found = []
    for node in range(len(tokens)):  # level by level, as a tree grows
        ((said, row),) = laws._rows(Asked(tokens[: node + 1], parents[: node + 1], [node]))
        found.append(said.logits[row])
    return torch.stack(found), laws


@torch.inference_mode()
@pytest.mark.parametrize("length", [2, 3, 40, 150])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_trainers_module(target, tmp_path, kind, length):
    module = write_head(tmp_path, target, kind)
    drafter = drafter_of_head(tmp_path, target, weights=torch.float32)
    assert type(drafter) is KINDS[kind][1]
    prompt, depth = random_tokens(length), BLOCK if kind == "dspark" else 4
    guesses = [int(token) for token in np.random.default_rng(length).integers(0, len(TOKENS), depth - 1)]
    found, laws = said_of(drafter, target, prompt, guesses)
    text = [*prompt, *TOKENS[guesses].tolist(), 0]
    (features,) = observed_taps(target, [text], (*TAPS, 6))
    count = len(text)
    batch = Batch(
        torch.tensor(text),
        features,
        torch.ones(count, dtype=torch.bool),
        torch.arange(count),
        torch.zeros(count).long(),
    )
    steps = list(module.guesses(batch, torch.tensor([length - 2]), depth, 1.0, 0.0))
    expected = torch.cat([module.logits(rows) for _, rows in steps])
    assert len(expected) == len(found) and found.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    if kind == "dspark":
        sure = torch.cat([module.confidence(rows) for _, rows in steps])[:, 0].sigmoid().cumprod(0)
        chances = torch.tensor([laws._chances[node] for node in range(depth)])
        torch.testing.assert_close(chances, sure, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_round_of_a_block_is_one_call_however_deep(target, tmp_path, monkeypatch):
    """Of all sequences; and drafting ends with the block, or where the head is not sure."""
    write_head(tmp_path, target, "dspark")
    calls, run = [], HeadRoom.run
    monkeypatch.setattr(
        HeadRoom, "run", lambda self, kind, trees, *rest, **more: calls.append((kind, sorted(trees))) or run(
            self, kind, trees, *rest, **more
        )
    )  # fmt: skip
    drafter = DSpark(tmp_path, target, TopPaths(1, 12), tables=())
    prompts = [random_tokens(length, length) for length in (5, 30)]
    readers = [drafter.start(prompt[:-1]) for prompt in prompts]
    target.prefill(
        [prompt[:-1] for prompt in prompts],
        taps=TAPS,
        observe=lambda slot, chain, verified: readers[slot].observe(chain, verified, range(len(chain))),
    )
    trees = DSpark.propose_together(readers, prompts, [20, 20])
    assert [len(tree) for tree in trees] == [1 + BLOCK] * 2
    assert [call for call in calls if call[0] == GUESS] == [(GUESS, [0, 1])]
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["confidence_head.proj.weight"].zero_()
    tensors["confidence_head.proj.bias"].fill_(-1.0)  # 0.27, 0.07, 0.02, ...
    save_file(tensors, tmp_path / "model.safetensors")
    drafter = DSpark(tmp_path, target, TopPaths(1, 12), tables=())
    assert len(reading(drafter, target, prompts[1]).propose(prompts[1], 20)) == 3


# ==== whole texts ====

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_plain_decoding(tmp_path, kind, name, settings):
    target = random_llama(windows=(None,) * 6, dtype=DTYPES[name])
    write_head(tmp_path, random_llama(windows=(None,) * 6), kind, torch.arange(VOCABULARY))
    drafter = drafter_of_head(tmp_path, target)
    alone = KINDS[kind][1](drafter.head, target, TopPaths(3, 6), tables=())
    prompts = [random_tokens(length, length) for length in (150, 2, 1, 20)]
    plain = generate(target, prompts, drafter=None, max_new_tokens=40, **settings)
    for budget, each in ((2, drafter), (7, drafter), (20, drafter), (9, alone)):
        drafted = generate(target, prompts, drafter=each, budget=budget, max_new_tokens=40, **settings)
        assert drafted.tokens == plain.tokens
    assert sum(drafted.stats.accepted_lengths[2:])  # some guesses of the head alone are right


@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_a_batch_are_those_of_each_sequence(target, tmp_path, monkeypatch, kind):
    write_head(tmp_path, target, kind)
    drafter, trees = KINDS[kind][1](tmp_path, target, TopPaths(2, 3), tables=()), []
    together = KINDS[kind][1].propose_together

    def compared(drafters, contexts, budgets):
        trees.append(together(drafters, contexts, budgets))
        for each, context, budget, tree in zip(drafters, contexts, budgets, trees[-1], strict=True):
            (alone,) = together([each], [context], [budget])
            assert alone.tokens.tolist() == tree.tokens.tolist() and alone.parents.tolist() == tree.parents.tolist()
        return trees[-1]

    monkeypatch.setattr(KINDS[kind][1], "propose_together", staticmethod(compared))
    prompts = [random_tokens(length, length) for length in (150, 2, 20)]
    generate(target, prompts, drafter=drafter, budget=9, max_new_tokens=12)
    assert {len(tree) for of_round in trees for tree in of_round} & {8, 9}


@torch.inference_mode()
@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_random_acceptance_leaves_the_cache_of_the_text(target, tmp_path, kind, rounds):
    """What is committed has the bits of a head that has read the text alone."""
    write_head(tmp_path, target, kind)
    random, drafter = Random(7), KINDS[kind][1](tmp_path, target, TopPaths(2, 4), tables=())
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
        (pieces,) = observed_taps(target.fork(), [context[:-1]], TAPS)
        fresh.observe(DraftTree.chain(context[:-1]), Verified(pieces[:, 0], taps=pieces), range(len(pieces)))
        for each in (reader, fresh):
            each._batch.read({each._sequence: context})
        length = len(context) - 1
        kept = [each._batch.cache.keys_values[:, :, each._sequence, :, :length] for each in (reader, fresh)]
        assert fresh._batch.cache.lengths[fresh._sequence] == length > 60 and torch.equal(*kept)


@pytest.mark.parametrize("rule", ["recursive", "traversal"])
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_laws_are_the_targets(tmp_path, monkeypatch, kind, rule):
    monkeypatch.setattr("tests.helpers.random_llama.VOCABULARY", 11)
    target = random_llama(windows=(None,) * 6)
    write_head(tmp_path, target, kind, torch.tensor([1, 4, 5, 9]))
    drafter = KINDS[kind][1](tmp_path, target, FixedBranching((2, 1), "without replacement"))
    check_drawn_law(monkeypatch, drafter, target, random_tokens(9), rule)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "unverified"])
@pytest.mark.parametrize("kind", KINDS)
def test_drawn_trees_go_with_the_rules_that_take_them(target, tmp_path, kind, rule):
    write_head(tmp_path, target, kind)
    drafter, prompt = drafter_of_head(tmp_path, target, rule, seed=3), random_tokens(9)
    plain = generate(target, prompt, drafter=None, max_new_tokens=30).tokens
    assert generate(target, prompt, drafter=drafter, budget=9, acceptance=rule, max_new_tokens=30).tokens == plain


# ==== what does not fit ====


def wrong(change=lambda tensors: None, **entries):
    return change, entries


FOR_ALL = [
    (wrong(lambda t: t.pop("fc.weight")), "has no fc.weight, which its config.json asks for"),
    (wrong(lambda t: t.update({"odd.weight": torch.ones(2)})), "has odd.weight, which contradicts"),
    (wrong(lambda t: t["norm.weight"].fill_(float("nan"))), "has NaN or infinity in norm.weight"),
    (wrong(lambda t: t.update({"norm.weight": torch.ones(95)})), r"must have norm.weight \[96\], got \[95\]"),
    (wrong(lambda t: t["d2t"].fill_(90)), "d2t that names tokens outside of"),
    (wrong(lambda t: t.pop("d2t")), "has no d2t, but 40 of the target's 97 tokens"),
    (wrong(lambda t: t.pop("lm_head.weight")), "has no lm_head.weight, and the target's cannot be used"),
    (wrong(aux_hidden_state_layer_ids=[2, 4, 9]), r"in \[0, 6\] for 6 layers, got \[2, 4, 9\]"),
    (wrong(target_hidden_size=64), "for a target with a hidden size of 64, got one of 96"),
    (wrong(of_layer={"vocab_size": 98}), "vocabulary of 98, got one of 97"),
    (wrong(of_layer={"model_type": "gemma"}), "layers of model_type 'gemma', supported are"),
    (wrong(speculators_model_type="dflash"), "speculators_model_type of chimera, dspark, eagle3, .* got 'dflash'"),
]
OF_KIND = {
    "dspark": [
        (wrong(lambda t: t.pop("markov_head.markov_w1.weight")), "has no markov_head.markov_w1.weight"),
        (wrong(sample_from_anchor=False), "a sample_from_anchor of False, supported is True"),
        (wrong(markov_head_type="gated"), "a markov_head_type of 'gated', supported is 'vanilla'"),
        (wrong(markov_rank=0), "markov_rank must be at least 1, got 0"),
        (wrong(mask_token_id=97), "mask_token_id must be at most 96, got 97"),
        (wrong(block_size=65), "block_size must be at most 64, got 65"),
        (wrong(enable_confidence_head=False), "has confidence_head.proj.bias, .* which contradicts"),
        (wrong(confidence_head_with_markov=False), r"confidence_head.proj.weight \[1, 96\], got \[1, 160\]"),
        (wrong(of_layer={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}), "sliding windows"),
    ],
    "chimera": [(wrong(lambda t: t.pop("inner.weight")), "has no inner.weight")],
}


@pytest.mark.parametrize("kind, case, words", [(kind, *each) for kind in KINDS for each in FOR_ALL + OF_KIND[kind]])
def test_heads_that_do_not_fit_are_named(target, tmp_path, kind, case, words):
    write_head(tmp_path, target, kind)
    change, entries = case[0], dict(case[1])
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    config["transformer_layer_config"] |= entries.pop("of_layer", {})
    (tmp_path / "config.json").write_text(json.dumps(config | entries))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=words) as error:
        drafter_of_head(tmp_path, target)
    assert str(tmp_path) in str(error.value)


def test_pickles_and_folders_of_other_kinds(target, tmp_path):
    write_head(tmp_path, target, "dspark")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no .safetensors file and no pytorch_model.bin"):
        drafter_of_head(tmp_path, target)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert (
        drafter_of_head(tmp_path, target).head.described()["block"]
        == "8 guesses of one pass, rank 64, and how sure they are"
    )
    with pytest.raises(ValueError, match="must describe a head of speculators_model_type 'chimera', got 'dspark'"):
        Chimera(tmp_path, target)
    with pytest.raises(ValueError, match="temperature must be above 0 for FixedBranching"):
        DSpark(tmp_path, target, FixedBranching((2,)), temperature=0)
    with pytest.raises(ValueError, match="tables must be .. beside FixedBranching"):
        DSpark(tmp_path, target, FixedBranching((2,)), tables=[Lookup(VOCABULARY)])
    torch.save({"fc.weight": print}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin must hold tensors and nothing else"):
        drafter_of_head(tmp_path, target)
    with pytest.raises(FileNotFoundError, match="it has no config.json"):
        drafter_of_head(tmp_path.parent, target)
