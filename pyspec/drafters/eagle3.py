"""Trees from a trained EAGLE-3 head, which reads what the target's layers said of the text. arXiv 2503.01840."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from pyspec.checkpoints.sources import find_source
from pyspec.drafters.heads import HEADS
from pyspec.drafters.heads.eagle3 import Eagle3Head
from pyspec.drafters.heads.eagle3_batch import Asked, HeadBatch
from pyspec.drafters.heads.trained import TrainedHead
from pyspec.drafters.pace import Pace
from pyspec.drafters.shapes import GrowthPolicy, Sapling, StopRule, check_temperature, grow_together
from pyspec.drafters.shapes.by_rule import growth_for
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.drafters.table_drafter import Table, TableDrafter
from pyspec.drafters.tables.guesses import GuessedNodes, Guesses
from pyspec.drafters.tables.lookup import Lookup
from pyspec.drafters.tables.recycling import Recycling
from pyspec.fingerprint import WeightSample
from pyspec.runners import Runner
from pyspec.runners.exclusive import lock_of
from pyspec.runners.verified import Verified
from pyspec.sampling.noise import Noise
from pyspec.sampling.sampler import Sampler
from pyspec.tree import DraftTree


class Eagle3:
    """Grows trees from the laws of an EAGLE-3 head.

    Each level of the trees of a batch is one call of the head. Its keys follow the accepted text: those that it made
    from its own guesses are scratch, and what was accepted is read again with what the target said of it.

    Args:
        head: a folder, or a hub id, with config.json and safetensors (or pytorch_model.bin, read as tensors alone); or
            an Eagle3Head, or another head with its calls. drafter_of_head finds what drafter a folder is for.
        target: the runner to draft for.
        growth: by default the likeliest paths, which acceptance="exact" fits; growth_for finds what fits another rule.
            A policy that draws makes the drafter "sampled".
        tables: what grows in one tree with the head's guesses, learned rates deciding between them; () for the head
            alone. By default Lookup and Recycling where growth is deterministic, else none: others may not be cut.
        weights: dtype of the head's matrices; by default int8 on a CPU, bfloat16 elsewhere.
        taps: the target's layers that it reads, where its config.json is known to name others.
        temperature, top_k, top_p: of the head's laws, see Sampler; a drafter that draws needs a temperature above 0.
        seed: of the draws.

    Raises:
        FileNotFoundError, ValueError: see Eagle3Head.load; or for a target without taps, a policy that draws at
            temperature 0, or tables beside one that draws.
    """

    goes_on = None  # see Drafter
    heads: type[TrainedHead] = Eagle3Head  #: what folders hold
    batches = HeadBatch  #: where they work
    depth = 5  #: levels of a tree by default: each is a call of the head

    def __init__(
        self,
        head: str | Path | TrainedHead,
        target: Runner,
        growth: GrowthPolicy | None = None,
        *,
        tables: Sequence[Table] | None = None,
        weights: torch.dtype | str | None = None,
        taps: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        self.growth = growth_for("exact", self.depth) if growth is None else growth
        self.proposal, self.siblings = self.growth.proposal, self.growth.siblings
        self._sampler = Sampler(temperature, top_k, top_p, seed)
        check_temperature(self.growth, temperature)
        if not hasattr(target, "layers"):
            raise ValueError(
                f"target must be a runner with taps, such as pyspec.load gives, got {type(target).__name__}"
            )
        is_named = isinstance(head, str | Path)
        self.head = self.heads.load(find_source(head), target, weights, taps) if is_named else head
        self.taps = self.head.config.taps
        self._vocab_size, self._context_length = target.vocab_size, target.context_length
        if tables and self.proposal == "sampled":
            raise ValueError(f"tables must be () beside {type(self.growth).__name__}, which draws, got {len(tables)}")
        if tables is None:
            tables = () if self.proposal == "sampled" else [kind(target.vocab_size) for kind in (Lookup, Recycling)]
        merged = [*tables, Guesses(target.vocab_size)] if tables else []
        self._merged = TableDrafter(merged, target.fingerprint) if merged else None
        self.pace = Pace()
        self._batch: HeadBatch | None = None
        self._sequence = -1

    @cached_property
    def fingerprint(self) -> str:
        """Names the head, by its vectors: they are as they were trained, whatever its matrices are kept in."""
        found = vars(self.head).items()
        vectors = [(name, each) for name, each in found if isinstance(each, torch.Tensor) and each.dim() == 1]
        return f"{type(self.head).__name__}-{WeightSample().add(vectors).hexdigest()[:16]}"

    def start(self, prompt: Sequence[int]) -> Eagle3:
        """A drafter for one more sequence of the batch; of a new batch once the last one has begun to read."""
        drafter = copy.copy(self)
        with lock_of(self.head):
            if self._batch is None or self._batch.has_begun:
                self._batch = self.batches(self.head)
            drafter._batch, drafter._sequence = self._batch, self._batch.add()
        if self._merged is not None:
            drafter._merged = self._merged.start(prompt)
        return drafter

    def coupled_to(self, sampler: Sampler) -> Eagle3:
        """This drafter for texts that a sampler draws, see TableDrafter; the head's guesses use its noise too."""
        drafter = copy.copy(self)
        if self._merged is not None:
            drafter._merged = self._merged.coupled_to(sampler)
        return drafter

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; the root alone where the target's context ends."""
        return self.propose_together([self], [context], [budget])[0]

    @staticmethod
    def propose_together(
        drafters: Sequence[Eagle3], contexts: Sequence[Sequence[int]], budgets: Sequence[int]
    ) -> list[DraftTree]:
        """What each of some drafters, which have started from the same one, proposes for its own sequence."""
        longest = drafters[0]._context_length
        rooms = [min(budget, longest - len(context)) for budget, context in zip(budgets, contexts, strict=True)]
        guessed: dict[int, GuessedNodes] = {}  # by place in these lists
        batches: dict[HeadBatch, dict[int, int]] = {}  # of each, places by sequence
        for place, (drafter, context) in enumerate(zip(drafters, contexts, strict=True)):
            if rooms[place] > 1 and drafter._batch.has_read(drafter._sequence, len(context) - 1):
                batches.setdefault(drafter._batch, {})[drafter._sequence] = place
        for batch, places in batches.items():
            places = dict(sorted(places.items()))
            grown = drafters[0]._grow(
                batch,
                {sequence: contexts[place] for sequence, place in places.items()},
                {sequence: rooms[place] for sequence, place in places.items()},
                {sequence: drafters[place].goes_on for sequence, place in places.items()},
            )
            guessed |= zip(places.values(), grown, strict=True)
        return [
            drafter._tree(guessed.get(place), context, room)
            for place, (drafter, context, room) in enumerate(zip(drafters, contexts, rooms, strict=True))
        ]

    def observe(self, tree: DraftTree, verified: Verified, path: Sequence[int]) -> None:
        """Keeps what the target's layers said of the accepted path; tables learn from all nodes."""
        path = list(path)
        taps = verified.taps if len(path) == len(tree) else verified.taps[path]
        self._batch.take(self._sequence, tree.tokens[path].tolist(), taps)
        if self._merged is not None:
            self._merged.observe(tree, verified, path)

    def _tree(self, nodes: GuessedNodes | None, context: Sequence[int], budget: int) -> DraftTree:
        """The tree of at most budget nodes that grows from the head's and the tables' guesses; without any a root."""
        if budget <= 1:
            return DraftTree.chain(context[-1:])
        if self._merged is None:
            return DraftTree.chain(context[-1:]) if nodes is None else DraftTree(*nodes[:2], nodes.q, nodes.chances)
        self._merged.tables[-1].hold(GuessedNodes.root(context[-1]) if nodes is None else nodes, context)
        return self._merged.propose(context, budget)

    def _grow(
        self,
        batch: HeadBatch,
        contexts: Mapping[int, Sequence[int]],
        budgets: Mapping[int, int],
        stops: Mapping[int, StopRule | None],
    ) -> list[GuessedNodes]:
        """The trees of a batch's sequences, which ascend, level by level."""
        start, growth, least = time.perf_counter(), self.growth, self.pace.least / len(contexts)  # a level is for all
        found = None
        if isinstance(growth, TopPaths) and self._sampler.is_plain and not any(stops.values()):
            found = batch.grow(contexts, budgets, growth.width, growth.depth, least)
        if found is None:
            found = self._grow_in_python(batch, contexts, budgets, least, stops)
        self.pace.took_level((time.perf_counter() - start) / found[1])
        return found[0]

    def _grow_in_python(
        self,
        batch: HeadBatch,
        contexts: Mapping[int, Sequence[int]],
        budgets: Mapping[int, int],
        least: float,
        stops: Mapping[int, StopRule | None],
    ) -> tuple[list[GuessedNodes], int]:
        """Trees of any growth, on any device; and how many levels there were."""
        batch.read(contexts)
        laws, levels = {sequence: batch.laws(sequence, self._sampler) for sequence in contexts}, 0
        # the root may be none of the head's tokens
        saplings = {
            sequence: Sapling(laws[sequence], 0, budget, least, stops[sequence]) for sequence, budget in budgets.items()
        }
        noises = {
            sequence: Noise(self._sampler.seed, len(context), Noise.DRAFTS) for sequence, context in contexts.items()
        }

        def prepare(asked: Mapping[int, Sequence[int]]) -> None:
            nonlocal levels
            levels += 1
            batch.guess(
                {
                    sequence: (laws[sequence], Asked(saplings[sequence].tokens, saplings[sequence].parents, nodes))
                    for sequence, nodes in asked.items()
                }
            )

        grown = grow_together(self.growth, saplings, noises, prepare)
        return [self._of_target(grown[sequence], context[-1]) for sequence, context in contexts.items()], levels

    def _of_target(self, tree: DraftTree, root: int) -> GuessedNodes:
        """A tree of the head's tokens in the target's."""
        tokens = self.head.target_tokens(tree.tokens)
        tokens[0] = root
        q = None
        if tree.q is not None:
            q = np.zeros((len(tree), self._vocab_size))
            q[:, self.head.target_tokens(np.arange(tree.q.shape[1]))] = tree.q
        return GuessedNodes(tokens, tree.parents, tree.chances, q)


HEADS.register("eagle3", Eagle3, Eagle3Head.title)
