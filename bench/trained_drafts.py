"""Which trained draft pays: heads, a small model, or the tables that need no training?

    python bench/trained_drafts.py --head models/demo-draft --small FOLDER    a table, bench/results/trained_drafts.json

Every draft continues the same prompts greedily, in one process, in turn prompt by prompt, and must give the text of
plain decoding. "First" is the share of rounds whose one guess was right, with trees of two nodes. Drafts of one budget
of training are those that were trained with the same --data, --steps and --tokens (docs/training.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from command_line import DTYPES, parse, parser_of, positive

import pyspec
from pyspec import generate, measure
from pyspec.drafters import new_drafter
from pyspec.drafters.heads import drafter_of_head
from pyspec.drafters.model import ModelDrafter
from pyspec.measure import prompts
from pyspec.stats import Stats

Made = tuple[Callable[[], object], int | str]  # a drafter, and its budget


def drafts_of(model, options) -> dict[str, Made]:
    """The drafts to compare, by name."""
    found: dict[str, Made] = {"tables": (lambda: new_drafter("merged", model), options.budget)}
    for head in options.head:
        name = Path(head).name
        found[f"{name}, first"] = (partial(drafter_of_head, head, model, tables=()), 2)
        found[name] = (partial(drafter_of_head, head, model, tables=()), options.budget)
        found[f"{name} and tables"] = (partial(drafter_of_head, head, model), options.budget)
    if options.small:
        small = pyspec.load(options.small, dtype=DTYPES[options.dtype], device="cpu")
        found["small model, first"] = (lambda: ModelDrafter(small, model), 2)
        found["small model"] = (lambda: ModelDrafter(small, model), options.budget)
    return found


def run(model, tokens: list[list[int]], drafts: dict[str, Made], new_tokens: int) -> dict[str, list[Stats]]:
    """What each draft did, prompt by prompt, and plain decoding; a drafter keeps what it learns."""
    drafters = {"plain": (None, 1)} | {name: (make(), budget) for name, (make, budget) in drafts.items()}
    found: dict[str, list[Stats]] = {name: [] for name in drafters}
    for prompt in tokens:
        expected = None
        for name, (drafter, budget) in drafters.items():
            text = generate(model, prompt, drafter=drafter, budget=budget, max_new_tokens=new_tokens)
            expected = text.tokens if expected is None else expected
            if text.tokens != expected:
                raise RuntimeError(f"{name} changed the text of a prompt of {len(prompt)} tokens")
            found[name].append(text.stats)
    return found


def figures(stats: list[Stats]) -> dict[str, float]:
    seconds = sum(one.decode_seconds for one in stats)
    rounds = sum(sum(one.accepted_lengths) for one in stats)
    tokens = sum(length * count for one in stats for length, count in enumerate(one.accepted_lengths))
    return {
        "tokens_per_round": tokens / max(1, rounds),
        "tokens_per_second": tokens / seconds,
        "draft_share": sum(one.draft_seconds for one in stats) / seconds,
    }


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="default: int8")
    parser.add_argument("--head", nargs="+", default=[], help="folders of trained heads, of any kind")
    parser.add_argument("--small", help="a draft model's folder")
    parser.add_argument("--budget", type=lambda text: text if text == "auto" else positive(text), default="auto")
    parser.add_argument("--limit", type=positive, default=1, help="prompts of a category; default: 1")
    parser.add_argument("--new-tokens", type=positive, default=128, help="default: 128")
    options = parse(parser)
    model = pyspec.load(options.model, dtype=DTYPES[options.dtype], device="cpu")
    questions = prompts.first_of_each_category(prompts.spec_bench(), options.limit)
    tokens = [question.tokens(model) for question in questions]
    stats = run(model, tokens, drafts_of(model, options), options.new_tokens)
    categories = [question.category for question in questions]
    rows = {}
    for name, of_prompts in stats.items():
        by_category = {
            category: figures([one for one, own in zip(of_prompts, categories, strict=True) if own == category])
            for category in dict.fromkeys(categories)
        }
        rows[name] = {**figures(of_prompts), "categories": by_category}
        row = rows[name]
        speedup = row["tokens_per_second"] / rows["plain"]["tokens_per_second"]
        print(
            f"{name:20} {row['tokens_per_round']:.2f} tokens a round, {row['tokens_per_second']:.1f} a second "
            f"({speedup:.2f}x), drafting {row['draft_share']:.0%}"
        )
    settings = {name: value for name, value in vars(options).items() if name != "threads"}
    measure.save("trained_drafts", {"machine": measure.machine(), "settings": settings, "drafts": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
