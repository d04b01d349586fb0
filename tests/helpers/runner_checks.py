"""What every runner on our own kernels promises, whatever its state is; the tests of each kind say for which models."""

import pytest
import torch

from pyspec import DraftTree, generate
from tests.helpers.random_llama import VOCABULARY, by_slot, random_tokens, random_tree, root_path, verify_all

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def path_tokens(tree, node):
    return [int(tree.tokens[step]) for step in root_path(tree, node)]


def plain_steps(runner, tokens):
    """The logits of a text that is committed token by token; the state is left behind all of it."""
    rows = []
    for token in tokens:
        rows.append(runner.verify({0: DraftTree.chain([token])})[0].logits[0])
        runner.commit({0: [0]})
    return rows


# ==== the logits of transformers, whose model is given beside the runner ====


@torch.inference_mode()
def expected_logits(model, tokens):
    """[n, V] fp32 of transformers' own forward, without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def check_last(runner, model, tolerance=1e-4):
    """The logits behind a prompt."""
    prompt = random_tokens(20)
    expected = expected_logits(model, prompt)[-1]
    torch.testing.assert_close(runner.prefill([prompt])[0], expected, atol=tolerance, rtol=tolerance)


def check_prompt(runner, model):
    """The logits of every token of a prompt, as they are observed and behind it."""
    prompt, pieces = random_tokens(30), []
    (last,) = runner.prefill([prompt], observe=lambda b, chain, verified: pieces.append((chain, verified.logits)))
    assert [token for chain, _ in pieces for token in chain.tokens.tolist()] == prompt
    logits = torch.cat([logits for _, logits in pieces])
    assert logits.dtype == last.dtype == torch.float32
    expected = expected_logits(model, prompt)
    assert expected.std() > 0.5  # or a tolerance of 1e-4 would say little
    torch.testing.assert_close(logits, expected, **CLOSE)
    torch.testing.assert_close(last, expected[-1], **CLOSE)


def check_nodes(runner, model, context, tree, every=3):
    """Every node has the logits of its path behind the context, which is committed."""
    logits = runner.verify({0: tree})[0].logits
    for node in range(0, len(tree), every):
        expected = expected_logits(model, context + path_tokens(tree, node))[-1]
        torch.testing.assert_close(logits[node], expected, **CLOSE)


def check_commits(runner, model):
    context = random_tokens(5)
    runner.prefill([context])
    for seed in range(6):
        tree = random_tree(1 + 3 * seed, seed)
        runner.verify({0: tree})
        node = len(tree) - 1 - seed
        runner.commit({0: root_path(tree, node)})
        context += path_tokens(tree, node)
        assert runner.lengths() == [len(context)]
        probe = random_tokens(2, seed)
        logits = runner.verify({0: DraftTree.chain(probe)})[0].logits
        torch.testing.assert_close(logits, expected_logits(model, context + probe)[-2:], **CLOSE)
        runner.commit({})
        assert runner.lengths() == [len(context)]


def check_greedy_text(runner, prompt, expected):
    """The text that drafts give is that of the [V] logits of every token, up to where two are as good as equal."""
    text = generate(runner, prompt, drafter="merged", budget=8, max_new_tokens=len(expected)).tokens
    if text[-1] in runner.eos_tokens:
        expected = expected[: len(text)]
    for token, logits in zip(text, expected, strict=True):
        best = logits.topk(2).values
        if token != int(logits.argmax()):
            assert best[0] - best[1] < 1e-4
            break
    else:
        assert text == [int(logits.argmax()) for logits in expected]


# ==== bits ====


def check_row_rule(runner):
    """Through the whole model: the tree, the batch and the number of threads."""
    prompt, tree = random_tokens(20), random_tree(24)
    runner.prefill([prompt])
    logits = runner.verify({0: tree})[0].logits
    threads = torch.get_num_threads()
    for node in (3, 11, 23):
        torch.set_num_threads(1)
        runner.prefill([prompt])
        rows = plain_steps(runner, path_tokens(tree, node))
        torch.set_num_threads(threads)
        assert torch.equal(rows[-1], logits[node])
    runner.prefill([random_tokens(7, 1), prompt], capacity=64)
    assert torch.equal(runner.verify({0: random_tree(9), 1: tree})[1].logits, logits)


def alone_and_together(runner):
    """For each sequence of a ragged batch, all its logits by itself and all in the batch."""
    prompts = [random_tokens(length, length) for length in (3, 17, 1, 8)]
    rounds = [[random_tree(size, size + b) if size else None for b, size in enumerate(sizes)] for sizes in
              ((4, 33, 1, 7), (0, 5, 0, 9), (6, 0, 2, 0), (3, 3, 3, 3))]  # fmt: skip

    alone = []
    for b, prompt in enumerate(prompts):
        results = [runner.prefill([prompt])[0]]
        for trees in rounds:
            if trees[b] is not None:
                results.append(runner.verify({0: trees[b]})[0].logits)
                runner.commit({0: root_path(trees[b], len(trees[b]) - 1)})
        alone.append(results)

    together = [[logits] for logits in runner.prefill(prompts, capacity=80)]
    for trees in rounds:
        for b, logits in enumerate(verify_all(runner, trees)):
            assert (logits is None) == (trees[b] is None)
            if logits is not None:
                together[b].append(logits)
        runner.commit(by_slot([tree and root_path(tree, len(tree) - 1) for tree in trees]))
    return zip(alone, together, strict=True)


def check_quantised(runner, cache, lengths=(190, 319)):
    """Over a quantised cache a node has the bits of plain decoding, alone and in a batch, and so has a prompt."""
    for length in lengths:
        prompt, tree = random_tokens(length), random_tree(24)
        runner.prefill([random_tokens(7, 1), prompt], cache=cache)
        logits = runner.verify({0: random_tree(9), 1: tree})[1].logits
        for node in (3, 23):
            runner.prefill([prompt], cache=cache)
            assert torch.equal(plain_steps(runner, path_tokens(tree, node))[-1], logits[node]), (length, node)
    (last,) = runner.prefill([prompt], cache=cache)
    runner.prefill([prompt[:-15]], cache=cache)
    assert torch.equal(plain_steps(runner, prompt[-15:])[-1], last)


def check_batches(runner, new_tokens):
    """A batch with drafts gives the texts of plain decoding, greedy and drawn."""
    prompts = [random_tokens(length, length) for length in (3, 1, 20)]
    for settings in ({}, {"temperature": 0.8, "seed": 5}):
        settings |= {"max_new_tokens": new_tokens}
        alone = [generate(runner, prompt, drafter=None, **settings).tokens for prompt in prompts]
        assert generate(runner, prompts, drafter="merged", budget=6, **settings).tokens == alone


@torch.inference_mode()
def check_taps(runner, sizes=(7, 12)):
    """Taps of prompts and trees outlive the next round, have the bits of their texts, and leave the logits as they are.

    The head makes the logits of what the last norm gives.
    """
    layers, prompts = len(runner.weights.layers), [random_tokens(5), random_tokens(9, 1)]
    trees = {slot: random_tree(size, slot) for slot, size in enumerate(sizes)}
    runner.prefill(prompts, capacity=80)
    plain = runner.verify(trees)
    assert all(verified.taps is None for verified in plain.values())
    for taps in ([0, layers], [1, layers + 1], [layers + 1]):
        pieces = observed_taps(runner, prompts, taps)
        verified = runner.verify(trees)
        runner.verify({0: random_tree(9, 2)})
        for slot, tree in trees.items():
            rows = verified[slot].taps
            assert rows.shape == (len(tree), len(taps), runner.weights.norm.numel()) and rows.dtype == torch.float32
            assert torch.equal(verified[slot].logits, plain[slot].logits)
            if taps[-1] > layers:
                assert torch.equal(runner._logits(rows[:, -1].to(runner.dtype)), plain[slot].logits)
            (again,) = observed_taps(runner, [prompts[slot] + path_tokens(tree, len(tree) - 1)], taps)
            assert torch.equal(again[-1], rows[-1])
            assert torch.equal(again[: len(prompts[slot])], pieces[slot])


@torch.inference_mode()
def check_taps_of(runner, model, first=0, tolerance=1e-4):
    """Taps are the hidden states of transformers' own forward, which has all but one from the first on."""
    prompt, layers = random_tokens(30), model.config.num_hidden_layers
    (taps,) = observed_taps(runner, [prompt], range(layers + 2))
    found = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True).hidden_states
    for tap, expected in zip([*taps.unbind(1)[first : layers + first], taps[:, -1]], found, strict=True):
        assert expected.std() > 0.01
        torch.testing.assert_close(tap, expected[0].float(), atol=tolerance * float(expected.std()), rtol=tolerance)


def observed_taps(runner, prompts, taps):
    """[n, taps, hidden] of each prompt."""
    pieces = [[] for _ in prompts]
    settings = {"capacity": 80 + max(map(len, prompts)), "taps": taps}
    runner.prefill(prompts, observe=lambda slot, chain, read: pieces[slot].append(read.taps), **settings)
    return [torch.cat(rows) for rows in pieces]


# ==== what does not fit ====


def check_prompts_refused(runner, *others):
    """Prompts that prefill refuses, which keeps the batch; others: more of (prompts, options, message)."""
    runner.prefill([[1, 2, 3, 4]])
    for prompts, options, message in (
        ([], {}, "at least one prompt"),
        ([[1], []], {}, r"tokens\[1\] is empty"),
        ([[1, VOCABULARY]], {}, rf"tokens\[0\] must hold token ids in \[0, {VOCABULARY}\), got {VOCABULARY}"),
        ([[1], [5, -1]], {}, r"tokens\[1\].* got -1"),
        ([[1, 2, 3]], {"capacity": 2}, "capacity must be at least .* 3 tokens, got 2"),
        ([[1]], {"taps": [2, 1]}, r"taps must ascend and be in \[0, .*\] for .* layers, got \[2, 1\]"),
        ([[1]], {"taps": [99]}, r"taps must .* got \[99\]"),
        *others,
    ):
        with pytest.raises(ValueError, match=message):
            runner.prefill(prompts, **options)
    for prompts in ([1, 2], None, ["text"], [[1.5]]):
        with pytest.raises(TypeError, match="^tokens.* must be"):
            runner.prefill(prompts)
    for trees in (None, DraftTree.chain([5]), [DraftTree.chain([5])], {0: [5]}, {0: None}):
        with pytest.raises(TypeError, match="trees must be a dict with a DraftTree for each slot that takes part, got"):
            runner.verify(trees)
    assert runner.lengths() == [4]
    assert runner.verify({0: DraftTree.chain([5])})[0].logits.shape == (1, VOCABULARY)
    expected = runner.prefill([[1, 2], [3]])
    for prompts in (
        [torch.tensor([1, 2]), torch.tensor([3])],
        {"input_ids": [[1, 2], [0, 3]], "attention_mask": [[1, 1], [0, 1]]},
    ):
        assert all(torch.equal(row, other) for row, other in zip(runner.prefill(prompts), expected, strict=True))


def check_trees_and_paths_refused(runner):
    runner.prefill([[1, 2, 3]], capacity=8)
    for slot in (1, -1, "0", None):
        with pytest.raises(ValueError, match=rf"trees must be for slots of the batch, in \[0, 1\), got slot {slot!r}"):
            runner.verify({slot: DraftTree.chain([1])})
    with pytest.raises(ValueError, match=rf"trees\[0\].tokens must hold .* got {VOCABULARY}"):
        runner.verify({0: DraftTree.chain([1, VOCABULARY])})
    with pytest.raises(RuntimeError, match="call verify first"):
        runner.commit({0: [0]})
    tree = DraftTree([1, 2, 3, 4], [-1, 0, 0, 2])
    before = runner.verify({0: tree})[0].logits
    for path in ([1], [0, 3], [0, 1, 3], [0, 4], []):
        with pytest.raises(ValueError, match=r"paths\[0\] must"):
            runner.commit({0: path})
    with pytest.raises(ValueError, match=r"paths must be for slots of the last verify, \[0\], got slot 1"):
        runner.commit({0: [0], 1: [0]})
    for paths in ([[0]], {0: None}, {0: "0"}):
        with pytest.raises(TypeError, match=r"^paths.* must be"):
            runner.commit(paths)
    assert runner.lengths() == [3]
    assert torch.equal(runner.verify({0: tree})[0].logits, before)
    runner.commit({0: [0, 2, 3]})
    assert runner.lengths() == [6]
    with pytest.raises(RuntimeError, match="call verify first"):
        runner.commit({0: [0]})
    with pytest.raises(RuntimeError, match="call prefill first"):
        type(runner)(runner.config, runner.weights).verify({0: DraftTree.chain([1])})
