"""Distributed speculative inference: drafting goes on while several targets verify different parts of one text.

After Timor et al., "Distributed Speculative Inference of Large Language Models", arXiv 2405.14105. Nothing here knows
where the workers are: they are functions that return futures, of threads, processes or Ray actors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

#: A drafter, called with a context, a number k, and how many tokens of the context are certain: k that may follow.
Draft = Callable[[list[int], int, int], "Future[list[int]]"]
#: A target, called alike: what it says after each of the context's k longest beginnings, the context itself last.
Verify = Callable[[list[int], int, int], "Future[list[int]]"]


@dataclass(frozen=True)
class _Task:
    """A target at work: what it will say after the first `least` to `most` tokens of a text."""

    target: int
    least: int
    most: int


class DistributedText:
    """One text that a drafter and several targets write together.

    The text is what a target alone would say: each token of it is a target's, said after the very tokens before it. A
    target begins on the end of the text as soon as that is known, so no text takes longer than with one target alone,
    as long as a target is free.

    Args:
        draft: the drafter.
        targets: they must say the same, as runners of the same weights and one seed do.
        lookahead: drafts that a target takes at once, at least 1. So that drafting never waits for them, this many
            targets are needed: a target's time over (lookahead x the drafter's time for a token), rounded up.
        wait: waits for the first of some futures; concurrent.futures.wait unless time is simulated.

    Attributes:
        verified: tokens that targets looked at, those in vain included.
    """

    def __init__(
        self,
        draft: Draft,
        targets: Sequence[Verify],
        *,
        lookahead: int = 5,
        wait: Callable[[Iterable[Future]], Iterable[Future]] = lambda futures: (
            wait(futures, None, FIRST_COMPLETED).done
        ),
    ):
        if not targets:
            raise ValueError("targets must be one or more, got none")
        if lookahead < 1:
            raise ValueError(f"lookahead must be at least 1, got {lookahead}")
        self._draft, self._targets, self._lookahead, self._wait = draft, list(targets), lookahead, wait
        self.verified = 0

    def generate(self, prompt: Sequence[int], max_new_tokens: int, ends: Iterable[int] = ()) -> list[int]:
        """The tokens that follow a prompt, up to the first of `ends`, which is among them, or to the limit.

        Raises whatever a worker raises.
        """
        self._text = list(prompt)  # known for certain
        self._guess = list(prompt)  # the text, and what may follow
        self._sent = len(prompt) - 1  # some target says or said what follows as many tokens
        self._said: dict[int, int] = {}  # what follows so many tokens of the guess
        self._free = deque(range(len(self._targets)))
        self._tasks: dict[Future, _Task] = {}
        self._stale: dict[Future, int] = {}  # targets that are busy in vain
        self._drafting: Future | None = None
        limit, ends = len(prompt) + max_new_tokens, frozenset(ends)
        while len(self._text) < limit:
            self._start(limit)
            waited = [*self._tasks, *self._stale, *([self._drafting] if self._drafting else [])]
            for done in self._wait(waited):
                self._take(done)
            before = len(self._text)
            self._advance(limit)
            if ended := [place for place in range(before, len(self._text)) if self._text[place] in ends]:
                del self._text[ended[0] + 1 :]
                break
        for left in (*self._tasks, *self._stale, *([self._drafting] if self._drafting else [])):
            left.cancel()
        return self._text[len(prompt) :]

    def _start(self, limit: int) -> None:
        """Gives the free targets what is drafted and not verified, and the drafter something to do."""
        while self._free:
            known = len(self._guess)
            is_end = self._sent < len(self._text)  # nobody is asked yet what follows the text itself
            block = min(self._sent + self._lookahead, limit - 1)
            most = min(known, block)
            if most <= self._sent or not (is_end or most == block):
                break
            task = _Task(self._free.popleft(), self._sent + 1, most)
            self._tasks[self._targets[task.target](self._guess[:most], most - self._sent, len(self._text))] = task
            self._sent, self.verified = most, self.verified + most - task.least + 1
        ahead = len(self._guess) - len(self._text)
        room = min(self._lookahead * (len(self._targets) + 1), limit - 1 - len(self._text))
        if self._drafting is None and ahead < room:
            self._drafted_from = list(self._guess)
            drafts = min(self._lookahead, room - ahead)
            self._drafting = self._draft(self._drafted_from, drafts, len(self._text))

    def _take(self, done: Future) -> None:
        """Takes what a worker has done."""
        if done is self._drafting:
            self._drafting = None
            drafted = self._drafted_from + list(done.result())
            if drafted[: len(self._guess)] == self._guess:  # the text did not go another way meanwhile
                self._guess = drafted
        elif done in self._stale:
            self._free.append(self._stale.pop(done))
        else:
            task = self._tasks.pop(done)
            self._free.append(task.target)
            self._said.update(zip(range(task.least, task.most + 1), done.result(), strict=True))

    def _advance(self, limit: int) -> None:
        """The text takes in what targets said of it; all that was drafted behind something else is void."""
        while len(self._text) < limit and (token := self._said.pop(len(self._text), None)) is not None:
            place = len(self._text)
            self._text.append(token)
            if place < len(self._guess) and self._guess[place] == token:
                continue
            is_wrong = place < len(self._guess)
            self._guess = list(self._text)
            if is_wrong:
                self._forget()

    def _forget(self) -> None:
        """Everything behind the text is void: targets that can be called off are free, the others in time."""
        self._said.clear()
        self._sent = len(self._text) - 1
        for future, task in self._tasks.items():
            if future.cancel():
                self._free.append(task.target)
            else:
                self._stale[future] = task.target
        self._tasks.clear()
        if self._drafting is not None and self._drafting.cancel():
            self._drafting = None


class Worker:
    """A runner that drafts or verifies for a DistributedText, over a cache that holds what is certain.

    Args:
        model: its batch is this worker's alone.
        capacity: tokens of a text, with all that is drafted beyond.
        sampling: temperature, top_p, top_k and seed, as for pyspec.generate; targets of one text need the same seed.
    """

    def __init__(self, model, capacity: int, **sampling):
        self._model, self._capacity = model, min(capacity, model.context_length)
        self._sampler = Sampler(**sampling)
        self._known: list[int] = []  # tokens that are committed
        self._next = 0  # what follows them

    def verify(self, context: list[int], count: int, certain: int) -> list[int]:
        """What the model says after each of the `count` longest beginnings of a context, which itself is the last.

        certain: how many tokens of the context later ones will have too; at most one of the `count` is shorter.
        """
        if self._known != context[: len(self._known)] or len(self._known) > len(context) - count + 1:
            self._known = []
        if not self._known:
            (logits,) = self._model.prefill([context[:certain]], capacity=self._capacity)
            self._known, self._next = context[:certain], self._sampler.draw(logits, certain)
        return self._said(context, certain)[-count:]

    def draft(self, context: list[int], count: int, certain: int) -> list[int]:
        """The `count` tokens that the model says after a context, one after another."""
        drafted: list[int] = []
        while len(drafted) < count:
            drafted += self.verify([*context, *drafted], 1, certain)
        return drafted

    def _said(self, context: list[int], certain: int) -> list[int]:
        """What follows the committed tokens, and each further beginning of a context."""
        known = len(self._known)
        if known == len(context):
            return [self._next]
        (verified,) = self._model.verify({0: DraftTree.chain(context[known:])}).values()
        said = [self._next]
        said += [self._sampler.draw(row, known + place + 1) for place, row in enumerate(verified.logits)]
        if certain > known:
            self._model.commit({0: range(certain - known)})
            self._known, self._next = context[:certain], said[certain - known]
        return said
