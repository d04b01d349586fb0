"""The sequences that a head of pyspec.drafters.heads.context drafts for: a text is read by its taps alone.

The newest token, of which the target has said nothing yet, is a guess like those below it: its keys are scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyspec.drafters.heads.chimera import TOKENS
from pyspec.drafters.heads.eagle3_batch import Asked, HeadBatch, HeadLaws
from pyspec.drafters.heads.eagle3_room import READ, HeadRoom
from pyspec.runners._inference import inference
from pyspec.sampling.sampler import Sampler

__all__ = ["ContextBatch", "ContextLaws"]


class ContextRoom(HeadRoom):
    """Where such a head works, see HeadRoom."""

    def _call(self, kind: int, inputs: Tensor, cache, numbers) -> list[Tensor]:
        head, (_, embedded, rows) = self._head, self._parts(kind, len(numbers.tokens))
        if kind == READ:
            return [head.read(rows, cache, numbers)]
        embedded = head.embed(numbers.tokens) if head.embeds_by_op else embedded
        return head.guess(embedded, rows, cache, numbers)


class ContextLaws(HeadLaws):
    """The laws of a head whose guesses take in the tokens before them; see HeadLaws."""

    def _begin(self) -> None:
        self._text = self._batch.ends[self._sequence]

    def _targets(self, asked: Asked, nodes: Sequence[int]) -> np.ndarray:
        tokens = super()._targets(asked, nodes)
        return np.array([token if node else self._text[-1] for token, node in zip(tokens, nodes, strict=True)])

    def _given(self, asked: Asked, nodes: Sequence[int]) -> Tensor:
        """Embedded rows of the two tokens before each node, side by side; 0 where the text begins later."""
        before = np.array([self._before(asked, node) for node in nodes])
        rows = self._batch.head.embed(torch.from_numpy(before.clip(0)).flatten())
        rows = torch.where(torch.from_numpy(before < 0).flatten().to(rows.device)[:, None], 0.0, rows)
        return rows.view(len(nodes), -1)

    def _before(self, asked: Asked, node: int) -> list[int]:
        """The two tokens of the target before a node's, -1 for none."""
        path, parent = [], asked.parents[node]
        while parent > 0:
            path.insert(0, parent)
            parent = asked.parents[parent]
        text = self._text if node else self._text[:-1]
        tokens = [*text, *(self._targets(asked, path).tolist() if path else ())]
        return [-1] * (TOKENS - 1 - len(tokens)) + tokens[1 - TOKENS :]


class ContextBatch(HeadBatch):
    """The texts in a head's cache, see HeadBatch.

    Attributes:
        ends: by sequence, the last tokens of the text that was read last.
    """

    rooms = ContextRoom

    def __init__(self, head):
        super().__init__(head)
        self.ends: dict[int, list[int]] = {}

    def laws(self, sequence: int, sampler: Sampler) -> HeadLaws:
        return ContextLaws(self, sequence, sampler)

    def grow(self, *texts) -> None:
        """None: these trees grow in Python."""

    @inference
    def read(self, contexts: Mapping[int, Sequence[int]]) -> None:
        """Commits all rows of some texts, by sequence, of which the target has said all but the last token's."""
        tokens, unread = self._to_read(contexts)
        if unread:
            self._read(READ, tokens, unread)
        self.ends |= {each: list(context[-TOKENS:]) for each, context in contexts.items()}
