"""The Llama runner over quantised caches: plain decoding's bits, in any chunks, and generate's texts."""

import random
from contextlib import nullcontext

import pytest
import torch

import pyspec.runners.native
from pyspec import DraftTree, generate, load
from pyspec.caches import CACHES, GearSettings, QuantisedCache, cache_from_name
from pyspec.caches.blocks import RECENT
from pyspec.caches.codebooks import DEMO_FILE
from pyspec.ops.gear import BLOCK
from pyspec.runners.replay import launch_by_launch
from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.quantised_caches import random_codes
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, root_path

QUANTISED = {
    **{name: cache for name in CACHES if isinstance(cache := cache_from_name(name), GearSettings)},
    "window of 30": GearSettings(4, 64, rank=1, outliers=2, window=30),
    "rvq": random_codes(pre_rope=False),
    "rvq pre-rope": random_codes(pre_rope=True),
}
SPARSE = {"half": GearSettings(4, 64, keep=0.5, whole_layers=1), "channels": GearSettings(4, 64, key_channels=48)}
LENGTHS = (190, 192, 319, 700)  # of prompts: trees behind them see one more block below some depth, and do not


@pytest.fixture(scope="module")
def runner():
    return random_llama(dtype=torch.bfloat16)


def error(quantised):
    """Of logits, that is allowed, in standard deviations."""
    return {2: 1.2, 3: 0.8, 4: 0.4, 8: 0.1}[getattr(quantised, "bits", 2)]


@pytest.mark.parametrize("name", QUANTISED)
def test_logits_are_near_those_of_the_dense_cache(runner, name):
    prompt, tree = random_tokens(400), random_tree(20)
    runner.prefill([prompt])
    expected = runner.verify({0: tree})[0].logits
    runner.prefill([prompt], cache=QUANTISED[name])
    found = runner.verify({0: tree})[0].logits
    assert not torch.equal(found, expected)
    assert (found - expected).abs().mean() < error(QUANTISED[name]) * expected.std()


def test_before_the_first_block_it_is_the_dense_cache(runner):
    prompt, tree = random_tokens(150), random_tree(20)
    runner.prefill([prompt])
    expected = runner.verify({0: tree})[0].logits
    runner.prefill([prompt], cache=cache_from_name("gear-2bit"))
    assert torch.equal(runner.verify({0: tree})[0].logits, expected)


@pytest.mark.parametrize("name", (*QUANTISED, *SPARSE))
@pytest.mark.parametrize("length", LENGTHS)
def test_a_node_has_the_bits_of_plain_decoding(runner, name, length):
    cache, prompt, tree = (QUANTISED | SPARSE)[name], random_tokens(length), random_tree(24)
    runner.prefill([prompt], cache=cache)
    logits = runner.verify({0: tree})[0].logits
    for node in (3, 14, 23):
        runner.prefill([prompt], cache=cache)
        for step in root_path(tree, node):
            alone = runner.verify({0: DraftTree.chain([int(tree.tokens[step])])})[0].logits
            runner.commit({0: [0]})
        assert torch.equal(alone[0], logits[node])
    runner.prefill([random_tokens(7, 1), prompt], cache=cache)
    assert torch.equal(runner.verify({0: random_tree(9), 1: tree})[1].logits, logits)


@pytest.mark.parametrize("name", ["gear-2bit", "window of 30"])
def test_a_prompt_may_be_read_in_any_chunks_or_committed_from_trees(runner, name, monkeypatch):
    cache, prompt, found = QUANTISED[name], random_tokens(330), []

    def state(logits):
        kept = runner._cache
        exact = kept.keys_values[..., : len(prompt) - kept.starts[0], :].clone()
        found.append((logits, kept.quantised[..., : len(prompt) // BLOCK, :].clone(), exact))

    for chunk in (128, 20, 7):
        monkeypatch.setattr(pyspec.runners.native, "CHUNK", chunk)
        state(runner.prefill([prompt], cache=cache)[0])
    runner.prefill([prompt[:100]], cache=cache)
    for first in range(100, 330, 10):
        # the right tokens as every second node, the wrong ones beside them
        tokens = [token for right in prompt[first : first + 10] for token in (right, 5)]
        parents = [-1, 0, *(node - 2 if node % 2 == 0 else node - 1 for node in range(2, 20))]
        logits = runner.verify({0: DraftTree(tokens, parents)})[0].logits
        runner.commit({0: list(range(0, 20, 2))})
    state(logits[18])
    for other in found[1:]:
        for part, expected in zip(other, found[0], strict=True):
            assert torch.equal(part, expected)


@pytest.mark.parametrize("name", (*QUANTISED, *SPARSE))
@pytest.mark.parametrize("drafter", ["lookup", "merged"])
def test_greedy_text_is_that_of_plain_decoding(runner, name, drafter):
    prompts = [random_tokens(20) * 9, random_tokens(11, 3) * 20]
    settings = dict(max_new_tokens=90, cache=(QUANTISED | SPARSE)[name])
    plain = generate(runner, prompts, drafter=None, **settings)
    result = generate(runner, prompts, drafter=drafter, budget=16, **settings)
    assert result.tokens == plain.tokens
    assert result.stats.mean_accepted_length > 1.05
    assert generate(runner, prompts[1], drafter=drafter, **settings).tokens == plain.tokens[1]


def over_windows(name, windows, dtype=torch.float32):
    """A runner with windows, and a cache for it."""
    is_coded = name.startswith("rvq")
    cache = random_codes("pre" in name, windows=windows) if is_coded else (QUANTISED | SPARSE)[name]
    return random_llama(windows=windows, dtype=dtype), cache


@pytest.mark.parametrize("name", ["gear-2bit", "window of 30", "channels", "rvq", "rvq pre-rope"])
@pytest.mark.parametrize("length", [190, 319, 700])
@pytest.mark.parametrize("window", [40, 170])
def test_windows_have_the_bits_of_plain_decoding(name, length, window):
    """A layer that sees all and one that does not, over the same blocks."""
    runner, cache = over_windows(name, (None, window), torch.bfloat16)
    prompt, tree = random_tokens(length), random_tree(24)
    runner.prefill([random_tokens(7, 1), prompt], cache=cache)
    logits = runner.verify({0: random_tree(9), 1: tree})[1].logits
    for node in (3, 23):
        runner.prefill([prompt], cache=cache)
        for step in root_path(tree, node):
            alone = runner.verify({0: DraftTree.chain([int(tree.tokens[step])])})[0].logits
            runner.commit({0: [0]})
        assert torch.equal(alone[0], logits[node])


@pytest.mark.parametrize("windows", [(170, None), (None, 40), (40, 170)])
def test_windows_over_quantised_blocks_are_those_of_the_dense_cache(windows):
    prompt, tree, found = random_tokens(400), random_tree(20), []
    limited, cache = over_windows("int8", windows)
    for runner, options in ((limited, {}), (limited, {"cache": cache}), (random_llama(), {"cache": cache})):
        runner.prefill([prompt], **options)
        found.append(runner.verify({0: tree})[0].logits)
    dense, within, without = found
    assert (within - dense).abs().mean() < error(cache) * dense.std() / 2
    assert (without - dense).abs().mean() > 2 * (within - dense).abs().mean()


def test_greedy_text_over_windows_is_that_of_plain_decoding():
    prompts = [random_tokens(20) * 9, random_tokens(11, 3) * 20]
    for name in ("int4", "rvq"):
        runner, cache = over_windows(name, (60, None))
        settings = dict(max_new_tokens=60, cache=cache)
        plain = generate(runner, prompts, drafter=None, **settings)
        result = generate(runner, prompts, drafter="merged", budget=16, **settings)
        assert result.tokens == plain.tokens and result.stats.mean_accepted_length > 1.05


def test_sampled_text_is_that_of_plain_decoding(runner):
    settings = dict(max_new_tokens=60, temperature=1.0, seed=3, cache="kivi-2bit")
    plain = generate(runner, random_tokens(20) * 9, drafter=None, **settings)
    assert generate(runner, random_tokens(20) * 9, budget=9, **settings).tokens == plain.tokens


def test_the_tests_of_bits_have_teeth(runner, monkeypatch):
    """Where all nodes see quantised what their root does, as in engines that quantise by length, the bits differ."""
    prompt, tree = random_tokens(190), random_tree(24)
    node = max(range(24), key=lambda node: int(tree.depths[node]))

    def verify(tree):
        runner.prefill([prompt], cache=cache_from_name("gear-2bit"))
        return runner.verify({0: tree})[0].logits

    expected = verify(tree)
    attend = QuantisedCache.attend

    def like_the_root(self, layer, q, numbers, *scores, **options):
        numbers.seen.fill_(numbers.seen[0])
        return attend(self, layer, q, numbers, *scores, **options)

    monkeypatch.setattr(QuantisedCache, "attend", like_the_root)
    with launch_by_launch():
        found = verify(tree)
    assert torch.equal(found[0], expected[0]) and not torch.equal(found[node], expected[node])


@pytest.mark.parametrize("name", ["gear-2bit", "int8", "rvq"])
def test_a_tape_has_the_bits_of_launches(name):
    """Over ragged batches, across the ends of blocks, which some nodes see quantised and their root does not."""
    runner, found = random_llama(dtype=torch.bfloat16), []
    cache = random_codes(pre_rope=True) if name == "rvq" else cache_from_name(name)
    for context in (launch_by_launch, nullcontext):
        with context():
            rows = runner.prefill([random_tokens(187), random_tokens(40, 1), random_tokens(310, 2)], cache=cache)
            for seed in range(6):
                trees = {slot: random_tree(9 + 7 * slot + seed, seed) for slot in range(3) if (slot + seed) % 3}
                rows += [verified.logits for verified in runner.verify(trees).values()]
                runner.commit({slot: root_path(tree, len(tree) - 1) for slot, tree in trees.items()})
        found.append(torch.cat([row.flatten() for row in rows]))
    assert runner._replays._replays and torch.equal(*found)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("name", ["gear-2bit", "window of 30", "rvq", "half", "channels", "channels and windows"])
def test_rounds_of_fixed_shape_have_the_bits_of_any_shape(name, sequences, monkeypatch):
    """As on a GPU: padding, sequences that sit out, trees beyond the largest bucket, both sides of a block's end."""
    monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
    windows, generator = (None, 40 if "windows" in name else None), random.Random(sequences)
    own, cache = over_windows(name.split(" and ")[0], windows, torch.bfloat16)
    padded = with_graphs(random_llama(windows=windows, dtype=torch.bfloat16))
    prompts = [random_tokens(length, length) for length in (305, 1, 150)[:sequences]]
    for _ in range(2):  # the second time in the first one's cache
        for ours, theirs in zip(
            *(each.prefill(prompts, capacity=900, cache=cache) for each in (padded, own)), strict=True
        ):
            assert torch.equal(ours, theirs)
        for seed in range(14):
            sizes = [generator.choice((1, 2, 3, 8, 13, 31, 64, 65)) for _ in range(sequences)]
            trees = {
                slot: random_tree(min(size, cache.largest_tree), 10 * seed + slot) for slot, size in enumerate(sizes)
            }
            if seed == 0:
                trees[0] = DraftTree.chain(random_tokens(30))  # from position 305 to 334
            if sequences > 1 and seed % 3:
                del trees[generator.randrange(sequences)]
            found, expected = padded.verify(trees), own.verify(trees)
            assert all(torch.equal(found[slot].logits, expected[slot].logits) for slot in trees)
            for each in (padded, own):
                each.commit({slot: root_path(tree, int(tree.depths.argmax())) for slot, tree in trees.items()})
            assert torch.equal(padded._cache.queries[:, :, :, :RECENT], own._cache.queries[:, :, :, :RECENT])
    shapes = [shape for shape, _ in padded._replays._replays]
    assert {shape.extent for shape in shapes} == {0, 1} and len(shapes) < 14


def test_bad_input(runner):
    prompt = random_tokens(9)
    windowed = random_llama(windows=(None, 50))
    runner.prefill([prompt])
    with pytest.raises(ValueError, match="cache must keep all tokens for a model with sliding windows, got keep = 0.5"):
        windowed.prefill([prompt], cache=SPARSE["half"])
    runner.prefill([prompt], cache=GearSettings(window=10))
    with pytest.raises(ValueError, match="at most 11 nodes with GearSettings"):
        runner.verify({0: random_tree(12)})
    assert runner.lengths() == [9]
    for settings, error, message in (
        ({"cache": "gear"}, ValueError, "cache must be one of dense"),
        ({"cache": None}, TypeError, "cache must be a name or a GearSettings, got None"),
        ({"cache": "int4", "budget": 66}, ValueError, "budget must be at most 65 nodes with cache 'int4', got 66"),
    ):
        with pytest.raises(error, match=message):
            generate(runner, prompt, **settings)


def test_codebooks_of_another_model_are_refused():
    with pytest.raises(ValueError, match="codebooks must be those of llama-.* got codebooks of llama-"):
        generate(random_llama(context=2000), random_tokens(9), cache=QUANTISED["rvq"])


def test_nan_keys_are_refused(runner):
    """A weight that gives NaN values in the last layer only: generation says so instead of quantising them."""
    broken = random_llama(dtype=torch.float32)
    layer = broken.weights.layers[1]
    dense = layer.qkv.unpack()
    dense[-1] = torch.nan
    layer.qkv.data.copy_(pyspec.ops.lay_out_weight(dense, torch.float32).data)
    with pytest.raises(ValueError, match="values must be .* got nan in layer 1, head 1, position 0, channel 63"):
        broken.prefill([random_tokens(200)], cache=cache_from_name("gear-2bit"))


def test_demo_model():
    try:
        runner = load("demo", device="cpu")
    except FileNotFoundError as missing:
        pytest.skip(str(missing))
    text = "The list of the first prime numbers is 2, 3, 5, 7, 11. Once more: the list of the first prime numbers is "
    tokens = runner.tokenizer.encode(text * 9)
    assert len(tokens) > 192
    for cache in ("gear-2bit", "int4", *(["rvq"] if DEMO_FILE.is_file() else [])):
        plain = generate(runner, tokens, drafter=None, max_new_tokens=24, cache=cache)
        assert generate(runner, tokens, max_new_tokens=24, budget=8, cache=cache).tokens == plain.tokens
        if cache != "gear-2bit":  # still the model's own words
            assert "2, 3, 5, 7, 11" in plain.text


def test_a_saved_cache_goes_on_with_the_same_bits(runner, tmp_path):
    prompt, tree = random_tokens(330), random_tree(20)
    with pytest.raises(RuntimeError, match="there is no quantised cache to save"):
        runner.prefill([prompt])
        runner.save_cache(tmp_path / "cache")
    runner.prefill([prompt, prompt[:50]], cache=cache_from_name("gear-2bit"))
    runner.save_cache(tmp_path / "cache")
    expected = runner.verify({0: tree, 1: tree})
    other = random_llama(dtype=torch.bfloat16)
    other.load_cache(tmp_path / "cache")
    assert other.lengths() == [330, 50]
    for found, right in zip(other.verify({0: tree, 1: tree}).values(), expected.values(), strict=True):
        assert torch.equal(found.logits, right.logits)
    with pytest.raises(ValueError, match="is a cache in torch.bfloat16, the model runs in torch.float32"):
        random_llama(dtype=torch.float32).load_cache(tmp_path / "cache")
