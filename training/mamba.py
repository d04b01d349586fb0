"""Trains a small Mamba-2 language model on the sources of Python's standard library, to speculate on.

    python -m training.mamba out/                    some hours on a GPU; Ctrl-C, and the same command goes on
    python -m training.mamba out/ --text docs/       the texts of a folder too
    pyspec generate --model out/ "def main("

The folder that it writes is a Hugging Face model: config.json, model.safetensors (bf16), tokenizer.json, with a model
card (README.md) and the loss curve (loss.csv, loss.png). Needs the extra `train`: pip install pyspec-kernels[train].
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from training.ssd import use_ssd

__all__ = ["Recipe", "main", "standard_library", "texts_of", "train"]

END = "<|end|>"  # of a file
HELD_OUT = 50  # one file of so many is kept for validation
CHECKPOINT = "checkpoint.pt"
SUFFIXES = (".py", ".txt", ".rst", ".md")  # of files that are texts
SHOWN = 10  # steps between two looks at the loss, each of which waits for the device


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


def standard_library() -> list[str]:
    """The texts of the standard library's modules, in the order of their paths."""
    return texts_of(Path(sysconfig.get_path("stdlib")), (".py",))


def texts_of(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> list[str]:
    """The texts of a folder's files, in the order of their paths."""
    texts = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in suffixes or "site-packages" in path.parts or not path.is_file():
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


def rows_of(tokens: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """[batch, length + 1]: the same rows for the same step, however often training was interrupted."""
    generator = np.random.default_rng((recipe.seed, step))
    starts = torch.from_numpy(generator.integers(0, len(tokens) - recipe.length - 1, recipe.batch))
    if tokens.is_cuda:
        starts = starts.pin_memory().to(tokens.device, non_blocking=True)
    return tokens[starts[:, None] + torch.arange(recipe.length + 1, device=tokens.device)]


def loss_of(model, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of a token, in nats."""
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=rows.device.type == "cuda"):
        logits = model(rows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def validate(model, tokens: torch.Tensor, recipe: Recipe) -> float:
    """The loss on held-out text, on the same rows each time."""
    return float(torch.stack([loss_of(model, rows_of(tokens, recipe, index)) for index in range(8)]).mean())


class Run:
    """Model, optimizer and loss curve, kept in a folder so that training can go on after an interruption."""

    def __init__(self, out: Path, recipe: Recipe, model, device: torch.device):
        self.out, self.recipe, self.model = out, recipe, model.to(device)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
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

    def steps(self, tokens: torch.Tensor) -> Iterator[torch.Tensor]:
        """Trains to the end; gives the loss of each step."""
        while self.step < self.recipe.steps:
            rate = learning_rate(self.recipe, self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(self.model, rows_of(tokens, self.recipe, self.step))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.step += 1
            yield loss.detach()


def learn(run: Run, tokens: torch.Tensor, others: torch.Tensor, every: int) -> None:
    """All steps that are left, with a progress bar; every so many, and when interrupted, the run is kept."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=run.recipe.steps, completed=run.step)
        losses = []
        try:
            for loss in run.steps(tokens):
                losses.append(loss)
                if run.step % SHOWN == 0 or run.step == run.recipe.steps:
                    progress.update(task, completed=run.step, description=f"loss {float(loss):.3f}")
                if run.step % every == 0 or run.step == run.recipe.steps:
                    mean = float(torch.stack(losses).mean())
                    run.curve.append((run.step, mean, validate(run.model, others, run.recipe)))
                    losses = []
                    run.keep()
        except KeyboardInterrupt:
            run.keep()
            raise


def train(
    out: Path,
    recipe: Recipe,
    sources: dict[str, list[str]],
    device: torch.device,
    every: int = 250,
    compiled: bool = False,
) -> Path:
    """Trains, or goes on, and writes the model.

    Args:
        out: the folder of the model; made if need be.
        recipe: what is trained.
        sources: the files that are learned from, by where they are from; one of HELD_OUT is held out.
        device: where it is trained.
        every: steps between two checkpoints, which are also the points of the loss curve.
        compiled: see use_ssd.

    Raises:
        ValueError: the folder holds a checkpoint of another recipe, the vocabulary is too large, or there is too
            little text.
    """
    from tokenizers import Tokenizer

    if recipe.vocabulary > 2**16:
        raise ValueError(f"vocabulary must be at most {2**16}, got {recipe.vocabulary}")
    out.mkdir(parents=True, exist_ok=True)
    texts = [text for source in sources.values() for text in source]
    learned = [text for index, text in enumerate(texts) if (index + 1) % HELD_OUT]
    held_out = texts[HELD_OUT - 1 :: HELD_OUT]
    file = out / "tokenizer.json"
    if not file.is_file():
        train_tokenizer(learned, recipe.vocabulary).save(str(file))
    tokenizer = Tokenizer.from_file(str(file))
    encoded = [encode(tokenizer, part) if part else np.zeros(0) for part in (learned, held_out)]
    if min(map(len, encoded)) <= recipe.length + 1:
        raise ValueError(f"texts must have more than {recipe.length + 1} tokens to learn and to hold out each")
    tokens, others = (torch.from_numpy(part.astype(np.int64)).to(device) for part in encoded)

    torch.manual_seed(recipe.seed)
    run = Run(out, recipe, new_model(recipe, tokenizer.token_to_id(END), tokenizer.get_vocab_size()), device)
    use_ssd(run.model, compiled)
    learn(run, tokens, others, every)
    draw(run.curve, out / "loss.png")
    run.model.to(torch.bfloat16).save_pretrained(out)
    settings = {"eos_token": END, "bos_token": END}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    (out / "README.md").write_text(model_card(run, sources, len(tokens)), encoding="utf-8")
    return out


def model_card(run: Run, sources: dict[str, list[str]], tokens: int) -> str:
    """What the weights were made of, in the layout of the Hugging Face hub."""
    recipe, (_, _, held_out) = run.recipe, run.curve[-1]
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    seen = recipe.steps * recipe.batch * recipe.length
    lines = [f"- {name}: {len(texts)} files, {sum(map(len, texts)) / 1e6:.1f} MB" for name, texts in sources.items()]
    data = "\n".join(lines)
    return f"""---
license: apache-2.0
library_name: pyspec
pipeline_tag: text-generation
---
# A small Mamba-2 that writes Python

{parameters / 1e6:.1f}M parameters: {recipe.layers} layers of {recipe.hidden}, states of {recipe.state}, a
byte-level BPE of {recipe.vocabulary} tokens. Made to show speculative decoding on a state
space model, and good for nothing else:

    pyspec generate --model FOLDER "def main("

## Data

{data}

That is {tokens / 1e6:.1f}M tokens without one file of {HELD_OUT}, which is held out. The licences of
the texts are those of their sources.

## Training

{recipe.steps} steps of {recipe.batch} rows of {recipe.length} tokens, {seen / 1e6:.0f}M in all, by
`python -m training.mamba`; AdamW, a learning rate of up to {recipe.learning_rate:g}.

Loss on held-out files: **{held_out:.3f} nats a token**, a perplexity of {math.exp(held_out):.1f}. The curve is
in loss.csv and loss.png.

![loss](loss.png)
"""


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
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="folders of more texts to learn from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    out, device, folders = options.pop("out"), torch.device(options.pop("device")), options.pop("text")
    sources = {f"the standard library of Python {platform.python_version()} (PSF license)": standard_library()}
    sources |= {folder.resolve().name: texts_of(folder) for folder in folders}
    try:
        train(out, Recipe(**options), sources, device, compiled=shutil.which("c++") is not None)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on from {out / CHECKPOINT}") from None
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
