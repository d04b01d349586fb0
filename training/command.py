"""From a model to a draft of it by one command: texts, training, and a folder with a card."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import pyspec
from training.data import main as make_texts
from training.data_files import DraftData
from training.drafts import CHECKPOINT, Head, Recipe, Run, Target, learn

__all__ = ["card", "command", "train"]

TOKENS = "tokens.json"  # those that a draft can guess, beside it

NewHead = Callable[[Target, Sequence[int]], Head]


def train(
    output: Path,
    data: Path,
    recipe: Recipe,
    runner,
    new_head: NewHead,
    vocabulary: Callable[[DraftData], Sequence[int]],
    begin: Path | None = None,
) -> Run:
    """Trains a draft, or goes on, and writes it.

    Args:
        output: folder of the draft; made if need be.
        data: folder of texts, see training.data_files.
        recipe: how.
        runner: the model, with fp32 weights.
        new_head: makes the draft for a target and the layers of its features.
        vocabulary: the tokens that the draft can guess, ascending, of the texts; asked once, and kept beside the draft.
        begin: output of another run for such a draft, which is to learn more; its tokens stay what they are.

    Raises:
        FileNotFoundError, ValueError: there are no texts, the output holds a checkpoint of another recipe, or the run
            to begin with has no checkpoint or other tensors.
    """
    weights = None if begin is None else torch.load(begin / CHECKPOINT, weights_only=True)["head"]
    output.mkdir(parents=True, exist_ok=True)
    texts, kept = DraftData(data), output / TOKENS
    if not kept.is_file():
        tokens = vocabulary(texts) if begin is None else json.loads((begin / TOKENS).read_text())
        kept.write_text(json.dumps([int(token) for token in tokens]))
    target = Target(runner, torch.tensor(json.loads(kept.read_text())))
    torch.manual_seed(recipe.seed)
    head = new_head(target, texts.taps[:-1])
    if weights is not None:
        _begin_with(head, weights, begin)
    run = Run(output, recipe, head, target, data)
    learn(run)
    run.head.write(output, texts.settings["model"])
    (output / "README.md").write_text(card(run, texts), encoding="utf-8")
    return run


def _begin_with(head: Head, weights: dict[str, torch.Tensor], folder: Path) -> None:
    own = {name: tuple(values.shape) for name, values in head.state_dict().items()}
    found = {name: tuple(values.shape) for name, values in weights.items()}
    if own != found:
        odd = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))[0]
        raise ValueError(f"{folder} must hold such a draft, but {odd} is {found.get(odd)} there, not {own.get(odd)}")
    head.load_state_dict(weights)


def card(run: Run, data: DraftData) -> str:
    """What the weights were made of, in the layout of the Hugging Face hub."""
    recipe, head, (_, _, shares), model = run.recipe, run.head, run.curve[-1], data.settings["model"]
    parameters, file = sum(values.numel() for values in head.parameters()), Path(inspect.getfile(type(head)))
    guesses, tokens = ", ".join(f"{share:.1%}" for share in shares), 1 + sum(shares)
    writer = data.settings.get("writer") or "the model itself"
    return f"""---
license: apache-2.0
library_name: pyspec
base_model: {model}
---
# {head.title} for {model}

{parameters / 1e6:.1f}M parameters in bf16, in the layout of {head.layout}:

    pyspec generate --model {model} {head.option} FOLDER "..."

It guesses {len(run.target.tokens)} tokens of the model's {run.target.config.vocab_size}.

## Data

{len(data)} texts of {writer}, {data.lengths.sum() / 1e6:.2f}M tokens, made by `python -m training.data`; one of
50 is held out.

## Training

{recipe.steps} steps of about {recipe.tokens} tokens by `python -m training.{file.stem}`; AdamW, a learning rate of at
most {recipe.learning_rate:g}.

Share of held-out chains whose first, first two, ... guesses are the model's own choices: {guesses}. A chain of
{recipe.depth} guesses so gives **{tokens:.2f} tokens a round**, with the model's own. The curve is in curve.json.

![shares of held-out chains](curve.png)
"""


def command(
    arguments: list[str] | None,
    doc: str,
    new_head: NewHead,
    vocabulary: Callable[[DraftData, object, int], Sequence[int]],
    defaults: Recipe,
) -> None:
    """The command line of a draft's training.

    Args:
        arguments: of the command; None for those of the process.
        doc: whose first line says what it does.
        new_head: see train.
        vocabulary: the tokens that the draft can guess, of texts, the runner and how many they are.
        defaults: of the settings.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=True, help="the model to draft for, see pyspec.load")
    parser.add_argument("--data", type=Path, required=True, help="folder of its texts, see training.data")
    parser.add_argument("--texts", type=int, default=1_500_000, help="tokens of them to have, made first; 0 makes none")
    parser.add_argument("--output", type=Path, required=True, help="folder of the draft; a checkpoint there goes on")
    parser.add_argument("--begin", type=Path, help="output of another run to begin with, for a draft of the same kind")
    for name, value in asdict(defaults).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    model, data, texts, output = (options.pop(name) for name in ("model", "data", "texts", "output"))
    begin = options.pop("begin")
    try:
        if texts:
            make_texts(["--model", model, "--output", str(data), "--tokens", str(texts)])
        recipe, runner = Recipe(**options), pyspec.load(model, dtype=torch.float32, device="cpu")
        train(output, data, recipe, runner, new_head, lambda found: vocabulary(found, runner, recipe.vocabulary), begin)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on from {output}") from None
    print(f"wrote {output}")
