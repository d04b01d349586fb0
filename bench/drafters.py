"""Which drafter is worth what, on real prompts?

    python bench/drafters.py            tables, bench/results/drafters_<dtype>.{json,png}

Spec-Bench prompts by category, greedily and at temperature 0.8, and four drawn answers to each of a few problems. What
it measures is `pyspec bench drafters` (pyspec/measure/drafters.py), which does the same for any prompts.
"""

from __future__ import annotations

import argparse
import sys

import measure
import prompts
import torch
from generate import DTYPES, _budget

import pyspec
from pyspec.drafters import NAMES
from pyspec.measure import drafters as drafter_bench


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=measure.positive, default=5, help="prompts of each category; default: 5")
    parser.add_argument("--new-tokens", type=measure.positive, default=128, help="default: 128")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--drafters", nargs="+", choices=NAMES, help="default: all")
    parser.add_argument("--budget", type=_budget, default="auto", help="tree nodes a round; default: auto")
    parser.add_argument("--threads", type=measure.positive, default=2, help="default: 2")
    parser.add_argument("--model", default="demo", help="as for pyspec.load; default: demo")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    model = pyspec.load(options.model, dtype=DTYPES[options.dtype])
    tokens = [(prompt.category, prompt.tokens(model)) for prompt in prompts.first_of_each_category(options.limit)]
    names = options.drafters or drafter_bench.drafters_of(model)
    total = drafter_bench.runs_of(tokens, names, drafter_bench.TEMPERATURES, drafter_bench.ANSWERS)
    with measure.progress(console) as progress:
        task = progress.add_task("", total=total, completed=-1)
        report = drafter_bench.measure(
            model,
            tokens,
            names,
            budget=options.budget,
            max_new_tokens=options.new_tokens,
            advance=lambda name: progress.update(task, description=name, advance=1),
        )
    machine = measure.machine()
    path = measure.save(f"drafters_{options.dtype}", {"machine": machine, "model": options.model, **report})
    title = f"{options.model}, {options.dtype}, {len(tokens)} Spec-Bench prompts; {machine['cpu']}, {machine['date']}"
    drafter_bench.plot(report, path.with_suffix(".png"), title)
    for table in drafter_bench.tables(report):
        console.print(table)
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
