"""TableDrafter: a tree grown from tables, and what verified nodes teach."""

from __future__ import annotations

import copy
import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyspec.arguments import read_integer, read_tokens
from pyspec.drafters import NamedDrafter, saving
from pyspec.host import host
from pyspec.runners.verified import Verified
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.runners import Runner

LARGEST_BUDGET = 4096
LONGEST_MATCH = 32  # tokens that a source looks back on
SMOOTHING = 16.0  # trials that a prior is worth

# Tables are shared by the sequences of several threads, and by several drafters. One lock for all is no loss: the work
# under it is short, and Python would let one thread at a time do it anyway.
_tables = threading.RLock()


def _holding_tables(call: Callable) -> Callable:
    @functools.wraps(call)
    def holding(*args, **kwargs):
        with _tables:
            return call(*args, **kwargs)

    return holding


class Table:
    """The base of what trees grow from: sources of guesses, and how they learn. This one has nothing to learn.

    Attributes:
        name: what the names of its columns in a saved file begin with.
        sources: structures of pyspec.host, asked in this order at every node.
        needs_logits: whether `observe` is of any use.
        keeps_texts: whether `read_text` is.

    Args:
        vocab_size: tokens of the target.
    """

    name: str
    sources: list
    needs_logits = False
    keeps_texts = False

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def start(self) -> Table:
        """The table for one new sequence; what sequences share stays shared."""
        return self

    def read(self, context: Sequence[int], first: int) -> None:
        """Reads the sequence's new tokens, from `first` on."""

    def prepare(self, context: Sequence[int]) -> None:
        """Gets ready for a tree that is about to grow below the last token."""

    def observe(
        self,
        tokens: np.ndarray,
        parents: np.ndarray,
        before: list[int],
        top_tokens: np.ndarray,
        top_logits: np.ndarray,
    ) -> None:
        """Learns the target's 8 best tokens [T, 8] after every node of a tree, which lies behind `before`."""

    def read_text(self, tokens: Sequence[int]) -> None:
        """Reads a text of no sequence, to draft from."""

    def saved(self) -> saving.Arrays:
        """The arrays to save, by name; none where nothing was learned."""
        return {}

    def load(self, saved: saving.Arrays) -> None:
        """Takes over what was saved, checked against `layout`."""

    def layout(self) -> dict[str, saving.Column]:
        """The form that the saved columns must have."""
        return {}


class ColumnTable(Table):
    """A table whose one source keeps the columns of `layout`."""

    def saved(self) -> saving.Arrays:
        return dict(zip(self.layout(), self.sources[0].saved(), strict=True))

    def load(self, saved: saving.Arrays) -> None:
        self.sources[0].load(**saved)


class TableDrafter:
    """A drafter whose trees grow best-first from tables.

    A table's sources say what may follow a path; the chance that the target agrees is learned from every verified edge,
    for each kind of offer, and shared by all sequences. The tree takes the node most likely to be accepted next, until
    the budget is used, so a sure guess makes it deep and an open question makes it wide. Every node asks every table:
    one goes on below what another found, and a token of several is one node, likelier than of either alone.

    Args:
        tables: what is drafted from, of different kinds and one vocabulary; several drafters may share them.
        fingerprint: names the target; a file saved with another one is refused.

    Raises:
        ValueError: for tables of several vocabularies, two of one kind, or none.
        TypeError: for what is no table.
    """

    proposal = "deterministic"

    def __init__(self, tables: Sequence[Table], fingerprint: str = ""):
        _check_tables(tables)
        self.vocab_size = tables[0].vocab_size
        self.fingerprint = fingerprint
        self.tables = list(tables)
        priors = [source.priors() for source in self._sources()]
        # greedy texts and drawn ones say different things about the same kind of offer
        self._greedy, self._drawn = (host().Estimates(priors, SMOOTHING) for _ in range(2))
        self._noise = None
        self._read = 0  # tokens of the context seen so far
        # the last tree, the cell of each of its edges, and the tokens before its root
        self._proposed: tuple[DraftTree | None, np.ndarray | None, list[int]] = (None, None, [])

    @_holding_tables
    def start(self, prompt: Sequence[int]) -> TableDrafter:
        """A drafter for one new sequence; what was learned from others is shared with it.

        Raises:
            ValueError: if a token is outside the vocabulary.
            TypeError: if prompt is no list of token ids.
        """
        prompt = read_tokens("prompt", prompt)
        drafter = copy.copy(self)
        drafter.tables = [table.start() for table in self.tables]
        drafter._read, drafter._proposed = 0, (None, None, [])
        drafter._read_context(prompt)
        return drafter

    def coupled_to(self, sampler: Sampler) -> TableDrafter:
        """This drafter for texts that a sampler draws: where a source knows shares, the sampler's own noise tells which
        of its tokens the draw is likely to take. The draw depends on no draft, so the text is the same.
        """
        drafter = copy.copy(self)
        greedy = sampler.temperature == 0
        drafter._noise = None if greedy else host().SamplerNoise(sampler.seed, sampler.temperature)
        return drafter

    @_holding_tables
    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; fewer where nothing more is known.

        Args:
            context: all tokens so far; it only ever grows.
            budget: nodes, root included, in [1, 4096].

        Raises:
            ValueError: if the context is empty, shrank or has a token outside the vocabulary, or for a bad budget.
            TypeError: if budget is not an integer.
        """
        budget = read_integer("budget", budget)
        if not 1 <= budget <= LARGEST_BUDGET:
            raise ValueError(f"budget must be in [1, {LARGEST_BUDGET}], got {budget}")
        if not len(context):
            raise ValueError("context must have at least one token, got none")
        self._read_context(context)
        recent = list(context[-LONGEST_MATCH:])
        for table in self.tables:
            table.prepare(context)
        estimates = self._greedy if self._noise is None else self._drawn
        tokens, parents, cells, chances = host().grow(
            self._sources(), estimates, recent, budget, self._noise, len(context)
        )
        tree = DraftTree(tokens, parents, chances=chances)
        self._proposed = (tree, cells, recent[:-1])
        return tree

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Learns from what the target emits after every node of a tree, accepted or not.

        Args:
            tree: the last proposed tree, its first nodes, or a chain of prompt tokens.
            verified: of the target, with logits [T, vocab_size].
            path: not needed: a rejected node teaches as much as an accepted one.

        Raises:
            ValueError: if the shape of logits or a token does not fit; nothing is learned then.
        """
        shape = verified.logits.shape
        if shape != (len(tree), self.vocab_size):
            raise ValueError(f"logits must be [{len(tree)}, {self.vocab_size}], got {list(shape)}")
        proposed, cells, before = self._proposed
        is_proposed = proposed is not None and _begins_with(proposed, tree)
        readers = [table for table in self.tables if table.needs_logits]
        learns_rates = is_proposed and self._noise is None
        if not learns_rates and not readers:
            return
        tokens, (lowest, highest) = tree.tokens, tree.token_range
        if lowest < 0 or highest >= self.vocab_size:
            place = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            raise ValueError(f"tree.tokens[{place}] is outside the vocabulary")
        top_tokens, top_logits = verified.top_tokens()
        with _tables:
            for table in readers:
                table.observe(tokens, tree.parents, before if is_proposed else [], top_tokens, top_logits)
            if learns_rates:
                # all of the tree: a node that was left out is still right or wrong where its parent was verified
                self._greedy.learn(proposed.tokens, proposed.parents, cells, top_tokens)

    @_holding_tables
    def read_text(self, tokens: Sequence[int]) -> None:
        """Reads a text to draft from, for all sequences that share this drafter's tables: say, the documents that
        answers will quote.

        Raises:
            ValueError: if a token is outside the vocabulary, or nothing here keeps texts.
            TypeError: if tokens is no list of token ids.
        """
        readers = [table for table in self.tables if table.keeps_texts]
        if not readers:
            names = " and ".join(type(table).__name__ for table in self.tables)
            raise ValueError(f"{names} keeps no texts: draft from a table that does, say Suffix or Aded")
        tokens = self._checked(tokens, "text")
        for table in readers:
            table.read_text(tokens)

    @_holding_tables
    def save(self, path: str | os.PathLike) -> None:
        """Writes the tables as a NumPy archive; an existing file is replaced whole."""
        saving.save(
            path,
            self._identity(),
            {table.name + name: array for table in self.tables for name, array in table.saved().items()},
        )

    @_holding_tables
    def load(self, path: str | os.PathLike) -> None:
        """Takes over saved tables, for all sequences that share this one's.

        Raises:
            OSError: if the file cannot be opened.
            ValueError: if it is damaged, or of another model or vocabulary; nothing changes then.
        """
        layouts = {table.name + name: column for table in self.tables for name, column in table.layout().items()}
        saved = saving.load(path, self._identity(), layouts)
        for table in self.tables:
            table.load({name: saved[table.name + name] for name in table.layout()})

    def _identity(self) -> dict[str, int | str]:
        return {"vocab_size": self.vocab_size, "fingerprint": self.fingerprint}

    def _sources(self) -> list:
        return [source for table in self.tables for source in table.sources]

    def _read_context(self, context: Sequence[int]) -> None:
        if len(context) < self._read:
            raise ValueError(f"context only grows, but it has {len(context)} tokens after {self._read}")
        new = self._checked(context[self._read :], "context")
        if not new:
            return
        proposed, cells, _ = self._proposed
        if self._noise is not None and proposed is not None:
            self._drawn.learn_emitted(proposed.tokens, proposed.parents, cells, new)
            self._proposed = (None, None, [])
        for table in self.tables:
            table.read(context, self._read)
        self._read = len(context)

    def _checked(self, tokens: Sequence[int], name: str) -> list[int]:
        tokens = read_tokens(name, tokens)
        if tokens and not (min(tokens) >= 0 and max(tokens) < self.vocab_size):
            raise ValueError(f"{name} tokens must be in [0, {self.vocab_size}), got {min(tokens)} to {max(tokens)}")
        return tokens


def _begins_with(tree: DraftTree, other: DraftTree) -> bool:
    if other is tree:
        return True
    nodes = len(other)
    return np.array_equal(tree.tokens[:nodes], other.tokens) and np.array_equal(tree.parents[:nodes], other.parents)


def of_tables(*kinds: type[Table]) -> NamedDrafter:
    """The drafter whose trees grow from new tables of these kinds."""

    def make(runner: Runner) -> TableDrafter:
        return TableDrafter([kind(runner.vocab_size) for kind in kinds], runner.fingerprint)

    return NamedDrafter(make, learns=any(kind.saved is not Table.saved for kind in kinds))


def _check_tables(tables: Sequence[Table]) -> None:
    if not tables:
        raise ValueError("tables must have at least one to draft from, got none")
    for table in tables:
        if not isinstance(table, Table):
            raise TypeError(f"tables must be those of pyspec.drafters.tables or like them, got {type(table).__name__}")
        if table.vocab_size != tables[0].vocab_size:
            raise ValueError(
                f"tables must have the vocabulary of {tables[0].vocab_size} tokens, got {table.vocab_size}"
            )
    kinds = [type(table).__name__ for table in tables]
    if len({table.name for table in tables}) < len(tables):
        raise ValueError(f"tables must be of different kinds, got {kinds}")
