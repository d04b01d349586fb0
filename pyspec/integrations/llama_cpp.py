"""pyspec's drafters inside llama.cpp, through llama-cpp-python.

    llama = llama_cpp.Llama("model.gguf", logits_all=True)
    pyspec.integrations.llama_cpp.speculate(llama)
    llama("def quicksort(", max_tokens=200)  # the same text, sooner

The same but for near ties: llama.cpp's arithmetic for several tokens is not that for one. It verifies chains, not
trees, so of each tree the likeliest path is taken, as far as it pays.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import torch

from pyspec.acceptance import check_laws
from pyspec.acceptance.exact import ExactAcceptance
from pyspec.controllers.pays import CuttingController
from pyspec.drafters import DRAFTERS, Drafter, drafter_from_name
from pyspec.integrations import require
from pyspec.machine.costs import Costs
from pyspec.machine.running_costs import RunningCosts
from pyspec.runners.verified import Verified
from pyspec.tree import DraftTree

require("llama-cpp-python", "0.3", "0.4")

from llama_cpp.llama_speculative import LlamaDraftModel  # noqa: E402

TREE_NODES = 32  # among which the likeliest path is looked for
SIZES = (1, 2, 4, 8, 16)  # tokens of a call that are timed
TEXT = 32  # tokens before them
REPEATS = 3
OBSERVED_AT_ONCE = 256  # rows of a prompt's logits
SAMPLES, SAMPLED = 64, 4096  # of a model file, and bytes of each


def speculate(llama, drafter: str | Drafter = "merged") -> DraftModel:
    """Gives a llama_cpp.Llama a drafter of ours; its own sampling decides, as without.

    Times a few calls of the model first, which loses its cache.

    Args:
        llama: made with logits_all=True, which its generate needs to verify drafts.
        drafter: as for pyspec.generate; it must choose its drafts, for llama.cpp does not know the law of drawn ones.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not llama._logits_all:
        raise ValueError("llama must be made with logits_all=True: drafts are verified by the logits after each token")
    draft_model = DraftModel(llama, drafter)
    llama.draft_model = draft_model
    return draft_model


class DraftModel(LlamaDraftModel):
    """A drafter of ours as llama-cpp-python calls one: with all tokens so far, once before each call of the model.

    Attributes:
        costs: seconds of a call of the model, by its tokens.
    """

    clock: ClassVar[Callable[[], float]] = staticmethod(time.perf_counter)  # tests put in their own

    def __init__(self, llama, drafter: str | Drafter):
        self._llama = llama
        runner = _Described(llama)
        if isinstance(drafter, str) and drafter in DRAFTERS and not DRAFTERS[drafter].fits(runner):
            raise ValueError(f"drafter must not need a model of pyspec's own, as {drafter!r} does")
        self._shared = drafter_from_name(drafter, runner)
        if self._shared is None or self._shared.proposal != "deterministic":
            raise ValueError(f"drafter must be one that chooses its drafts, got {drafter!r}")
        check_laws(self._shared, ExactAcceptance())
        self.costs = _measure_costs(llama, self.clock)
        running = RunningCosts(self.costs)
        self._controller = CuttingController(lambda: running)
        self._drafter: Drafter | None = None
        self._context: list[int] = []
        self._proposed: DraftTree | None = None
        self._draft_seconds = self._ended = 0.0  # what the last call took, and when it ended

    def __call__(self, input_ids: np.ndarray, /, **kwargs) -> np.ndarray:
        """Drafts after input_ids [n]: tokens [m], as many as pay, perhaps none."""
        start = self.clock()
        context = input_ids.tolist()
        known = len(self._context)
        if self._drafter is None or known > len(context) or context[:known] != self._context:
            self._drafter, self._proposed, known = self._shared.start(context), None, 0
        self._learn(context, known, start - self._ended)
        self._context = context
        tree = DraftTree.chain(context[-1:])
        if self._controller.nodes > 1:
            tree = self._drafter.propose(context, TREE_NODES).likeliest_path()
        (self._proposed,) = self._controller.cut([tree])
        self._ended = self.clock()
        self._draft_seconds = self._ended - start
        return self._proposed.tokens[1:].astype(np.intc)

    def _learn(self, context: Sequence[int], known: int, verify_seconds: float) -> None:
        """Shows the drafter what the model emitted since the last call: its logits after context[known - 1 : -1]."""
        if self._proposed is not None:
            path = range(len(context) - known)
            self._controller.learn([self._proposed], [path], self._draft_seconds, verify_seconds)
        for start in range(max(known - 1, 0), len(context) - 1, OBSERVED_AT_ONCE):
            end = min(start + OBSERVED_AT_ONCE, len(context) - 1)
            chain = DraftTree.chain(context[start:end])
            logits = torch.from_numpy(self._llama.scores[start:end])
            self._drafter.observe(chain, Verified(logits), range(end - start))


class _Described(SimpleNamespace):
    """A model as drafters see it: how many tokens it has, and a name for it with its vocabulary."""

    def __init__(self, llama):
        names = b"".join(llama._model.token_get_text(token).encode() for token in range(llama.n_vocab()))
        described = "".join(f"{name}={value}\n" for name, value in sorted(llama.metadata.items()) if len(value) < 1000)
        digest = hashlib.sha256(described.encode() + names + _sample(Path(llama.model_path))).hexdigest()[:16]
        super().__init__(vocab_size=llama.n_vocab(), fingerprint=f"llama.cpp-{digest}")

    __hash__ = object.__hash__


def _sample(file: Path) -> bytes:
    """Bytes of a model file from places that lie evenly: two fine-tunes are two models."""
    data = np.memmap(file, np.uint8, "r")
    step = -(-len(data) // SAMPLES)
    return b"".join(data[start : start + SAMPLED].tobytes() for start in range(0, len(data), step))


def _measure_costs(llama, clock: Callable[[], float]) -> Costs:
    """Times calls of a few tokens behind some others; the model's cache is lost."""
    text = min(TEXT, llama.n_ctx() // 2)
    sizes = [size for size in SIZES if text + size <= llama.n_ctx()]
    found: dict[int, list[float]] = {size: [] for size in sizes}
    llama.reset()
    llama.eval([1] * text)
    for _ in range(REPEATS + 1):
        for size in sizes:
            llama.n_tokens = text  # eval forgets what is behind
            start = clock()
            llama.eval([1] * size)
            found[size].append(clock() - start)
    llama.reset()
    # the first of each warms up
    return Costs.of_seconds({size: min(times[1:]) for size, times in found.items()})
