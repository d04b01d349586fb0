"""What the training of every draft head shares: the target, the loss, and the loop with its checkpoints and its curve.

A head learns the target's laws, not its texts: the law after a token is made anew from the target's last hidden row,
over those tokens alone that the head can guess.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.data_files import Batch, DraftData
from training.losses import CHUNK, Laws, distil

__all__ = [
    "Head",
    "Laws",
    "Recipe",
    "Run",
    "Target",
    "chains_of",
    "distil",
    "fast_dtype",
    "learn",
    "loss_of",
    "measure",
    "noisy",
]

CHECKPOINT = "checkpoint.pt"
MEASURED = 8  # batches of held-out texts at a point of the curve


@dataclass(frozen=True)
class Recipe:
    """How a head is trained. Changing any of it starts anew.

    Attributes:
        steps: of the optimizer.
        tokens: of texts in a step, about.
        depth: guesses in a row that are learned; a guess weighs 0.8 times the one before it.
        vocabulary: tokens that the head can guess.
        share: of the chains of guesses that go on behind the first; all do in the measurement.
        noise: standard deviation of what is added to a feature, by the feature's root mean square.
        frozen: share of the steps before the matrix of logits learns too.
        every: steps between two checkpoints, which are also the points of the curve.
        divergence: of guesses from laws, see training.losses.
        hybrid: share of the steps before it becomes the likelihood-based hybrid; 1 for never.
    """

    steps: int = 2000
    tokens: int = 2048
    depth: int = 4
    vocabulary: int = 8192
    share: float = 0.3
    noise: float = 0.05
    frozen: float = 2 / 3
    divergence: str = "kl"
    hybrid: float = 0.8
    warmup: int = 50
    learning_rate: float = 2e-3
    last_rate: float = 1e-5
    weight_decay: float = 0.01
    seed: int = 0
    every: int = 100

    def rate(self, step: int) -> float:
        """Up to the learning rate in a line, then down along a cosine."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.last_rate + (self.learning_rate - self.last_rate) * (1 + math.cos(math.pi * done)) / 2


class Target:
    """What heads take from the model that they draft for.

    Args:
        runner: a native one with fp32 weights, such as pyspec.load gives.
        tokens: [Vd] int64 ascending, what a head can guess.

    Raises:
        ValueError: the model's last norm is not a root mean square's.
    """

    def __init__(self, runner, tokens: Tensor):
        self.config, self.tokens, self._runner = runner.config, tokens, runner
        if self.config.centred:
            raise ValueError(f"target must norm by root mean squares, {self.config.architecture} does not")
        named = runner.weights.named(self.config)
        self._logits = named.get("lm_head.weight", named["model.embed_tokens.weight"]).float()
        self.logit_rows = self._logits[tokens]  # [Vd, H]
        self.norm = runner.weights.last_scale.float()  # [H], before the logits
        self._named = named

    def layer(self, index: int) -> dict[str, Tensor]:
        """The fp32 tensors of a layer by their names in it."""
        prefix = f"model.layers.{index}."
        named = {name.removeprefix(prefix): values for name, values in self._named.items() if name.startswith(prefix)}
        return {name: values.float() for name, values in named.items()}

    def embed(self, tokens: Tensor) -> Tensor:
        """[R, H] fp32 of tokens [R]."""
        with torch.inference_mode():
            rows = self._runner.embed(tokens)
        return rows.clone()  # a tensor that gradients may pass by

    def laws(self, residual: Tensor, dtype: torch.dtype) -> Laws:
        """The laws over `tokens` of what the target's last norm took in, [R, H]."""
        rows, parts = self.logit_rows.to(dtype), self._normed(residual, dtype).split(CHUNK)
        shares, entropies = torch.empty(len(residual), len(rows), dtype=dtype), []
        for place, part in zip(shares.split(CHUNK), parts, strict=True):
            logits = self._capped(F.linear(part, rows).float())
            law = logits.softmax(-1)
            place.copy_(law)
            entropies.append(logits.logsumexp(-1) - (law * logits).sum(-1))
        return Laws(shares, torch.cat(entropies))

    def choices(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        """[R] int64, the likeliest tokens of the whole vocabulary."""
        rows, parts = self._logits.to(dtype), self._normed(residual, dtype).split(CHUNK)
        return torch.cat([F.linear(part, rows).argmax(-1) for part in parts])

    def _normed(self, residual: Tensor, dtype: torch.dtype) -> Tensor:
        return F.rms_norm(residual.float(), self.norm.shape, self.norm, self.config.norm_epsilon).to(dtype)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.config.logits_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap


class Head(Protocol):
    """A draft head in training, an nn.Module."""

    title: str  #: of its card
    layout: str  #: whose the folder's layout is
    option: str  #: of pyspec generate, that drafts with it
    logits: nn.Linear  #: of guesses, frozen at first
    confidence: nn.Linear | None  #: of the same rows, the logit of a guess's chance to be accepted; None without

    def guesses(self, batch: Batch, chains: Tensor, depth: int, share: float, noise: float) -> Iterator:
        """Chains of guesses with the tokens of the text, depth by depth.

        Args:
            chains: [C] int64, rows of the batch behind which chains begin: the first guess of chain t is of the token
                t + 2 of its text, for token t + 1 is known as yet.
            share: of the chains that go on behind their first guess.
            noise: see Recipe.

        Yields:
            (chains [C'], rows [C', H] that `logits` takes in), the chains that are still in their text.
        """
        ...

    def write(self, folder: Path, model: str) -> None:
        """Writes it in the layout that others load; model: what they load the target by."""
        ...


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrices in it are multiplied faster than in float32, else float32."""
    has_bf16 = device.type != "cpu" or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def noisy(features: Tensor, noise: float) -> Tensor:
    """fp32 features [..., H] and noise of a standard deviation by their root mean square."""
    features = features.float()
    if not noise:
        return features
    return features + noise * features.square().mean(-1, keepdim=True).sqrt() * torch.randn_like(features)


def chains_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """[n] bool: rows whose law is worth learning, and rows behind which the first guess of a chain is held against one.

    A row t whose next token is known guesses the token after that, which the law of row t + 1 is of.
    """
    is_learned, has_guess = torch.zeros(2, len(batch.tokens), dtype=torch.bool)
    is_learned[:-1] = (batch.texts[1:] == batch.texts[:-1]) & batch.answer[1:]
    has_guess[:-1] = (batch.texts[1:] == batch.texts[:-1]) & is_learned[1:]
    return is_learned, has_guess


def loss_of(head: Head, target: Target, batch: Batch, recipe: Recipe, step: int, dtype: torch.dtype) -> Tensor:
    """What a batch's guesses lose: the mean over those of a depth, by depth 1, 0.8, 0.64, ... of it."""
    is_learned, has_guess = chains_of(batch)
    rows = is_learned.nonzero()[:, 0]
    laws, places = target.laws(batch.features[rows, -1], dtype), is_learned.cumsum(0) - 1
    head.logits.weight.requires_grad_(step >= recipe.frozen * recipe.steps)
    loss, divergence = torch.zeros(()), recipe.divergence if step < recipe.hybrid * recipe.steps else "hybrid"
    chains = has_guess.nonzero()[:, 0]
    for depth, (kept, guess) in enumerate(head.guesses(batch, chains, recipe.depth, recipe.share, recipe.noise)):
        shared = None if head.confidence is None else torch.empty(len(guess))
        found = distil(guess, head.logits.weight, laws, places[kept + 1 + depth], divergence, shared)
        if shared is not None:
            sure = head.confidence(guess.detach())[:, 0].float()
            found = found + F.binary_cross_entropy_with_logits(sure, shared, reduction="sum")
        loss = loss + 0.8**depth * found / max(1, len(kept))
    return loss


@torch.no_grad()
def measure(
    head: Head, target: Target, batches: Sequence[Batch], widths: Sequence[int], dtype: torch.dtype
) -> list[float]:
    """[depth] shares of the chains whose first, first two, ... guesses hold the target's own choices.

    A guess of depth d is the likeliest widths[d] tokens: widths of 1 are those of a chain, others of a tree in which
    each node of depth d has so many children. The guesses behind the first are made with the tokens of the text. So the
    shares are those of drafting where a text was made of the likeliest tokens, and near them where it was drawn.
    """
    depth = len(widths)
    right, count = torch.zeros(depth), torch.zeros(depth)
    for batch in batches:
        is_learned, has_guess = chains_of(batch)
        rows = is_learned.nonzero()[:, 0]
        choices, places = target.choices(batch.features[rows, -1], dtype), is_learned.cumsum(0) - 1
        are_right = torch.ones(len(batch.tokens), dtype=torch.bool)
        chains = has_guess.nonzero()[:, 0]
        for index, (kept, guess) in enumerate(head.guesses(batch, chains, depth, 1.0, 0.0)):
            matrix = head.logits.weight.to(dtype)
            logits = (F.linear(part.to(dtype), matrix) for part in guess.split(CHUNK))
            found = torch.cat([part.topk(widths[index]).indices for part in logits])
            are_right[kept] &= (target.tokens[found] == choices[places[kept + 1 + index], None]).any(-1)
            right[index] += are_right[kept].sum()
            count[index] += len(kept)
    return (right / count.clamp(min=1)).tolist()


# ==== the loop ====


class Run:
    """A head, its optimizer and its curve, kept in a folder so that training can go on after an interruption."""

    def __init__(self, folder: Path, recipe: Recipe, head: Head, target: Target, data: Path):
        self.folder, self.recipe, self.head, self.target = folder, recipe, head, target
        self.dtype = fast_dtype(torch.device("cpu"))
        self._data, self._held_out = DraftData(data), DraftData(data, held_out=True)
        groups = [
            {"params": [p for p in head.parameters() if (p.dim() > 1) == is_matrix], "weight_decay": decay}
            for is_matrix, decay in ((True, recipe.weight_decay), (False, 0.0))
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step, self.curve = 0, []  # (step, mean loss since the point before, shares of held-out chains)
        if (folder / CHECKPOINT).is_file():
            kept = torch.load(folder / CHECKPOINT, weights_only=True)
            if kept["recipe"] != asdict(recipe):
                raise ValueError(f"{folder / CHECKPOINT} was trained by another recipe: choose another folder")
            self.head.load_state_dict(kept["head"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step, self.curve = kept["step"], kept["curve"]

    def keep(self) -> None:
        """Writes the checkpoint and the curve; an interruption while it is written leaves the one before."""
        part = self.folder / (CHECKPOINT + ".part")
        state = {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "curve": self.curve, "recipe": asdict(self.recipe)}, part)
        part.replace(self.folder / CHECKPOINT)
        points = [dict(zip(("step", "loss", "accepted"), point, strict=True)) for point in self.curve]
        (self.folder / "curve.json").write_text(json.dumps(points, indent=1) + "\n")

    def steps(self) -> Iterator[float]:
        """Trains to the end; gives the loss of each step."""
        for batch in self._batches():
            rate = self.recipe.rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            torch.manual_seed(self.recipe.seed * 2**32 + self.step)  # of noise and chains, however often interrupted
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                loss = loss_of(self.head, self.target, batch, self.recipe, self.step, self.dtype)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.head.parameters() if p.grad is not None], 1.0)
            self.optimizer.step()
            self.step += 1
            yield float(loss.detach())

    def _batches(self) -> Iterator[Batch]:
        """The batches that are left: each time through the texts they come in another order."""
        first = 0
        for seed in itertools.count(self.recipe.seed):
            parts = self._data.batches(self.recipe.tokens, seed=seed)
            for step in range(max(first, self.step), min(first + len(parts), self.recipe.steps)):
                yield self._data.read(parts[step - first])
            first += len(parts)
            if first >= self.recipe.steps:
                return

    def measure(self, widths: Sequence[int] = ()) -> list[float]:
        """The shares of held-out chains, see measure; of a tree whose first levels have such widths, the others 1."""
        parts = self._held_out.batches(self.recipe.tokens)[:MEASURED]
        batches = [self._held_out.read(part) for part in parts]
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            widths = [*widths, *[1] * self.recipe.depth][: self.recipe.depth]
            return measure(self.head, self.target, batches, widths, self.dtype)


def learn(run: Run) -> None:
    """All steps that are left, with a progress bar; the run is kept every so many, and goes on from there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task, losses = progress.add_task("training", total=run.recipe.steps, completed=run.step), []
        for loss in run.steps():
            losses.append(loss)
            progress.update(task, completed=run.step, description=f"loss {loss:.3f}")
            if run.step % run.recipe.every == 0 or run.step == run.recipe.steps:
                run.curve.append((run.step, sum(losses) / len(losses), run.measure()))
                losses = []
                run.keep()
                draw(run.curve, run.folder / "curve.png")


def draw(curve: Sequence[tuple[int, float, list[float]]], path: Path) -> None:
    """The shares of held-out chains over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    steps, _, shares = zip(*curve, strict=True)
    for depth, line in enumerate(zip(*shares, strict=True), 1):
        axis.plot(steps, line, label=f"first {depth}" if depth > 1 else "first guess")
    axis.set_xlabel("steps")
    axis.set_ylabel("share of held-out rows")
    axis.set_ylim(0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
