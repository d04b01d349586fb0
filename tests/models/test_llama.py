import importlib

import pytest
import torch
from random_llama import VOCABULARY, random_tokens, random_tree, root_path
from tiny_models import KINDS, expected_logits, tiny_model

import pyspec.models._runner
import pyspec.models.llama
from pyspec import DraftTree, load
from pyspec.models.llama import LlamaWeights
from pyspec.ops.linear import PackedWeight
from pyspec.ops.llama_layers import llama_layers_reference


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """kind -> (transformers model, runner in fp32), made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            model = tiny_model(kind)
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = model, load(str(folder), dtype=torch.float32, device="cpu")
        return made[kind]

    return get


def prefill_logits(runner, prompts, **options):
    """[n, V] logits of every prompt token, for each prompt, and what prefill returned."""
    pieces = [[] for _ in prompts]
    last = runner.prefill(prompts, observe=lambda b, chain, logits: pieces[b].append((chain, logits)), **options)
    for prompt, chunks in zip(prompts, pieces, strict=True):
        assert [token for chain, _ in chunks for token in chain.tokens.tolist()] == prompt
    return [torch.cat([logits for _, logits in chunks]) for chunks in pieces], last


@pytest.mark.parametrize("chunk", [256, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(models, kind, chunk, monkeypatch):
    monkeypatch.setattr(pyspec.models.llama, "PREFILL_CHUNK", chunk)
    model, runner = models(kind)
    prompt = random_tokens(30)
    expected = expected_logits(model, prompt)
    (logits,), (last,) = prefill_logits(runner, [prompt])
    assert logits.dtype == last.dtype == torch.float32
    assert expected.std() > 0.5  # or a tolerance of 1e-4 would say little
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(last, expected[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_node_gets_the_logits_of_its_root_path(models, kind):
    model, runner = models(kind)
    prompt, tree = random_tokens(11), random_tree(40)
    runner.prefill([prompt])
    (logits,) = runner.verify([tree])
    for node in range(0, len(tree), 3):
        path = [int(tree.tokens[ancestor]) for ancestor in root_path(tree, node)]
        torch.testing.assert_close(logits[node], expected_logits(model, prompt + path)[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_commit_extends_the_state_by_the_path(models, kind):
    model, runner = models(kind)
    context = random_tokens(5)
    runner.prefill([context])
    for seed in range(6):
        tree = random_tree(1 + 3 * seed, seed)
        runner.verify([tree])
        path = root_path(tree, len(tree) - 1 - seed)
        runner.commit([path])
        context += [int(tree.tokens[node]) for node in path]
        assert runner.lengths() == [len(context)]
        probe = random_tokens(2, seed)
        expected = expected_logits(model, context + probe)[-2:]
        torch.testing.assert_close(runner.verify([DraftTree.chain(probe)])[0], expected, atol=1e-4, rtol=1e-4)
        runner.commit([None])
        assert runner.lengths() == [len(context)]


def test_verify_reads_only(models):
    _, runner = models("llama")
    runner.prefill([random_tokens(9)])
    tree = random_tree(12)
    first = runner.verify([tree])[0]
    runner.verify([random_tree(20, seed=5)])
    assert torch.equal(runner.verify([tree])[0], first)
    assert runner.lengths() == [9]


def test_a_ragged_batch_gives_what_each_sequence_gives_alone(models):
    _, runner = models("mistral")
    prompts = [random_tokens(length, length) for length in (3, 17, 1, 8)]
    rounds = [[random_tree(size, size + b) if size else None for b, size in enumerate(sizes)] for sizes in
              ((4, 33, 1, 7), (0, 5, 0, 9), (6, 0, 2, 0), (3, 3, 3, 3))]  # fmt: skip

    alone = []
    for b, prompt in enumerate(prompts):
        results = [runner.prefill([prompt])[0]]
        for trees in rounds:
            if trees[b] is not None:
                results.append(runner.verify([trees[b]])[0])
                runner.commit([root_path(trees[b], len(trees[b]) - 1)])
        alone.append(results)

    together = [[logits] for logits in runner.prefill(prompts, capacity=80)]
    for trees in rounds:
        for b, logits in enumerate(runner.verify(trees)):
            assert (logits is None) == (trees[b] is None)
            if logits is not None:
                together[b].append(logits)
        runner.commit([tree and root_path(tree, len(tree) - 1) for tree in trees])
    for results, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(results, expected, atol=1e-4, rtol=1e-4)


def test_a_sequence_that_sits_out_keeps_its_keys(models):
    _, runner = models("llama")
    runner.prefill([random_tokens(4), random_tokens(6, 1), random_tokens(5, 2)], capacity=32)
    before = runner._cache.keys_values[:, :, 1, :, :6].clone()
    runner.verify([random_tree(9), None, random_tree(3)])
    runner.commit([[0], None, None])
    assert runner.lengths() == [5, 6, 5]
    assert torch.equal(runner._cache.keys_values[:, :, 1, :, :6], before)


def test_observing_the_prompt_does_not_change_its_last_logits(models):
    _, runner = models("llama")
    prompt = random_tokens(21)
    _, (observed,) = prefill_logits(runner, [prompt])
    assert torch.equal(runner.prefill([prompt])[0], observed)


def test_weights_exist_once(models):
    _, runner = models("llama_tied_with_biases")
    assert runner.weights.head is runner.weights.embedding
    dense = LlamaWeights.empty(runner.config, torch.float32, torch.device("cpu"))
    places = dense.named(runner.config)  # views of the fused matrices, no copies
    assert all(place.is_contiguous() for place in places.values())
    value = places["model.layers.0.self_attn.v_proj.weight"]
    assert value.untyped_storage().data_ptr() == dense.layers[0].qkv.data_ptr()
    for name, values in runner.weights.named(runner.config).items():
        places[name].copy_(values)
    dense.pack(torch.float32)
    assert dense.head is dense.embedding and all(
        isinstance(matrix, PackedWeight)
        for layer in dense.layers
        for matrix in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )
    assert torch.equal(dense.head.data, runner.weights.head.data)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, r"tokens\[1\] is empty"),
        ([[1] * 129], {}, r"tokens\[0\] has 129 tokens, the model's context is 128"),
        ([[1, VOCABULARY]], {}, rf"tokens\[0\] must hold token ids in \[0, {VOCABULARY}\), got {VOCABULARY}"),
        ([[1], [5, -1]], {}, r"tokens\[1\].* got -1"),
        ([[1, 2, 3]], {"capacity": 2}, "capacity must be at least .* 3 tokens, got 2"),
    ],
)
def test_prefill_refuses_what_does_not_fit_and_keeps_the_batch(models, prompts, options, message):
    _, runner = models("llama")
    runner.prefill([[1, 2, 3, 4]])
    with pytest.raises(ValueError, match=message):
        runner.prefill(prompts, **options)
    assert runner.lengths() == [4]
    assert runner.verify([DraftTree.chain([5])])[0].shape == (1, VOCABULARY)


def test_verify_and_commit_refuse_what_does_not_fit(models):
    _, runner = models("llama")
    runner.prefill([[1, 2, 3]], capacity=8)
    with pytest.raises(ValueError, match="sequence 0 has 3 of 8 slots committed and needs 6 more"):
        runner.verify([DraftTree.chain([1] * 6)])
    with pytest.raises(ValueError, match="one entry for each of the 1 sequences, got 2"):
        runner.verify([DraftTree.chain([1]), None])
    with pytest.raises(ValueError, match=rf"trees\[0\].tokens must hold .* got {VOCABULARY}"):
        runner.verify([DraftTree.chain([1, VOCABULARY])])
    with pytest.raises(RuntimeError, match="call verify first"):
        runner.commit([[0]])
    runner.verify([DraftTree([1, 2, 3, 4], [-1, 0, 0, 2])])
    for path in ([1], [0, 3], [0, 1, 3], [0, 4], []):
        with pytest.raises(ValueError, match=r"paths\[0\] must"):
            runner.commit([path])
    assert runner.lengths() == [3]
    runner.commit([[0, 2, 3]])
    assert runner.lengths() == [6]
    with pytest.raises(RuntimeError, match="call verify first"):
        runner.commit([[0]])
    fresh = pyspec.models.llama.LlamaRunner(runner.config, runner.weights)
    with pytest.raises(RuntimeError, match="call prefill first"):
        fresh.verify([DraftTree.chain([1])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.int8], ids=str)
def test_rows_do_not_depend_on_what_is_beside_them(models, tmp_path, dtype):
    """The row rule through the whole model, bit for bit: the tree, the batch and the number of threads."""
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=dtype, device="cpu")
    prompt, tree = random_tokens(20), random_tree(24)
    runner.prefill([prompt])
    (logits,) = runner.verify([tree])
    expected = expected_logits(model, prompt + [int(tree.tokens[0])])[-1]
    assert (logits[0] - expected).abs().mean() < 0.1 * expected.std()
    threads = torch.get_num_threads()
    for node in (3, 11, 23):
        torch.set_num_threads(1)
        runner.prefill([prompt])
        for step in root_path(tree, node):
            (alone,) = runner.verify([DraftTree.chain([int(tree.tokens[step])])])
            runner.commit([[0]])
        torch.set_num_threads(threads)
        assert torch.equal(alone[0], logits[node])
    runner.prefill([random_tokens(7, 1), prompt], capacity=64)
    assert torch.equal(runner.verify([random_tree(9), tree])[1], logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
def test_a_prompt_may_be_read_in_any_chunks(models, tmp_path, dtype, monkeypatch):
    model, _ = models("llama")
    model.save_pretrained(tmp_path)
    runner = load(str(tmp_path), dtype=dtype, device="cpu")
    prompt, found = random_tokens(100), []
    for chunk in (100, 64, 7, 1):
        monkeypatch.setattr(pyspec.models.llama, "PREFILL_CHUNK", chunk)
        (logits,) = runner.prefill([prompt])
        found.append((logits, runner._cache.keys_values[..., : len(prompt), :].clone()))
    for logits, keys_values in found[1:]:
        assert torch.equal(logits, found[0][0]) and torch.equal(keys_values, found[0][1])


def test_the_row_rule_tests_have_teeth(models, monkeypatch):
    """With torch's own matrix product in place of ours, a row's bits do depend on the rows beside it."""
    _, runner = models("llama")
    prompt, tree = random_tokens(20), random_tree(24)

    def verify(tree):
        runner.prefill([prompt])
        return runner.verify([tree])[0]

    def torch_linear(x, weight, bias=None, *, out_dtype=None):
        out = torch.nn.functional.linear(x, weight.unpack().to(x.dtype), bias)
        return out if out_dtype is None else out.to(out_dtype)

    first = DraftTree.chain([int(tree.tokens[0])])
    assert torch.equal(verify(tree)[:1], verify(first))
    monkeypatch.setattr(importlib.import_module("pyspec.ops.llama_layers"), "linear", torch_linear)
    monkeypatch.setattr(pyspec.models._runner, "linear", torch_linear)
    monkeypatch.setattr(pyspec.models.llama, "llama_layers", composed_layers)
    if torch.equal(verify(tree)[:1], verify(first)):
        pytest.skip("torch's matrix product happens to be row-invariant for these shapes on this processor")


def composed_layers(*args, windows, heads, intermediate, epsilon):
    return llama_layers_reference(*args, windows, heads, intermediate, epsilon)
