"""Distils a smaller Mamba-2 from a Mamba-2, to draft for it: a few of its layers, taught by its laws on its own texts.

    python -m training.data --model models/demo-ssm --output texts --tokens 400000
    python -m training.small_mamba --model models/demo-ssm --data texts --output small --layers 0 9
    pyspec.drafters.model.ModelDrafter(pyspec.load("small"), pyspec.load("models/demo-ssm"))

The student begins as those layers of its teacher, between the teacher's embedding and head, and learns the law of every
next token by the forward KL divergence (DistillSpec, arXiv 2310.08461, on texts of the teacher). Ctrl-C, and the same
command goes on. Needs the extra `train`.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data_files import Batch, DraftData
from training.mamba import learning_rate
from training.ssd import use_ssd

__all__ = ["Distillation", "Recipe", "main", "student_of"]

CHECKPOINT = "checkpoint.pt"
MEASURED = 8  # held-out batches


@dataclass(frozen=True)
class Recipe:
    """How a student learns. Changing any of it starts anew."""

    layers: tuple[int, ...] = (0, 9)
    tokens: int = 4096  # of a step
    steps: int = 400
    warmup: int = 20
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    every: int = 50
    seed: int = 0


def student_of(teacher, layers: tuple[int, ...]):
    """A Mamba2ForCausalLM of some of a teacher's layers, with its embedding, last norm and head.

    Raises:
        ValueError: a layer is not one of the teacher's.
    """
    import transformers

    most = teacher.config.num_hidden_layers
    if not layers or not set(layers) <= set(range(most)):
        raise ValueError(f"layers must be some of the teacher's, in [0, {most}), got {list(layers)}")
    config = transformers.Mamba2Config.from_dict(teacher.config.to_dict() | {"num_hidden_layers": len(layers)})
    student = transformers.Mamba2ForCausalLM(config)
    places = {layer: place for place, layer in enumerate(layers)}
    kept = {}
    for name, values in teacher.state_dict().items():
        head, _, rest = name.partition("layers.")
        if rest:
            layer, _, rest = rest.partition(".")
            if int(layer) not in places:
                continue
            name = f"{head}layers.{places[int(layer)]}.{rest}"
        kept[name] = values
    student.load_state_dict(kept)
    return student.float()


class Distillation:
    """A student, its optimizer and its curve, kept in a folder so that it can go on after an interruption.

    Attributes:
        curve: (step, mean loss since the point before, share of held-out rows whose likeliest token is the teacher's,
            mean overlap of the laws there).

    Raises:
        ValueError: the folder holds a checkpoint of another recipe, or the texts are not of such a model.
    """

    def __init__(self, folder: Path, recipe: Recipe, teacher, data: Path):
        self.folder, self.recipe = folder, recipe
        self.texts, self.held_out = DraftData(data), DraftData(data, held_out=True)
        width, layers = teacher.config.hidden_size, teacher.config.num_hidden_layers
        if (self.texts.settings["hidden"], self.texts.taps[-1]) != (width, layers):
            raise ValueError(
                f"data must be of a model of {layers} layers of {width}, got {self.texts.taps[-1]} layers of "
                f"{self.texts.settings['hidden']} in {data}"
            )
        self._norm, self._head = teacher.backbone.norm_f.weight.float(), teacher.lm_head.weight.float()
        self._epsilon = teacher.config.layer_norm_epsilon
        self.student = student_of(teacher, recipe.layers)
        use_ssd(self.student)
        matrices = [parameter for parameter in self.student.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in self.student.parameters() if parameter.dim() != 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self.step, self.curve = 0, []
        if (folder / CHECKPOINT).is_file():
            kept = torch.load(folder / CHECKPOINT, weights_only=True)
            if kept["recipe"] != asdict(recipe):
                raise ValueError(f"{folder / CHECKPOINT} was trained by another recipe: choose another folder")
            self.student.load_state_dict(kept["student"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step, self.curve = kept["step"], [tuple(point) for point in kept["curve"]]

    def keep(self) -> None:
        """Writes the checkpoint; an interruption while it is written leaves the one before."""
        part = self.folder / (CHECKPOINT + ".part")
        state = {"student": self.student.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "curve": self.curve, "recipe": asdict(self.recipe)}, part)
        part.replace(self.folder / CHECKPOINT)
        with (self.folder / "loss.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "divergence", "same token", "overlap"), *self.curve])

    def steps(self) -> Iterator[float]:
        """Trains to the end; gives the loss of each step, in nats a token."""
        while self.step < self.recipe.steps:
            rate = learning_rate(self.recipe, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            theirs, ours = self._laws(self.texts.read(self._part(self.step)))
            loss = (theirs.exp() * (theirs - ours)).sum(-1).mean()
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            yield float(loss.detach())

    @torch.no_grad()
    def measure(self) -> tuple[float, float]:
        """The share of held-out rows whose likeliest token is the teacher's, and the mean overlap of the laws."""
        same, overlap = [], []
        for part in self.held_out.batches(self.recipe.tokens)[:MEASURED]:
            theirs, ours = self._laws(self.held_out.read(part))
            same.append(theirs.argmax(-1) == ours.argmax(-1))
            overlap.append(torch.minimum(theirs.exp(), ours.exp()).sum(-1))
        return float(torch.cat(same).float().mean()), float(torch.cat(overlap).mean())

    def _part(self, step: int) -> list[int]:
        """The texts of a step: each time through them they come in another order."""
        seed = self.recipe.seed
        while step >= len(parts := self.texts.batches(self.recipe.tokens, seed=seed)):
            step, seed = step - len(parts), seed + 1
        return parts[step]

    def _laws(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """[rows, V] log chances of the token after each row by teacher and student; ends of texts have none."""
        rows = torch.nn.utils.rnn.pad_sequence(
            batch.tokens.split(torch.bincount(batch.texts).tolist()), batch_first=True
        )
        has_next = torch.zeros(len(batch.tokens), dtype=torch.bool)
        has_next[:-1] = batch.texts[1:] == batch.texts[:-1]
        residual = batch.features[has_next, -1].float()
        theirs = F.linear(F.rms_norm(residual, self._norm.shape, self._norm, self._epsilon), self._head)
        hidden = self.student.backbone(rows, use_cache=False).last_hidden_state
        hidden = hidden[batch.texts[has_next], batch.positions[has_next]]  # what is padded is behind a text
        return theirs.log_softmax(-1), self.student.lm_head(hidden).float().log_softmax(-1)


def learn(run: Distillation) -> None:
    """All steps that are left, with a progress bar; every so many, and when interrupted, the run is kept."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task, losses = progress.add_task("distilling", total=run.recipe.steps, completed=run.step), []
        try:
            for loss in run.steps():
                losses.append(loss)
                progress.update(task, completed=run.step, description=f"{loss:.3f} nats")
                if run.step % run.recipe.every == 0 or run.step == run.recipe.steps:
                    run.curve.append((run.step, sum(losses) / len(losses), *run.measure()))
                    losses = []
                    run.keep()
        except KeyboardInterrupt:
            run.keep()
            raise


def main(arguments: list[str] | None = None) -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a Mamba-2, the teacher")
    parser.add_argument("--data", type=Path, required=True, help="texts of it, by python -m training.data")
    parser.add_argument("--output", type=Path, required=True, help="folder of the student; a checkpoint there goes on")
    for name, value in asdict(Recipe()).items():
        several = {"nargs": "+", "type": int} if name == "layers" else {"type": type(value)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **several)
    options = vars(parser.parse_args(arguments))
    source, data, folder = (options.pop(name) for name in ("model", "data", "output"))
    teacher = transformers.Mamba2ForCausalLM.from_pretrained(source, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    run = Distillation(folder, Recipe(**options | {"layers": tuple(options["layers"])}), teacher, data)
    try:
        learn(run)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on from {folder / CHECKPOINT}") from None
    run.student.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    print(f"wrote {folder}: its likeliest token is the teacher's in {run.curve[-1][2]:.1%} of held-out rows")


if __name__ == "__main__":
    main()
