"""A model as its own drafter: some of its layers guess what all of them will say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pyspec.drafters import DRAFTERS, NamedDrafter
from pyspec.drafters.model import ModelDrafter
from pyspec.drafters.shapes import GrowthPolicy
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.machine import store
from pyspec.runners import Runner
from pyspec.runners.exclusive import exclusive_use
from pyspec.tree import DraftTree

SEARCH_PROMPTS = (
    "Explain in a few sentences how a bicycle stays upright.",
    "Write a Python function that counts the words of a text, with a test.",
    "Translate into German: The weather was fine, so we walked along the river until evening.",
)
SEARCH_TOKENS = 32  # that the model adds to each prompt of the search
TRIED = 4  # layers that a step of the search tries to leave out
LEAST_AGREED = 0.3  # where the search ends: drafts that are right less often do not pay
DEEPEST = 6  # drafts of a chain that the search thinks of


class LayerSkipDrafter(ModelDrafter):
    """Drafts with the target's own weights and keys, leaving out some of its layers.

    After Zhang et al., "Draft & Verify: Lossless Large Language Model Acceleration via Self-Speculative Decoding",
    arXiv 2309.08168: nothing is trained, and nothing is kept beside the target's own state. Growth, temperature, top_k,
    top_p and seed as in ModelDrafter; a policy that draws makes the drafter "sampled".

    Args:
        model: the target, which is also the draft; a runner that has `draft`, over a dense cache.
        skipped: the layers to leave out; None takes those of find_skipped_layers.

    Raises:
        ValueError: if the model cannot run some of its layers, or would have none left.
    """

    needs_dense_cache = True

    def __init__(
        self,
        model: Runner,
        skipped: Sequence[int] | None = None,
        growth: GrowthPolicy | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ):
        _check_model(model)
        skipped = find_skipped_layers(model) if skipped is None else skipped
        self.layers = _others(model, skipped)
        growth = TopPaths(width=3, depth=4) if growth is None else growth
        self._set_up(model, growth, temperature, top_k, top_p, seed)

    @property
    def fingerprint(self) -> str:
        """Names the model and the layers that are left of it."""
        return f"{super().fingerprint} {self.layers}"

    def propose(self, context: Sequence[int], budget: int) -> DraftTree:
        """A tree of at most budget nodes below context[-1]; the root alone where the model's slots end."""
        try:
            return super().propose(context, budget)
        except _NoRoom:
            return DraftTree.chain(context[-1:])

    def _new_batch(self) -> _OwnBatch:
        return _OwnBatch(self._draft, self.layers)


class _NoRoom(Exception):
    """There are no slots for a tree of drafts."""


class _OwnBatch:
    """The target's batch, which holds the texts already."""

    def __init__(self, runner: Runner, layers: list[int]):
        self.runner, self._layers = runner, layers
        self.capacity = 0  # 1 once drafting has begun
        self._sequences = 0

    def add(self, prompt: Sequence[int]) -> int:
        """The number of a new sequence."""
        self._sequences += 1
        return self._sequences - 1

    def logits(self, sequence: int, context: Sequence[int], tokens: list[int], parents: list[int]) -> torch.Tensor:
        """Logits [T, V] of a tree below context, whose last token is the root."""
        self.capacity = 1
        lengths = self.runner.lengths()
        sequence -= self._sequences - len(lengths)  # those of a batch that never drafted came before
        if sequence < 0 or lengths[sequence] != len(context) - 1:
            raise ValueError(
                f"context must be a text of the model's batch and one token, got {len(context)} tokens where the model "
                f"has {lengths}: layers are skipped within a call of generate only"
            )
        if self.runner.room(sequence) < len(tokens):
            raise _NoRoom
        return self.runner.draft(sequence, DraftTree(tokens, parents), self._layers)


def find_skipped_layers(
    model: Runner,
    prompts: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """The layers that a model can best do without when it drafts for itself.

    They are searched for once and kept in the user's cache folder; the model's batch is lost then. The search leaves
    out one layer after another, each time the one without which the others most often have the model's own best token
    on the texts that it writes after the prompts, and takes the set for which a chain of drafts promises most tokens
    by weights read. That may be less than plain decoding gives: then the model needs its layers.

    Args:
        prompts: token ids; by default a few of pyspec's own. Given ones are searched with anew.
        progress: called with (sets tried, sets).

    Raises:
        ValueError: if the model cannot run some of its layers, or has no tokenizer for the default prompts.
    """
    from pyspec.generate import generate

    _check_model(model)
    key = store.key(model)
    if prompts is None:
        kept = store.read("skipped_layers", key)
        if _is_set(kept, model.config.layers):
            return kept
        if model.tokenizer is None:
            raise ValueError("prompts must be given for a model without a tokenizer")
        chat = model.tokenizer.chat if model.tokenizer.chat_template is not None else None
        prompts = [
            model.tokenizer.encode(text) if chat is None else chat([{"role": "user", "content": text}])
            for text in SEARCH_PROMPTS
        ]
    texts = generate(model, list(map(list, prompts)), drafter=None, max_new_tokens=SEARCH_TOKENS).tokens
    with exclusive_use(model):
        agreement = _Agreement(model, prompts, texts)
        found = _search(agreement, model.config.layers, _head_in_layers(model.config), progress)
    store.keep("skipped_layers", key, found)
    return found


class _Agreement:
    """How often some of the layers have the model's own best token, on the texts that it wrote after prompts."""

    def __init__(self, model: Runner, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]):
        self._model = model
        self._chains = [DraftTree.chain([*prompt, *text]) for prompt, text in zip(prompts, texts, strict=True)]
        self._firsts = [len(prompt) - 1 for prompt in prompts]
        # all tokens are drafts behind the first one, which is its own text
        model.prefill([chain.tokens[:1].tolist() for chain in self._chains], capacity=1 + max(map(len, self._chains)))
        self._best = [logits.argmax(1) for logits in self._logits(range(model.config.layers))]

    def __call__(self, layers: Sequence[int]) -> float:
        same = torch.cat([a.argmax(1) == b for a, b in zip(self._logits(layers), self._best, strict=True)])
        return float(same.float().mean())

    def _logits(self, layers: Sequence[int]) -> list[torch.Tensor]:
        rows = [self._model.draft(index, chain, list(layers)) for index, chain in enumerate(self._chains)]
        return [logits[first:] for logits, first in zip(rows, self._firsts, strict=True)]


def _search(agreement: Callable[[Sequence[int]], float], layers: int, head: float, progress) -> list[int]:
    """The skipped layers; the head, which every draft reads, is as large as `head` layers."""
    total, tried = layers + TRIED * (layers - 1), 0

    def of(skipped: Sequence[int]) -> float:
        nonlocal tried
        tried += 1
        if progress is not None:
            progress(min(tried, total), total)
        return agreement([layer for layer in range(layers) if layer not in skipped])

    needless = sorted(range(layers), key=lambda layer: -of([layer])) if layers > 1 else []
    skipped: list[int] = []
    best, most = [], 0.0
    while len(skipped) < layers - 1:
        candidates = [layer for layer in needless if layer not in skipped][:TRIED]
        agreed, layer = max((of([*skipped, layer]), -layer) for layer in candidates)
        skipped.append(-layer)
        promised = _promise(agreed, 1 - len(skipped) / (layers + head))
        if promised > most:
            best, most = sorted(skipped), promised
        if agreed < LEAST_AGREED:
            break
    if progress is not None:
        progress(total, total)
    return best


def _head_in_layers(config) -> float:
    qkv, mixed = (config.heads + 2 * config.kv_heads) * config.head_dim, config.heads * config.head_dim
    return config.vocab_size / (qkv + mixed + 3 * config.intermediate_size)


def _promise(agreed: float, cost: float) -> float:
    """Tokens by target steps of the best chain of drafts that are right with a chance and cost a part of a step."""
    return max(
        sum(agreed**depth for depth in range(length + 1)) / (1 + length * cost) for length in range(1, DEEPEST + 1)
    )


def _check_model(model: Runner) -> None:
    if not hasattr(model, "draft"):
        raise ValueError(f"model must be able to run some of its layers, got a {type(model).__name__}")


def _is_set(skipped: object, layers: int) -> bool:
    return isinstance(skipped, list) and set(skipped) < set(range(layers))


def _others(model: Runner, skipped: Sequence[int]) -> list[int]:
    layers = model.config.layers
    if not _is_set(list(skipped), layers):
        raise ValueError(f"skipped must be some of the model's {layers} layers, but not all, got {list(skipped)}")
    return [layer for layer in range(layers) if layer not in skipped]


DRAFTERS.register(
    "layer_skip",
    NamedDrafter(LayerSkipDrafter, fits=lambda runner: hasattr(runner, "draft"), prepare=find_skipped_layers),
    "the target itself, without some of its layers",
)
