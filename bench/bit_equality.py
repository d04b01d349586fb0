"""Are the tokens, and the logits behind them, those of plain decoding, bit for bit?

    python bench/bit_equality.py                    counts, bench/results/bit_equality.json; 1 if anything differs
    python bench/bit_equality.py --draft-head HEAD  the same of a trained head for the demo model, in its three dtypes
    python bench/bit_equality.py --torch-linear     would it notice? a small run with torch's linear; 1 if it would not

Plain greedy decoding of a prompt alone says what is expected: its tokens, and all bits of the logits that each was
drawn from. Then every drafter with every tree budget continues the prompt alone, and in a batch of three with prompts
of other lengths. In fp32, bf16, int8 and int4, and for a random mixture of experts in the last three, on Spec-Bench
prompts of every category. Every run reads its prompts again.

Three prompts, a model and a drafter are one unit of work. Its drafter starts empty, so that a unit can be repeated by
itself, and keeps what it learns from run to run, so that there are rounds that accept nothing and rounds that accept
much. Finished units are kept, as JSON lines, so that an interrupted run goes on where it was; a change of pyspec or
of the settings starts it over. All combinations are done for three prompts before the next three, so that a run that
was cut short has covered all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product, zip_longest
from unittest import mock

import peers
import torch
from command_line import DTYPES, parse, parser_of, positive
from random_mixture import random_mixture
from recording import Text, record
from resume import Finished, seconds_a_token, work_through

import pyspec
from pyspec import measure
from pyspec.drafters import drafter_of_head, new_drafter
from pyspec.measure import first_difference, prompts
from pyspec.measure.results import RESULTS
from pyspec.runners.replay import launch_by_launch

MIXTURE = "mixture in "  # and a dtype: names of models, of which the others are the demo's dtypes
MODELS = (*DTYPES, "int4", *(f"{MIXTURE}{name}" for name in ("bf16", "int8", "int4")))
BUDGETS = (4, 16, 48)
BATCH = 3
HEAD = "draft head"  # the drafter of --draft-head, among names of others
COUNTS = ("tokens", "rows", "token_differences", "logit_differences")
TORCH_LINEAR_TOKENS = 8


@dataclass
class Expected:
    """Tokens, and a hash of the logits that each was drawn from: 64 rows of them would be 12 MB a prompt."""

    tokens: list[int]
    hashes: list[bytes]

    @classmethod
    def of(cls, text: Text) -> Expected:
        return cls(text.tokens, [hash_of(row) for row in text.logits])


def hash_of(row: torch.Tensor) -> bytes:
    """64 bits, which rows that differ in any bit share once in 2^64 times."""
    return hashlib.blake2b(row.numpy(), digest_size=8).digest()


def compare(text: Text, expected: Expected) -> dict:
    """How many tokens, and how many rows of logits, differ, and the first place of each (None where all are equal)."""
    place = first_difference(text.tokens, expected.tokens)
    # logits after a different token follow another text; those which it was drawn from still belong
    rows = min(len(text.tokens), len(expected.tokens), len(text.tokens) if place is None else place + 1)
    different_rows = [row for row in range(rows) if hash_of(text.logits[row]) != expected.hashes[row]]
    return {
        "tokens": len(text.tokens),
        "rows": rows,
        "token_differences": sum(ours != theirs for ours, theirs in zip_longest(text.tokens, expected.tokens)),
        "logit_differences": len(different_rows),
        "first_token": place,
        "first_row": different_rows[0] if different_rows else None,
    }


class Check:
    """Compares texts with plain decoding, which is done once for each model and prompt.

    Args:
        models: runners by their names.
        prompts: token ids by question id.
        new_tokens: of each text.
        head: the trained head that HEAD stands for.
    """

    def __init__(self, models: dict, prompts: dict[int, list[int]], new_tokens: int, head: str | None = None):
        self._models = models
        self._prompts = prompts
        self._new_tokens = new_tokens
        self._head = head
        self._expected: dict[tuple[str, int], Expected] = {}

    def unit(self, unit: dict) -> dict:
        """Every budget, with each prompt alone and with the batch."""
        model = self._models[unit["dtype"]]
        drafter = drafter_of_head(self._head, model) if unit["drafter"] == HEAD else new_drafter(unit["drafter"], model)
        batches = [*([question_id] for question_id in unit["alone"]), unit["together"]]
        return {"runs": [self.run(unit["dtype"], drafter, *setting) for setting in product(BUDGETS, batches)]}

    def run(self, dtype: str, drafter, budget: int, question_ids: list[int]) -> dict:
        """One call of generate, and what is found for each of its texts."""
        texts, stats = record(
            self._models[dtype],
            [self._prompts[question_id] for question_id in question_ids],
            drafter=drafter,
            budget=budget,
            max_new_tokens=self._new_tokens,
        )
        found = [
            compare(text, self._plain(dtype, question_id))
            for text, question_id in zip(texts, question_ids, strict=True)
        ]
        rounds = sum(stats.accepted_lengths)
        return {"budget": budget, "question_ids": question_ids, "rounds": rounds, "texts": found}

    def _plain(self, dtype: str, question_id: int) -> Expected:
        key = dtype, question_id
        if key not in self._expected:
            prompt, settings = self._prompts[question_id], {"drafter": None, "max_new_tokens": self._new_tokens}
            ((text,), _) = record(self._models[dtype], [prompt], **settings)
            self._expected[key] = Expected.of(text)
        return self._expected[key]


def units(question_ids: list[int], models=MODELS, drafters=tuple(peers.DRAFTERS)) -> list[dict]:
    """All the work, three prompts after three; the first prompts fill up the last batch."""
    found = []
    for start in range(0, len(question_ids), BATCH):
        alone = question_ids[start : start + BATCH]
        together = [question_ids[(start + place) % len(question_ids)] for place in range(BATCH)]
        for dtype, drafter in product(models, drafters):
            found.append({"dtype": dtype, "drafter": drafter, "alone": alone, "together": together})
    return found


@contextmanager
def torch_linear() -> Iterator[None]:
    """Models compute with torch's own linear, and layer by layer op by op: the compiled program has ours inside."""
    dense: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def linear(x, weight, bias=None, *, out_dtype=None):
        key = weight.data.data_ptr(), x.dtype
        if key not in dense:
            dense[key] = weight.unpack().to(x.dtype)
        out = torch.nn.functional.linear(x, dense[key], bias)
        return out if out_dtype is None else out.to(out_dtype)

    names = ("pyspec.runners.native", "pyspec.architectures.blocks")
    base, blocks = map(importlib.import_module, names)
    with launch_by_launch(), mock.patch.object(base, "linear", linear), mock.patch.object(blocks, "linear", linear):
        yield


def summary(lines: list[dict]) -> list[dict]:
    """Counts for each combination of dtype, drafter, budget and batch."""
    combinations: dict[tuple, dict] = {}
    for line in lines:
        for run in line["runs"]:
            key = {
                "dtype": line["dtype"],
                "drafter": line["drafter"],
                "budget": run["budget"],
                "batch": len(run["question_ids"]),
            }
            counts = combinations.setdefault(
                tuple(key.values()), {**key, "sequences": 0, "rounds": 0, **dict.fromkeys(COUNTS, 0)}
            )
            counts["sequences"] += len(run["texts"])
            counts["rounds"] += run["rounds"]
            for text in run["texts"]:
                for name in COUNTS:
                    counts[name] += text[name]
    return list(combinations.values())


def total(checks: list[dict]) -> dict[str, int]:
    return {name: sum(counts[name] for counts in checks) for name in COUNTS}


def differences(counts: dict) -> int:
    return counts["token_differences"] + counts["logit_differences"]


def describe(counts: dict) -> str:
    return (
        f"{counts['token_differences']} of {counts['tokens']} tokens and "
        f"{counts['logit_differences']} of {counts['rows']} rows of logits differ"
    )


def show(checks: list[dict], lines: list[dict]) -> None:
    for counts in checks:
        name = f"{counts['dtype']}, {counts['drafter']}, budget {counts['budget']}, batch {counts['batch']}"
        length = counts["tokens"] / counts["rounds"]
        print(f"{name}: {counts['sequences']} texts, {length:.2f} tokens a round: {describe(counts)}")
    for line in lines:
        for run in line["runs"]:
            for question_id, text in zip(run["question_ids"], run["texts"], strict=True):
                if differences(text):
                    print(
                        f"DIFFERENT: question {question_id} of {run['question_ids']}, {line['dtype']}, "
                        f"{line['drafter']}, budget {run['budget']}: {describe(text)}, "
                        f"first token {text['first_token']}, first row {text['first_row']}"
                    )


def would_notice(models: dict, token_ids: dict[int, list[int]], console) -> bool:
    """Whether a few short texts, alone and in a batch, differ with torch's linear in place of ours."""
    check, together = Check(models, token_ids, TORCH_LINEAR_TOKENS), list(token_ids)[:BATCH]
    noticed = False
    with torch_linear(), measure.counted(console, len(models)) as advance:
        for dtype, model in models.items():
            advance(f"torch's linear, {dtype}")
            drafter = new_drafter("merged", model)
            runs = [check.run(dtype, drafter, TORCH_LINEAR_TOKENS, batch) for batch in (together[:1], together)]
            counts = total(summary([{"dtype": dtype, "drafter": "merged", "runs": runs}]))
            console.print(f"{dtype} with torch's linear: {describe(counts)}")
            noticed |= differences(counts) > 0
    return noticed


def load(name: str) -> pyspec.runners.Runner:
    """One of MODELS."""
    dtype = (DTYPES | {"int4": "int4"})[name.removeprefix(MIXTURE)]
    demo = pyspec.load("demo", dtype=torch.int8 if name.startswith(MIXTURE) else dtype, device="cpu")
    return random_mixture(demo, dtype) if name.startswith(MIXTURE) else demo


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=positive, default=50, help="default: 50")
    parser.add_argument("--tokens", type=positive, default=64, help="new tokens of each text; default: 64")
    parser.add_argument(
        "--torch-linear",
        action="store_true",
        help="a small run with torch's linear in place of ours, in which something must differ",
    )
    parser.add_argument("--draft-head", metavar="HEAD", help="a trained head for the demo model, a folder or a hub id")
    return parse(parser)


def main() -> int:
    options = arguments()
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("loading the models"):
        models = {name: load(name) for name in (MODELS if options.draft_head is None else DTYPES)}
    tokenizing = models["fp32"]
    questions = prompts.across_categories(prompts.spec_bench(), options.prompts)
    token_ids = {question.question_id: question.tokens(tokenizing) for question in questions}
    if options.torch_linear:
        noticed = would_notice(models, token_ids, console)
        print("noticed, as it must be" if noticed else "NOT NOTICED: a broken row rule would pass this check")
        return 0 if noticed else 1

    def expected_seconds(remaining: list[dict]) -> float:
        rates = {dtype: seconds_a_token(model, next(iter(token_ids.values()))) for dtype, model in models.items()}
        texts = ((rates[unit["dtype"]], len(unit["alone"]) + len(unit["together"])) for unit in remaining)
        return len(BUDGETS) * options.tokens * sum(rate * count for rate, count in texts)

    work, name, made_with = units(list(token_ids)), "bit_equality", {"tokens": options.tokens}
    if options.draft_head is not None:
        work, name = units(list(token_ids), DTYPES, [HEAD]), "bit_equality_head"
        made_with |= {"head": options.draft_head}
    finished = Finished(RESULTS / f"{name}.jsonl", made_with)
    lines = work_through(
        work,
        finished,
        Check(models, token_ids, options.tokens, options.draft_head).unit,
        lambda unit: f"{unit['dtype']} {unit['drafter']}",
        expected_seconds,
        console,
    )
    checks = summary(lines)
    counts = total(checks)
    result = {"prompts": options.prompts, "total": counts, "checks": checks}
    path = measure.save(name, {"machine": measure.machine(), **finished.made_with, **result})
    show(checks, lines)
    print(f"in all {describe(counts)} (wrote {path})")
    return 1 if differences(counts) else 0


if __name__ == "__main__":
    sys.exit(main())
