"""Attention of transformers' models by our kernels."""

import pytest
import torch

pytest.importorskip("transformers")

from pyspec import BlockMask  # noqa: E402
from pyspec.integrations.transformers import attention, generate, register_attention  # noqa: E402
from tests.helpers.small_transformers import CACHE, OPTIONS, PROMPT, VOCABULARY, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error::FutureWarning", "error::DeprecationWarning:transformers")


@pytest.fixture(scope="module")
def llama():
    return tiny()


@pytest.fixture(scope="module")
def with_ours():
    register_attention()
    ours = tiny()
    ours.set_attn_implementation("pyspec")
    return ours


def close(found, expected):
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=2e-4)


def test_attention_of_plain_padded_and_joined_texts(llama, with_ours):
    ids = torch.randint(1, VOCABULARY, (2, 150))
    close(with_ours(ids), llama(ids))
    padding = (torch.arange(150) >= torch.tensor([[70], [0]])).long()
    ours, theirs = with_ours(ids, attention_mask=padding), llama(ids, attention_mask=padding)
    seen = padding.bool()
    torch.testing.assert_close(ours.logits[seen], theirs.logits[seen], atol=2e-4, rtol=2e-4)
    joined = torch.cat([torch.arange(60), torch.arange(90)])[None]
    close(
        with_ours(ids[:1], position_ids=joined, use_cache=False), llama(ids[:1], position_ids=joined, use_cache=False)
    )


def test_attention_after_a_cache(llama, with_ours):
    ids = torch.randint(1, VOCABULARY, (1, 150))
    for cuts in ([100, 101, 104, 150], [3, 90, 150]):
        caches, start = [None, None], 0
        for end in cuts:
            outs = []
            for which, model in enumerate((with_ours, llama)):
                outs.append(model(ids[:, start:end], use_cache=True, **{CACHE: caches[which]}))
                caches[which] = outs[-1][CACHE]
            close(*outs)
            start = end


def test_attention_of_a_4d_mask_is_built_once_and_never_stale(llama, with_ours, monkeypatch):
    ids = torch.randint(1, VOCABULARY, (1, 90))
    built = []
    from_dense = BlockMask.from_dense
    monkeypatch.setattr(BlockMask, "from_dense", lambda dense: built.append(1) or from_dense(dense))
    visible = torch.ones(90, 90, dtype=torch.bool).tril() & (torch.rand(90, 90) < 0.7)
    visible |= torch.eye(90, dtype=torch.bool)
    mask = torch.zeros(1, 1, 90, 90).masked_fill(~visible, torch.finfo(torch.float32).min)
    close(with_ours(ids, attention_mask=mask), llama(ids, attention_mask=mask))
    assert len(built) == 1, "two layers, one mask"
    mask[..., 50:, 10] = torch.finfo(torch.float32).min
    close(with_ours(ids, attention_mask=mask), llama(ids, attention_mask=mask))
    with pytest.raises(ValueError, match="adds no bias"):
        with_ours(ids, attention_mask=mask * 0 - 1.0)


def test_attention_with_sliding_windows():
    register_attention()
    model = tiny("Mistral", sliding_window=16)
    ids = torch.randint(1, VOCABULARY, (1, 100))
    expected = model(ids)
    model.set_attn_implementation("pyspec")
    close(model(ids), expected)


def test_generate_with_attention_ours(llama, with_ours):
    expected = llama.generate(torch.tensor(PROMPT), **OPTIONS)
    assert torch.equal(with_ours.generate(torch.tensor(PROMPT), **OPTIONS), expected)
    assert torch.equal(with_ours.generate(torch.tensor(PROMPT), custom_generate=generate, **OPTIONS), expected)


def test_attention_refuses_dropout():
    module = torch.nn.Module()
    q = torch.zeros(1, 4, 3, 64)
    with pytest.raises(ValueError, match="dropout must be 0"):
        attention._attention(module, q, q, q, None, dropout=0.1)
