"""Where a head works: a cache for some sequences, and the calls of the head that are recorded for it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor

from pyspec.caches.dense import DenseCache, slots_for
from pyspec.host import compiled
from pyspec.runners.replay import Replays, Rows, Step, TapeRecorder
from pyspec.runners.tape import run_address

__all__ = ["HeadRoom"]

# What a call takes in for its rows, and what it tells: true rows are made of the target's taps, guessed ones of what
# the head gave before; a text that is read is told nothing of but its end. END and GUESS are HeadCalls' numbers.
END, GUESS, READ = 0, 1, 2
WORDS = 2  # of ancestor bits, in calls that the host makes: csrc/host/head_round.h grows trees with at most 64 guesses


class HeadRoom:
    """A head's cache, and what is recorded for it: it outlives a batch, and serves the next one of so many sequences.

    Args:
        head: an Eagle3Head, or another head with its calls.
        sequences: of the batch.
        slots: of each, at least.
    """

    def __init__(self, head, sequences: int, slots: int):
        shape, slots = head.config.layers, slots_for(slots)
        self.sequences, self._head = sequences, head
        size = (shape.layers, sequences, shape.kv_heads, slots, shape.head_dim)
        self.cache = DenseCache(*size, head.dtype, head.device, shape.ropes(slots, head.device))
        self._replays = Replays(self.cache, TapeRecorder())  # on a GPU, launch by launch
        kinds = (END, GUESS, READ)
        self._steps = [Step(partial(self._take_in, kind), partial(self._call, kind), (kind,)) for kind in kinds]
        self._inputs: dict[tuple[int, int], tuple[Tensor, ...]] = {}  # by kind and rows: all, and the parts of it
        self._given: Mapping[int, Tensor] = {}  # by sequence, taps or hidden rows of the call that is made

    @cached_property
    def _calls(self):
        """What the host has of recorded calls."""
        tokens, width = self._head.tokens, self._head.config.layers.hidden_size
        return compiled().HeadCalls(self.sequences, width, run_address(), [] if tokens is None else tokens.tolist())

    @property
    def is_recorded(self) -> bool:
        """Whether the host may make the calls of a round, one recorded call after another."""
        return self._head.embeds_by_op and self._replays.are_tapes and compiled() is not None

    def round(self, width: int, depth: int, least: float):
        """A round of the host, see csrc/host/head_round.h, to plant trees in and to `play`."""
        return compiled().HeadRound(self._calls, width, depth, least)

    def play(self, round) -> None:
        """Grows all trees of a round; calls that are new are recorded on the way."""
        while missing := round.run(self._replays.arena):
            self._record(*missing)

    def run(self, kind: int, trees: Mapping, given: Mapping[int, Tensor], advances: Collection[int] = ()) -> Rows:
        """What the head says of the rows of some trees, by sequence in ascending order, in `taps`.

        Those are of READ nothing of use, else the [R, H] that the next guess takes in and Eagle3Head.guesses.
        """
        self._given = given
        return self._replays.run(self._steps[kind], trees, advances)

    @torch.inference_mode()
    def _record(self, kind: int, rows: int) -> None:
        """Hands a call for so many rows to the host, which writes to what it reads."""
        self._given = {}  # which the host writes there
        numbers, replay = self._replays.tape(self._steps[kind], rows, max(WORDS, (rows + 31) // 32))
        names = ("tokens", "positions", "slots", "row_sequences", "ancestor_bits", "starts", "prefix_lens")
        arrays = {name: getattr(numbers, name).numpy() for name in names}
        _, given, _, *statistics = replay.tape.results
        names = ("rows", "given", "top_tokens", "top_logits", "log_sum_exp")
        parts = (self._parts(kind, rows)[2], given, *statistics)
        arrays |= {name: part.numpy() for name, part in zip(names, parts, strict=True)}
        self._calls.add(kind, rows, arrays, replay.tape.handle, (numbers, replay))

    def _take_in(self, kind: int, tokens: Tensor) -> Tensor:
        """Puts what a call takes in where it reads it: the same tensor for a kind and number of rows."""
        count = len(tokens)
        inputs, embedded, rows = self._parts(kind, count)
        if not self._head.embeds_by_op:
            embedded.copy_(self._head.embed(tokens))
        given = list(self._given.values())
        if len(given) == 1 and len(given[0]) == count:
            rows.copy_(given[0])
        else:  # on a GPU all sequences are padded to one number of rows
            is_padded, first = sum(map(len, given)) < count, 0
            for sequence, part in self._given.items():
                first = count // self.sequences * sequence if is_padded else first
                rows[first : first + len(part)] = part
                first += len(part)
        return inputs

    def _parts(self, kind: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """What a call reads: all of it, embedded rows where they are no op's, and taps or hidden rows."""
        if (kind, count) not in self._inputs:
            config, width = self._head.config, self._head.config.layers.hidden_size
            shape = (self._head.given_width,) if kind == GUESS else (len(config.taps), config.target_hidden_size)
            sizes = [0 if self._head.embeds_by_op else count * width, count * torch.Size(shape).numel()]
            inputs = torch.zeros(sum(sizes), device=self._head.device)
            embedded, rows = inputs.split(sizes)
            self._inputs[kind, count] = inputs, embedded.view(-1, width), rows.view(count, *shape)
        return self._inputs[kind, count]

    def _call(self, kind: int, inputs: Tensor, cache, numbers) -> list[Tensor]:
        head, (_, embedded, rows) = self._head, self._parts(kind, len(numbers.tokens))
        embedded = head.embed(numbers.tokens) if head.embeds_by_op else embedded
        hidden = rows if kind == GUESS else head.joined(rows)
        normed, given = head.forward(embedded, hidden, cache, numbers)
        return [normed] if kind == READ else [normed, given, *head.guesses(normed)]
