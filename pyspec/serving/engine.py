"""Engine: one model, and requests that come into its slots and leave them between rounds.

A prompt is read in pieces between the rounds of the texts that are being written, each piece small enough to take no
longer than a round. By the row rule a text has the same bits whatever is beside it and however its prompt was read,
so each is the very text that pyspec.generate gives for it alone.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from pyspec.acceptance import AcceptanceRule, acceptance_from_name
from pyspec.arguments import described, read_integer
from pyspec.caches import QuantisedSettings
from pyspec.caches.prefixes import read_memory
from pyspec.controllers import Controller, controller_for, read_controller
from pyspec.drafters import Drafter, drafter_from_name
from pyspec.generate import (
    cache_settings,
    check_limits,
    check_model,
    drafter_for,
    prompts_of,
    read_logprobs,
    stop_strings,
)
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import TextStream
from pyspec.serving.answer import Answer, Piece, QueueFull, Text
from pyspec.serving.slots import Slots
from pyspec.stats import Stats

__all__ = ["Answer", "Engine", "Piece", "QueueFull"]

LONGEST = 8192  # tokens of a slot, unless asked otherwise
REASONS = ("eos", "stop", "length", "cancelled", "error")
SUMS = (*(f"finished_{reason}" for reason in REASONS), "requests", "refused", "prompt_tokens", "prefix_tokens")
SUMS = (*SUMS, "prefix_hits", "new_tokens", "accepted", "rounds", "nodes", "seconds")


class Engine:
    """Answers many requests with one model, some at a time; what does not fit waits.

    One thread works with the model, which nobody else may use meanwhile but through model.fork(). It outlives every
    request: whatever a request's drafter, sampler or on_piece raises ends that request alone.

    Args:
        model: a runner on pyspec's own kernels, from pyspec.load.
        slots: texts that are written at a time; the memory for them is taken at once on a GPU, and as it is needed on
            a CPU.
        queue: requests that wait at most, beside those for which a slot is free; any more are refused with QueueFull.
        capacity: tokens of a prompt and its answer at most; None is the model's context, but at most 8192.
        prefix_memory: bytes for beginnings of texts that are kept for the next ones (docs/serving.md); 0 keeps none.
        drafter, budget, controller, acceptance, cache: of all requests, as for pyspec.generate.

    Attributes:
        model, slots, queue: as given.
        context_length: tokens of a prompt and its answer at most.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.
        RuntimeError: this thread is generating with the model.
    """

    def __init__(
        self,
        model: Runner,
        *,
        slots: int = 8,
        queue: int = 64,
        capacity: int | None = None,
        prefix_memory: int = 2**28,
        drafter: str | Drafter | list | None = "merged",
        budget: int | str = "auto",
        controller: str | Controller | None = None,
        acceptance: str | AcceptanceRule = "exact",
        cache: str | QuantisedSettings = "dense",
    ):
        check_model(model)
        if not hasattr(model, "open"):
            raise ValueError(f"model must be a runner whose slots can be opened, got a {type(model).__name__}")
        self.model = model
        self.slots, self.queue = read_integer("slots", slots), read_integer("queue", queue)
        for name, value in (("slots", self.slots), ("queue", self.queue)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        longest = LONGEST if capacity is None else read_integer("capacity", capacity, "an integer or None")
        self.context_length = min(model.context_length, longest)
        if self.context_length < 2:
            raise ValueError(f"capacity must be at least 2 tokens, got {capacity}")
        self._prefix_memory = read_memory("prefix_memory", prefix_memory)
        budget, _ = check_limits(budget, 1)
        self._settings = cache_settings(cache, model, budget)
        self._rule = acceptance_from_name(acceptance)
        self._drafter = drafter_from_name(drafter, model)
        drafter_for(self._drafter, model, self._rule, self._settings, Sampler())  # whether they go together
        if getattr(self._drafter, "needs_dense_cache", False):
            raise ValueError(f"drafter must not work in the model's own slots, got a {type(self._drafter).__name__}")
        self._controller = controller_for(budget, read_controller(controller), model, self._drafter, self._settings)

        self._encoding = threading.Lock()
        self._changed = threading.Condition()  # of what follows, which threads share
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._sums: Counter[str] = Counter()
        self._closing: float | None = None  # when running texts have to end, by time.monotonic
        started: Future = Future()
        self._thread = threading.Thread(target=self._serve, args=(started,), name="pyspec engine", daemon=True)
        self._thread.start()
        started.result()

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stop: str | Iterable[str] = (),
        logprobs: int | None = None,
        on_piece: Callable[[Piece | None], None] | None = None,
        **warpers,
    ) -> Answer:
        """Asks for the continuation of a prompt, from any thread; it waits until a slot is free.

        Args:
            prompt: token ids, or a text for the model's tokenizer.
            max_new_tokens, temperature, top_p, top_k, seed, stop, logprobs, warpers: as for pyspec.generate; the
                engine's context_length ends a text too.
            on_piece: called in the engine's thread, which waits for it, with every piece, and with None after the last;
                then iterating over the answer gives no pieces. None keeps them for whoever iterates.

        Raises:
            ValueError, TypeError: naming the argument that does not fit, before the request waits.
            QueueFull: as many requests wait as may.
            RuntimeError: the engine is closed.
        """
        model = self.model
        if isinstance(prompt, str):
            if model.tokenizer is None:
                raise ValueError("prompt must be token ids: this model has no tokenizer")
            with self._encoding:  # a tokenizer serves one thread at a time
                prompt = model.tokenizer.encode(prompt)
        batched, (tokens, *_) = prompts_of(prompt, model, "prompt")
        if batched:
            raise TypeError("prompt must be one prompt, got a batch")
        if len(tokens) >= self.context_length:
            raise ValueError(f"prompt must leave room in {self.context_length} tokens, got {len(tokens)}")
        stop = stop_strings(stop, model)
        _, max_new_tokens = check_limits(1, max_new_tokens)
        sampler = Sampler(temperature, top_k, top_p, seed, **warpers)
        if not (on_piece is None or callable(on_piece)):
            raise TypeError(f"on_piece must be a function or None, got {described(on_piece)}")
        text = Text(
            model=model,
            context=tokens,
            prompt_length=len(tokens),
            limit=min(len(tokens) + max_new_tokens, self.context_length),
            drafter=drafter_for(self._drafter, model, self._rule, self._settings, sampler),
            sampler=sampler.start(tokens, model),
            text=None if model.tokenizer is None else TextStream(model.tokenizer, stop),
            top_logprobs=read_logprobs(logprobs),
            stats=Stats(seed=sampler.seed),
        )
        answer = Answer(text, on_piece, self._cancel)
        with self._changed:
            if self._closing is not None:
                raise RuntimeError("engine is closed")
            if len(self._waiting) >= self.queue + self.slots - len(self._running):
                self._sums["refused"] += 1
                raise QueueFull(len(self._waiting), self._seconds_to_wait())
            self._waiting.append(answer)
            self._sums["requests"] += 1
            self._changed.notify_all()
        return answer

    def state(self) -> dict[str, int | float]:
        """What the engine does now, and sums since it began, by name: see docs/serving.md."""
        with self._changed:
            running, sums = len(self._running), dict(self._sums)
            return {
                "slots": self.slots,
                "running": running,
                "free": self.slots - running,
                "queued": len(self._waiting),
                "prefix_bytes": self.model.prefixes.nbytes,
                "prefix_memory": self._prefix_memory,
                **{name: sums.get(name, 0) for name in SUMS},
            }

    def close(self, grace: float = 0.0) -> None:
        """Takes no more requests, ends those that wait, and gives those that run so many seconds before it ends them.

        Returns when the engine's thread has ended; the model is free then. Closing again does nothing new.
        """
        with self._changed:
            deadline = time.monotonic() + grace
            self._closing = deadline if self._closing is None else min(self._closing, deadline)
            waiting = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        for answer in waiting:
            self._end(answer, "cancelled")
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _cancel(self, answer: Answer) -> None:
        """Ends an answer that waits; the engine's thread ends one that runs."""
        with self._changed:
            waits = answer in self._waiting
            if waits:
                self._waiting.remove(answer)
        if waits:
            self._end(answer, "cancelled")

    # ==== the engine's thread ====

    def _serve(self, started: Future) -> None:
        try:
            with exclusive_use(self.model):
                settings = (self._rule, self._controller, self._drafter, self._settings, self._prefix_memory)
                self._slots = Slots(self.model, self.slots, self.context_length, *settings)
                started.set_result(None)
                while self._wait():
                    self._step(self._slots)
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def _wait(self) -> bool:
        """Waits for something to do; False once the engine is closed and nothing runs."""
        with self._changed:
            while not (self._waiting or self._running):
                if self._closing is not None:
                    return False
                self._changed.wait()
        return True

    def _step(self, slots: Slots) -> None:
        """Texts that were cancelled leave, those that wait come in, and all get on by a round."""
        with self._changed:
            is_over = self._closing is not None and time.monotonic() > self._closing
            came = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.slots - len(self._running)))]
            self._running += came
        try:
            for answer in came:
                slots.add(answer._text)
            for answer in self._running:
                if answer._text.going and (is_over or answer._is_cancelled):
                    answer._text.finish("cancelled")
            before = (slots.stats.rounds, slots.stats.nodes)
            slots.step()
            with self._changed:
                self._sums["rounds"] += slots.stats.rounds - before[0]
                self._sums["nodes"] += slots.stats.nodes - before[1]
            for answer in self._running:
                answer._give()
            slots.leave()
        except Exception as error:  # of no text's own
            for answer in self._running:
                answer._text.fail(error)
            slots.texts.clear()
        ended = [answer for answer in self._running if not answer._text.going]
        with self._changed:
            self._running = [answer for answer in self._running if answer._text.going]
        for answer in ended:
            self._end(answer)

    def _end(self, answer: Answer, reason: str | None = None) -> None:
        """Tells of the end of a text, which ends now if a reason is given."""
        text = answer._text
        if reason is not None:
            text.finish(reason)
        answer._end()
        with self._changed:
            sums, stats = self._sums, text.stats
            sums[f"finished_{text.finish_reason}"] += 1
            sums["seconds"] += stats.total_seconds
            sums["prompt_tokens"] += text.prompt_length
            sums["new_tokens"] += stats.new_tokens
            sums["accepted"] += sum(max(0, length - 1) * count for length, count in enumerate(stats.accepted_lengths))
            sums["prefix_tokens"] += stats.prefix_tokens
            sums["prefix_hits"] += stats.prefix_tokens > 0

    def _seconds_to_wait(self) -> float:
        ended = sum(self._sums[f"finished_{reason}"] for reason in REASONS)
        return max(1.0, self._sums["seconds"] / max(1, ended) / self.slots)
