"""Trains a small Mamba-2 language model on the sources of Python's standard library, to speculate on.

    python -m pyspec.training.mamba out/                    some hours on a GPU; Ctrl-C, and the same command goes on
    pyspec generate --model out/ "def main("

The folder that it writes is a Hugging Face model: config.json, model.safetensors (bf16), tokenizer.json, with the loss
curve beside it (loss.csv, loss.png). Needs the extra `train`: pip install pyspec-kernels[train].
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

__all__ = ["Recipe", "main", "standard_library", "train"]

END = "<|end|>"  # of a file
HELD_OUT = 50  # one file of so many is kept for validation
CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how. Changing any of it starts anew."""

    vocabulary: int = 4096
    hidden: int = 384
    layers: int = 12
    state: int = 64
    length: int = 512  # tokens of a row
    batch: int = 64
    steps: int = 20000
    warmup: int = 500
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0


def standard_library(folder: Path | None = None) -> list[str]:
    """The texts of the standard library's modules, in the order of their paths."""
    folder = folder or Path(sysconfig.get_path("stdlib"))
    texts = []
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # tests of decoders
            continue
        if text.strip():
            texts.append(text)
    return texts


def train_tokenizer(texts: list[str], vocabulary: int):
    """A byte-level BPE: every text has tokens, and spaces of an indentation are few of them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer, texts: list[str]) -> np.ndarray:
    """[n] uint16: all texts, an end token behind each."""
    end = tokenizer.token_to_id(END)
    return np.concatenate([[*found.ids, end] for found in tokenizer.encode_batch(texts)]).astype(np.uint16)


def new_model(recipe: Recipe, end: int, size: int):
    """A Mamba-2 of transformers; size is that of the vocabulary."""
    import transformers

    config = transformers.Mamba2Config(
        vocab_size=-(-size // 32) * 32,
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        state_size=recipe.state,
        head_dim=64,
        num_heads=recipe.hidden // 32,
        n_groups=1,
        chunk_size=64,
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
    )
    return transformers.Mamba2ForCausalLM(config)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Up to its full height in a line, then down to a tenth along a cosine."""
    if step < recipe.warmup:
        return recipe.learning_rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def rows_of(tokens: np.ndarray, recipe: Recipe, step: int, device: torch.device) -> torch.Tensor:
    """[batch, length + 1]: the same rows for the same step, however often training was interrupted."""
    generator = np.random.default_rng((recipe.seed, step))
    starts = generator.integers(0, len(tokens) - recipe.length - 1, recipe.batch)
    rows = tokens[starts[:, None] + np.arange(recipe.length + 1)]
    return torch.from_numpy(rows.astype(np.int64)).to(device)


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a token, in nats."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model, tokens: np.ndarray, recipe: Recipe, device: torch.device) -> float:
    """The loss on held-out text, on the same rows each time."""
    model.eval()
    losses = [float(loss_of(model, rows_of(tokens, recipe, index, device))) for index in range(8)]
    model.train()
    return sum(losses) / len(losses)


class Run:
    """Model, optimizer and loss curve, kept in a folder so that training can go on after an interruption."""

    def __init__(self, out: Path, recipe: Recipe, model, device: torch.device):
        self.out, self.recipe, self.model = out, recipe, model.to(device)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))
        self.step, self.curve = 0, []  # (step, training loss, held-out loss)
        if (out / CHECKPOINT).is_file():
            kept = torch.load(out / CHECKPOINT, map_location=device, weights_only=True)
            if kept["recipe"] != asdict(recipe):
                raise ValueError(f"{out / CHECKPOINT} was trained by another recipe: choose another folder")
            self.model.load_state_dict(kept["model"])
            self.optimizer.load_state_dict(kept["optimizer"])
            self.step, self.curve = kept["step"], [tuple(point) for point in kept["curve"]]

    def keep(self) -> None:
        """Writes the checkpoint; an interruption while it is written leaves the one before."""
        part = self.out / (CHECKPOINT + ".part")
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"step": self.step, "curve": self.curve, "recipe": asdict(self.recipe)}, part)
        part.replace(self.out / CHECKPOINT)
        with (self.out / "loss.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("step", "training loss", "held-out loss"), *self.curve])

    def steps(self, tokens: np.ndarray, device: torch.device) -> Iterator[float]:
        """Trains to the end; gives the loss of each step."""
        self.model.train()
        while self.step < self.recipe.steps:
            rate = learning_rate(self.recipe, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(self.model, rows_of(tokens, self.recipe, self.step, device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            yield float(loss.detach())


def train(out: Path, recipe: Recipe, texts: list[str], device: torch.device, every: int = 250) -> Path:
    """Trains, or goes on, and writes the model.

    Args:
        out: the folder of the model; made if need be.
        recipe: what is trained.
        texts: the files that are learned from; one of HELD_OUT is held out.
        device: where it is trained.
        every: steps between two checkpoints, which are also the points of the loss curve.

    Raises:
        ValueError: the folder holds a checkpoint of another recipe, the vocabulary is too large, or there is too
            little text.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from tokenizers import Tokenizer

    if recipe.vocabulary > 2**16:
        raise ValueError(f"vocabulary must be at most {2**16}, got {recipe.vocabulary}")
    out.mkdir(parents=True, exist_ok=True)
    learned = [text for index, text in enumerate(texts) if (index + 1) % HELD_OUT]
    held_out = texts[HELD_OUT - 1 :: HELD_OUT]
    file = out / "tokenizer.json"
    if not file.is_file():
        train_tokenizer(learned, recipe.vocabulary).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    tokens, others = (encode(tokenizer, part) if part else np.zeros(0) for part in (learned, held_out))
    if min(len(tokens), len(others)) <= recipe.length + 1:
        raise ValueError(f"texts must have more than {recipe.length + 1} tokens to learn and to hold out each")

    torch.manual_seed(recipe.seed)
    run = Run(out, recipe, new_model(recipe, tokenizer.token_to_id(END), tokenizer.get_vocab_size()), device)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=recipe.steps, completed=run.step)
        losses = []
        try:
            for loss in run.steps(tokens, device):
                losses.append(loss)
                progress.update(task, completed=run.step, description=f"loss {loss:.3f}")
                if run.step % every == 0 or run.step == recipe.steps:
                    run.curve.append((run.step, sum(losses) / len(losses), validate(run.model, others, recipe, device)))
                    losses = []
                    run.keep()
        except KeyboardInterrupt:
            run.keep()
            raise
    draw(run.curve, out / "loss.png")
    run.model.to(torch.bfloat16).save_pretrained(out)
    settings = {"eos_token": END, "bos_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    return out


def draw(curve: list[tuple[int, float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    steps, training, held_out = zip(*curve, strict=True)
    axis.plot(steps, training, label="training")
    axis.plot(steps, held_out, label="held out")
    axis.set_xlabel("steps")
    axis.set_ylabel("nats a token")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the model; a checkpoint there goes on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    out, device = options.pop("out"), torch.device(options.pop("device"))
    try:
        train(out, Recipe(**options), standard_library(), device)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on from {out / CHECKPOINT}") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
