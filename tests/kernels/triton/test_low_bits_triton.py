"""A model in the bits of its file, through the Triton kernels, beside the values of the file on the CPU."""

import gguf
import pytest
import torch

from tests.helpers.fake_recorder import FakeRecorder, with_graphs
from tests.helpers.random_llama import random_tokens
from tests.helpers.slow import slow
from tests.helpers.tiny_models import tiny_model, write_gguf

pytest.importorskip("triton", reason="Triton is not installed for this platform")
import pyspec.runners.native  # noqa: E402
from pyspec import DraftTree, load  # noqa: E402
from pyspec.ops import _library, linear_codes_tiles  # noqa: E402
from pyspec.ops.lay_out import StoredMatrix  # noqa: E402

pytestmark = pytest.mark.usefixtures("kernel_device")
KIND = gguf.GGMLQuantizationType
JOINED = {"attn_q": KIND.Q4_0, "attn_k": KIND.Q4_0, "attn_v": KIND.Q8_0, "ffn_down": KIND.Q8_0, "token_embd": KIND.Q5_0}


@pytest.fixture
def load_on_gpu(monkeypatch):
    """load on the GPU; without one, on CPU tensors with all that a GPU does but the capture of a graph."""
    if torch.cuda.is_available():
        return lambda path: load(path, device="cuda")

    def load_so(path):
        monkeypatch.setattr(linear_codes_tiles, "in_tiles", lambda device: True)
        monkeypatch.setattr(StoredMatrix, "columns", lambda self, step: self.values()[:, ::step])
        for op in _library._OPS.values():
            if op._triton is not None:
                monkeypatch.setattr(op, "overload", op._triton())
        monkeypatch.setattr(pyspec.runners.native, "GraphRecorder", FakeRecorder)
        return with_graphs(load(path, device="cpu"))

    return load_so


@pytest.mark.parametrize("kind", ["llama", slow("qwen3_moe")])
def test_logits_are_those_of_the_values_and_a_node_has_the_bits_of_plain_decoding(kind, load_on_gpu, tmp_path):
    """With queries, keys and values in several formats, and gates and ups of experts too."""
    kinds, stated, changed = {**JOINED, "ffn_gate_exps": KIND.Q4_1, "ffn_down_exps": KIND.Q5_1}, {}, {}
    if kind == "qwen3_moe":
        changed = {"moe_intermediate_size": 64, "num_hidden_layers": 1}
        stated = {"expert_count": 6, "expert_used_count": 3, "expert_feed_forward_length": 64}
    path = str(tmp_path / "tiny.gguf")
    write_gguf(path, tiny_model(kind, **changed), lambda name: kinds.get(name.split(".")[-2], KIND.IQ4_NL), **stated)
    prompt, tree = random_tokens(5), DraftTree(random_tokens(3, 1), [-1, 0, 0])
    exact = load(path, dtype=torch.float32, device="cpu")
    exact.prefill([prompt])
    expected = exact.verify({0: tree})[0].logits
    runner = load_on_gpu(path)
    assert runner.weights.layers[0].qkv.dtype == "q4_0, q8_0"
    runner.prefill([prompt], capacity=40)
    logits = runner.verify({0: tree})[0].logits.clone()
    assert (logits.cpu() - expected).std() < 0.06 * expected.std()
    for node in (0, 2):
        alone = runner.verify({0: DraftTree.chain([int(tree.tokens[node])])})[0].logits
        runner.commit({0: [0]})
        assert torch.equal(alone[0], logits[node])
