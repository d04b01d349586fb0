"""Makes the texts that drafts of a model are trained from: its own answers, and what its layers said of every token.

    python -m training.data --model demo --output FOLDER --tokens 1500000     Ctrl-C, and the same command goes on

Half of the prompts the model writes itself: it is given the beginning of a chat, up to the user's turn (Magpie,
arXiv 2406.08464). The others are about topics of WordNet (Debian's wordnet-base), Python's standard library and sums.
Seven answers of ten are greedy, three at temperature 0.7. What runs in circles is cut off after the second
round. The folder's files are described in training/data_files.py. Needs the extra `train`.

For DistillSpec's comparison another may write the answers: `--writer FOLDER` is a model of the same tokenizer, such as
a student whose own samples it is to learn from, and `--writer documents` takes texts as they are, glosses and
docstrings. The model then reads them, and says what it would have said.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import pyspec
from pyspec import DraftTree
from pyspec.acceptance import acceptance_from_name
from pyspec.controllers import controller_for
from pyspec.loop import speculate
from pyspec.sampling.sampler import Sampler
from pyspec.sequence import Sequence
from pyspec.stats import Stats
from training.data_files import SETTINGS, Text, read_settings, shard_path, write_shard
from training.data_prompts import WORDNET, Topics, words_of_wordnet

__all__ = ["Maker", "Recipe", "end_of_circles", "main", "make"]

OWN_TURN, LONGEST_TURN = "<user's turn>", 128  # what stands for a turn in the template; tokens of one
MOST_OF_PROMPT = 640  # tokens: longer prompts are cut short in the middle of nowhere
DOCUMENTS = "documents"  # a writer that is no model
CIRCLE = 32  # tokens that a short period must last to be a circle
GREEDY = 0.7  # of the answers


@dataclass(frozen=True)
class Recipe:
    """How texts are made. A folder holds those of one recipe.

    Attributes:
        each: texts of a shard, which are answered in one batch: 64 make twice as many tokens a second as 16.
        answer: tokens of an answer, at most.
        own: share of prompts that the model writes itself.
        seed: of prompts and draws.
    """

    each: int = 64
    answer: int = 256
    own: float = 0.5
    seed: int = 0

    def __post_init__(self):
        for name, least, most in (("each", 1, 4096), ("answer", 1, 2**20), ("own", 0, 1)):
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} must be in [{least}, {most}], got {value}")


def end_of_circles(tokens: list[int]) -> int:
    """How many tokens to keep: all, or up to the end of the second period of what repeats itself from there on.

    It does where a third period has begun, and 32 tokens at least are in the repetition.
    """
    text, end = np.asarray(tokens), len(tokens)
    for period in range(1, len(text) // 2 + 1):
        least = max(period + 1, CIRCLE - period)  # tokens that are what stands a period before them
        sums = np.concatenate([[0], np.cumsum(text[period:] == text[:-period])])
        circles = np.flatnonzero(sums[least:] - sums[:-least] == least) if len(sums) > least else ()
        if len(circles):
            end = min(end, int(circles[0]) + 2 * period)
    return end


def taps_of(layers: int) -> tuple[int, ...]:
    """The layers whose residual stream is kept: those of EAGLE-3, and what the last norm takes in."""
    return tuple(sorted({min(2, layers), layers // 2, max(layers - 3, 0), layers}))


class KeepTaps:
    """A drafter that guesses nothing and keeps what the target's layers say of every token.

    Attributes:
        rows: [n, taps, hidden] float16 pieces, of the tokens so far but the last.
        started: the drafters of a batch's sequences, by number.
    """

    proposal = "deterministic"

    def __init__(self, taps: tuple[int, ...]):
        self.taps, self.started = taps, []

    def start(self, prompt) -> KeepTaps:
        drafter = copy.copy(self)
        drafter.rows = []
        self.started.append(drafter)
        return drafter

    def propose(self, context, budget: int) -> DraftTree:
        return DraftTree.chain(context[-1:])

    def observe(self, tree: DraftTree, verified, path) -> None:
        self.rows.append(verified.taps[list(path)].float())


class Maker:
    """Makes the texts of any shard.

    Args:
        model: from pyspec.load.
        recipe: how.
        topics: of the prompts that the model does not write.
        writer: of the answers, instead of the model: another model of the same tokenizer, or "documents".
    """

    def __init__(self, model, recipe: Recipe, topics: Topics, writer=None):
        self.model, self.recipe, self.topics, self.writer = model, recipe, topics, writer
        self.taps = taps_of(model.layers)

    def shard(self, number: int) -> list[Text]:
        """The texts of a shard: the same for the same number, whatever was made before."""
        random = np.random.default_rng((self.recipe.seed, number))
        if self.writer is not None:
            return self._by_another(random)
        prompts, kept = self._prompts(random), KeepTaps(self.taps)
        temperatures = np.where(random.random(len(prompts)) < GREEDY, 0.0, 0.7).tolist()
        answers = self._generate(self.model, prompts, random, temperatures, self.recipe.answer, drafter=kept)
        return [
            _text(prompt, answer, torch.cat(drafter.rows))
            for prompt, answer, drafter in zip(prompts, answers, kept.started, strict=True)
        ]

    def _by_another(self, random: np.random.Generator) -> list[Text]:
        """Texts whose answers another wrote, and what the model says as it reads them."""
        if self.writer == DOCUMENTS:
            encode, chat = self.model.tokenizer.encode, self.model.tokenizer.chat
            found = [self.topics.documented(random) for _ in range(self.recipe.each)]
            prompts = [chat([{"role": "user", "content": question}]) for question, _ in found]
            answers = [encode(answer)[: self.recipe.answer] for _, answer in found]
        else:
            prompts = self._prompts(random)
            temperatures = np.where(random.random(len(prompts)) < GREEDY, 0.0, 0.7).tolist()
            answers = self._generate(self.writer, prompts, random, temperatures, self.recipe.answer)
        rows: list[list[Tensor]] = [[] for _ in prompts]
        self.model.prefill(
            [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)],
            observe=lambda slot, chain, read: rows[slot].append(read.taps.float()),
            taps=self.taps,
        )
        return [_text(*each, torch.cat(kept)) for *each, kept in zip(prompts, answers, rows, strict=True)]

    def _prompts(self, random: np.random.Generator) -> list[list[int]]:
        """Prompts of a shard; a turn that found no end, or ran in circles, makes room for a topic."""
        own = int((random.random(self.recipe.each) < self.recipe.own).sum())
        prompts = self._own_prompts(own, random) if own else []
        while len(prompts) < self.recipe.each:
            prompts.append(self._prompt_of_topic(random))
        most = min(MOST_OF_PROMPT, self.model.context_length // 2)
        return [prompt[:most] for prompt in prompts]

    @property
    def _chats(self) -> bool:
        return self.model.tokenizer.chat_template is not None

    def _prompt_of_topic(self, random: np.random.Generator) -> list[int]:
        tokenizer = self.model.tokenizer
        if not self._chats:
            return tokenizer.encode(self.topics.beginning(random))
        return tokenizer.chat([{"role": "user", "content": self.topics.question(random)}])

    def _own_prompts(self, number: int, random: np.random.Generator) -> list[list[int]]:
        tokenizer = self.model.tokenizer
        if self._chats:
            before_turn = tokenizer.render([{"role": "user", "content": OWN_TURN}]).split(OWN_TURN)[0]
            start = tokenizer.encode(before_turn, special=True)
        else:
            start = tokenizer.encode("") or [min(self.model.eos_tokens)]
        turns = self._generate(self.model, [start] * number, random, [1.0] * number, LONGEST_TURN, top_p=0.95)
        whole = [turn for turn in turns if turn and end_of_circles(turn) == len(turn)]
        if not self._chats:
            return [[*start, *turn[: random.integers(8, LONGEST_TURN)]] for turn in whole]
        texts = [tokenizer.decode(turn).strip() for turn in whole if turn[-1] in self.model.eos_tokens]
        return [tokenizer.chat([{"role": "user", "content": text}]) for text in texts if text]

    def _generate(self, model, prompts, random, temperatures, length, *, top_p=1.0, drafter=None) -> list[list[int]]:
        """What a model says after prompts, each with a seed of its own: alike ones would have one answer."""
        seeds = random.integers(2**32, size=len(prompts)).tolist()
        sequences = [
            Sequence(
                model=model,
                context=list(prompt),
                prompt_length=len(prompt),
                limit=min(len(prompt) + length, model.context_length),
                drafter=drafter,
                sampler=Sampler(temperature, 0, top_p, seed),
            )
            for prompt, temperature, seed in zip(prompts, temperatures, seeds, strict=True)
        ]
        speculate(
            model,
            sequences,
            acceptance_from_name("exact"),
            controller=controller_for(1, None, model, drafter),
            cache=None,
            stats=Stats(seed=self.recipe.seed),
        )
        if errors := [sequence.error for sequence in sequences if sequence.error]:
            raise ValueError(f"model must give laws, got {errors[0]}")
        return [sequence.new_tokens for sequence in sequences]


def _text(prompt: list[int], answer: list[int], features: Tensor) -> Text:
    answer = answer[: end_of_circles(answer)]
    tokens = torch.tensor([*prompt, *answer], dtype=torch.int32)
    features = features[: len(tokens)]
    features = torch.nn.functional.pad(features, (0, 0, 0, 0, 0, len(tokens) - len(features)))
    features[-1] = 0
    return Text(tokens, len(prompt), features)


def make(
    model, folder: Path, recipe: Recipe, tokens: int, *, name: str, wordnet: Path = WORDNET, writer: str | None = None
) -> int:
    """Makes shards until a folder has so many tokens, prompts included, going on where it stopped; how many it has.

    Args:
        model: from pyspec.load; its tokenizer is needed.
        folder: of the shards; made if need be.
        recipe: how texts are made.
        tokens: to have.
        name: of the model, for the settings.
        wordnet: the folder of WordNet's files; where there are none, prompts are about the other topics.
        writer: of the answers, see Maker: what pyspec.load takes, or "documents".

    Raises:
        ValueError: the folder holds texts of other settings, the model has no tokenizer, or the writer another one.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if model.tokenizer is None:
        raise ValueError("model must have a tokenizer to make texts, got one without")
    words = words_of_wordnet(wordnet) if (wordnet / "data.noun").is_file() else []
    settings = {
        **{"model": name, "fingerprint": model.fingerprint, "dtype": str(model.weight_dtype).removeprefix("torch.")},
        **{"taps": list(taps_of(model.layers)), "hidden": model.hidden_size, "vocabulary": model.vocab_size},
        **{"words": len(words), "writer": writer, **asdict(recipe)},
    }
    found = read_settings(folder)
    for key, value in settings.items():
        if found is not None and found.get(key) != value:
            raise ValueError(f"{folder / SETTINGS} must have {key} {value} to go on, got {found.get(key)}: use another")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    if not words:
        print(f"There is no WordNet in {wordnet}, so no prompt is about its words (Debian: wordnet-base).")
    maker, done = Maker(model, recipe, Topics(words), _writer(writer, model)), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("tokens", total=tokens)
        for number in count():
            if not (path := shard_path(folder, number)).is_file():
                if done >= tokens:
                    return done
                write_shard(path, maker.shard(number))
            done += tokens_of(path)
            progress.update(task, completed=done, description=f"{(number + 1) * recipe.each} texts")


def _writer(name: str | None, model):
    if name is None or name == DOCUMENTS:
        return name
    writer = pyspec.load(name, device=model.device)
    if writer.vocab_size != model.vocab_size:
        raise ValueError(f"writer must have the model's {model.vocab_size} tokens, got {writer.vocab_size} in {name}")
    return writer


def tokens_of(path: Path) -> int:
    """Tokens of a shard."""
    from safetensors import safe_open

    with safe_open(path, "pt") as shard:
        return shard.get_slice("tokens").get_shape()[0]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo", help="what pyspec.load takes")
    parser.add_argument("--output", type=Path, required=True, help="folder of the texts; one that has some goes on")
    parser.add_argument("--tokens", type=int, default=1_500_000, help="to make in all, prompts included")
    parser.add_argument("--device", help="cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "int8"], help="of weights; default: what pyspec.load takes")
    parser.add_argument("--writer", help="of the answers, in the model's stead: a model's folder, or documents")
    parser.add_argument("--wordnet", type=Path, default=WORDNET, help="folder of WordNet's files")
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    source, folder, tokens, wordnet = (options.pop(name) for name in ("model", "output", "tokens", "wordnet"))
    dtype, writer = options.pop("dtype"), options.pop("writer")
    model = pyspec.load(source, device=options.pop("device"), dtype=dtype and getattr(torch, dtype))
    try:
        done = make(model, folder, Recipe(**options), tokens, name=source, wordnet=wordnet, writer=writer)
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command goes on") from None
    print(f"{folder} has {done} tokens")


if __name__ == "__main__":
    main()
