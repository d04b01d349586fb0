"""One step of a Llama runner behind a long real text, with an attention of the caller's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from inside import attend_step
from torch import Tensor

from pyspec.measure import prompts
from pyspec.ops import tree_attention
from pyspec.runners.attention import AttentionRunner

# attend(layer, q [Hq, D], k [Hkv, n, D], v [Hkv, n, D]) gives [Hq, D]; the query's own key is the last
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def texts(model: AttentionRunner, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` texts: articles and passages of the prompts, one after the other, none used twice."""
    found: list[list[int]] = [[]]
    articles = [prompt for prompt in prompts.spec_bench() if prompt.category in ("summarization", "rag")]
    for prompt in sorted(articles, key=lambda prompt: prompt.category != "summarization"):
        if len(found[-1]) >= length:
            found.append([])
        if len(found) > count:
            break
        found[-1] += model.tokenizer.encode(prompt.text + "\n\n")
    whole = [text[:length] for text in found if len(text) >= length]
    if len(whole) < count:
        raise ValueError(f"the prompts give {len(whole)} texts of {length} tokens, not {count}")
    return whole[:count]


class LongContext:
    """Steps behind the first `context` tokens of a text, which were read with full attention."""

    def __init__(self, model: AttentionRunner, text: list[int], context: int):
        self._model, self._text, self._context = model, text, context
        model.prefill([text[:context]], capacity=len(text))

    def logits(self, attend: Attend) -> Tensor:
        """[steps, V]: after each later token of the text, all but the last, each a step with this attention."""
        later = enumerate(self._text[self._context : -1], start=self._context)
        return torch.stack([attend_step(self._model, token, place, attend) for place, token in later])


def full(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention, as the runner computes it."""
    bits = torch.ones(1, 1, 1, dtype=torch.int32)
    lengths = torch.tensor([k.shape[1] - 1], dtype=torch.int32)
    return tree_attention(q[None, :, None], k[None], v[None], bits, lengths)[0, :, 0]


def attention_scores(model: AttentionRunner, text: list[int]) -> Tensor:
    """[layers * Hq, n] fp32: the scores of one query of every head over the text before it."""
    rows = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k.float().repeat_interleave(len(q) // len(k), 0)
        rows.append(torch.einsum("hd,hnd->hn", q.float(), keys) * q.shape[1] ** -0.5)
        return full(layer, q, k, v)

    LongContext(model, text, len(text) - 2).logits(attend)
    return torch.cat(rows)
