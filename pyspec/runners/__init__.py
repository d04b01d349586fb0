"""Runners: a model with its state, behind three calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from pyspec.tree import DraftTree

if TYPE_CHECKING:
    from pyspec.caches.prefixes import Prefixes
    from pyspec.ops.linear import LinearWeight
    from pyspec.runners.verified import Verified

__all__ = ["ExtendedRunner", "Runner"]


class Runner(Protocol):
    """A target model with its committed state, for a batch of sequences that each have their own length.

    The three calls mean the same for a KV cache and for a recurrent state: `prefill` starts a batch, `verify` reads the
    committed state, `commit` extends it. A prompt's place in the batch is its slot; verify and commit take and give
    dicts by slot, and whoever is in none of them sits out. What only some runners do is in ExtendedRunner.
    """

    vocab_size: int
    context_length: int  #: positions the model was made for
    device: torch.device
    dtype: torch.dtype
    fingerprint: str  #: names shape, vocabulary and a sample of the weights; saved caches and tables carry it
    tokenizer: object | None  #: pyspec.checkpoints.tokenizer.Tokenizer, or None where the source has none
    eos_tokens: frozenset[int]

    def prefill(
        self,
        tokens: Sequence[Sequence[int]],
        *,
        capacity: int | None = None,
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
        taps: Sequence[int] = (),
    ) -> list[torch.Tensor]:
        """Starts a new batch from its prompts; returns the [V] fp32 logits after each prompt.

        capacity is the number of cache slots a sequence will need (prompt, new tokens and one tree).
        observe is called with (slot, chain of prompt tokens, what is verified of it) as chunks are read.
        taps are layers, ascending, whose residual stream is to be in `taps` of all that is verified of this batch: what
        layer i takes in, before it norms it; by the number of layers, what the last norm takes in; and by the next
        number what it gives. The logits have the same bits with them and without.
        """
        ...

    def verify(self, trees: Mapping[int, DraftTree]) -> dict[int, Verified]:
        """What the model says after every node of the trees, by slot.

        The committed state is read, not changed: calling it twice gives the same logits.
        """
        ...

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Makes paths of the last verified trees (node indices from the root, root included) state, by slot."""
        ...

    def lengths(self) -> list[int]:
        """Committed tokens of each slot."""
        ...

    def fork(self) -> Runner:
        """A runner on the same weights with a batch of its own, for another thread or for a callback."""
        ...


class ExtendedRunner(Runner, Protocol):
    """What a runner may do beside; whoever needs one of these asks whether the runner has it.

    Attributes:
        takes_quantised_cache: whether prefill also takes cache, settings of a quantised one or None for a dense one;
            save_cache and load_cache come with it.
        weight_dtype: of the weights, or the name of their format, where it is not that of the activations.
        layers, hidden_size: of the model, which trained draft heads are made for.
        head: the laid out matrix that makes logits; embed(tokens) gives the [R, H] fp32 that layers take in.
        keeps_tree_keys: whether verify takes the later nodes of a tree whose first it has verified since the last
            commit, see DraftTree.later; commit takes paths of the whole tree then.
        clock: seconds like those of time.perf_counter, by which calls are timed; a simulated runner's own.
        prefixes: what is kept of texts by keep_prefixes, a pyspec.caches.prefixes.Prefixes.
        piece_end: tokens of a block whose end no piece of a text should reach behind, or it is not kept; None where it
            may.
    """

    takes_quantised_cache: bool
    weight_dtype: torch.dtype | str
    layers: int
    hidden_size: int
    head: LinearWeight
    keeps_tree_keys: bool
    clock: Callable[[], float]
    prefixes: Prefixes
    piece_end: int | None

    def open(self, slots: int, *, capacity: int | None = None, taps: Sequence[int] = (), cache=None) -> None:
        """Starts a batch of empty slots, for texts that come and go; capacity, taps and cache as in prefill.

        A text comes with `begin`, is committed but for its last token with `read`, and goes on with verify and commit.
        """
        ...

    def begin(self, slot: int, tokens: Sequence[int]) -> int:
        """Empties a slot for a text, all but the longest known prefix; returns the tokens that are committed then."""
        ...

    def read(
        self,
        pieces: Mapping[int, Sequence[int]],
        observe: Callable[[int, DraftTree, Verified], None] | None = None,
    ) -> None:
        """Commits the next tokens of some slots' texts; observe as in prefill."""
        ...

    def keep_prefixes(self, memory: int) -> None:
        """Keeps beginnings of texts from now on, within so many bytes; 0 keeps none, and frees what was kept."""
        ...

    def keep(self, slot: int, tokens: Sequence[int]) -> None:
        """Keeps what is committed of a slot's text, tokens, for others."""
        ...

    def warm(self, capacity: int | None = None, sequences: int = 1) -> None:
        """Compiles and captures what batches of this size need on a GPU; the batch is lost."""
        ...

    def draft(self, slot: int, tree: DraftTree, layers: Sequence[int]) -> torch.Tensor:
        """Logits [T, V] fp32 of a tree's nodes by some of the layers, over the keys that all layers committed."""
        ...

    def room(self, slot: int) -> int:
        """Nodes of the largest tree that fits behind a slot's sequence."""
        ...

    def save_cache(self, path: str | Path) -> None:
        """Writes what is committed over a quantised cache to a file."""
        ...

    def load_cache(self, path: str | Path, *, capacity: int | None = None) -> None:
        """Starts a new batch from what `save_cache` wrote."""
        ...
