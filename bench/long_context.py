"""One step of a Llama runner behind a long real text, with an attention of the caller's."""

from __future__ import annotations

from collections.abc import Callable

import prompts
import torch
from torch import Tensor

from pyspec.ops import tree_attention
from pyspec.runners.attention import AttentionRunner
from pyspec.runners.numbers import Numbers
from pyspec.tree import DraftTree

# attend(layer, q [Hq, D], k [Hkv, n, D], v [Hkv, n, D]) gives [Hq, D]; the query's own key is the last
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def texts(model: AttentionRunner, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` texts: articles and passages of the prompts, one after the other, none used twice."""
    categories = prompts.by_category()
    found: list[list[int]] = [[]]
    for prompt in (*categories["summarization"], *categories["rag"]):
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

    @torch.inference_mode()
    def logits(self, attend: Attend) -> Tensor:
        """[steps, V]: after each later token of the text, all but the last, each a step with this attention."""
        model, cache, rows = self._model, self._model._cache.view([0], len(self._text)), []
        numbers = Numbers([0], 1, 1, 0, model.device)
        for place, token in enumerate(self._text[self._context : -1], start=self._context):
            numbers.fill({0: DraftTree.chain([token])}, [place], [0])

            def of_layer(layer: int, q: Tensor, numbers: Numbers, window: int | None, keys: int = place + 1) -> Tensor:
                k, v = cache.keys_values[layer]
                return attend(layer, q[0], k[0, :, :keys], v[0, :, :keys])[None]

            cache.attend = of_layer
            hidden = model.weights.forward(model.config, model._embed(numbers.tokens), cache, numbers, model.dtype)
            rows.append(model._logits(hidden)[0])
        return torch.stack(rows)


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
