"""AttentionRunner as on a GPU, step by step through the Triton kernels, beside the same model on the CPU."""

import pytest
import torch

from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import random_llama, random_tokens, random_tree, verify_all
from tests.helpers.slow import slow

pytest.importorskip("triton", reason="Triton is not installed for this platform")
import pyspec.runners.native  # noqa: E402
from pyspec import DraftTree  # noqa: E402
from pyspec.ops import _library  # noqa: E402
from pyspec.ops.linear import LinearWeight, _lay_out_int8  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
DTYPES = [torch.float32, slow(torch.float16), slow(torch.int8)]  # the interpreter rounds bf16 otherwise


@pytest.fixture
def gpu_llama(monkeypatch):
    """random_llama on the GPU; without one, on CPU tensors with all that a GPU does but the capture of a graph."""
    if torch.cuda.is_available():
        return lambda **options: random_llama("cuda", **options)

    def pack_rows(weight, dtype=None):
        data = _lay_out_int8(weight, in_panels=False) if dtype == torch.int8 else weight.to(dtype).contiguous()
        return LinearWeight(data, *weight.shape)

    def make(**options):
        with monkeypatch.context() as patch:
            patch.setattr(pyspec.architectures.weights, "lay_out_weight", pack_rows)
            runner = random_llama(**options)
        for op in _library._OPS.values():
            if op._triton is not None:
                monkeypatch.setattr(op, "overload", op._triton())
        monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
        return with_graphs(runner)

    return make


@torch.inference_mode()
def start(runner, lengths):
    """A batch with so many committed keys, but random ones: the interpreter is slow at reading prompts."""
    runner.prefill([[1]] * len(lengths), capacity=120)
    for sequence, length in enumerate(lengths):
        place = runner._cache.keys_values[:, :, sequence, :, :length]
        place.copy_(torch.randn(place.shape, generator=torch.Generator().manual_seed(length)))
        runner._cache.lengths[sequence] = length


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_those_of_the_cpu(gpu_llama, dtype):
    """A tree across the border of a tile, a sequence that sits out, and padding."""
    lengths, trees = [62, 5, 9], [random_tree(3), None, random_tree(1, 1)]
    found = []
    for make in (random_llama, gpu_llama):
        runner = make(dtype=dtype, windows=(9, None), biases=True)
        start(runner, lengths)
        found.append(verify_all(runner, trees))
    assert found[0][1] is None and found[1][1] is None
    for theirs, ours in zip(found[0][::2], found[1][::2], strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert (ours.cpu() - theirs).abs().mean() < tolerance * theirs.std()


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.int8], ids=str)
def test_a_node_has_the_bits_of_plain_decoding(gpu_llama, dtype):
    runner = gpu_llama(dtype=dtype, windows=(9, None))
    tree = DraftTree(random_tokens(3), [-1, 0, 0])
    start(runner, [63])
    logits = runner.verify({0: tree})[0].logits
    for node in (0, 2):
        alone = runner.verify({0: DraftTree.chain([int(tree.tokens[node])])})[0].logits
        runner.commit({0: [0]})
        assert torch.equal(alone[0], logits[node])
    start(runner, [1, 63])
    assert torch.equal(runner.verify({0: random_tree(2), 1: tree})[1].logits, logits)


@pytest.mark.slow
def test_a_prompt_may_be_read_in_any_chunks(gpu_llama, monkeypatch):
    prompt, found = random_tokens(6), []
    runner = gpu_llama()
    for chunk in (6, 4):
        monkeypatch.setattr(pyspec.runners.native, "GRAPH_CHUNK", chunk)
        (logits,) = runner.prefill([prompt])
        found.append((logits.clone(), runner._cache.keys_values[..., : len(prompt), :].clone()))
    assert all(map(torch.equal, *found))
