"""Does speculation still pay on a machine that is not idle?

    python bench/neighbour.py           a table, bench/results/neighbour.json

Plain decoding and speculation of the demo model (drafter "merged", budget "auto", greedy) and tree_attention of 8 nodes
behind 2,048 keys over SDPA with its dense mask: first on the machine as it is, then beside one process that computes
all the time and is pinned nowhere, again and again in turn. Figures are medians over the turns.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from bench_tree_attention import Problem
from command_line import DTYPES, parse, parser_of, positive

import pyspec
from pyspec import measure
from pyspec.drafters import new_drafter
from pyspec.measure import prompts

TARGETS = {"plain over idle": 0.75, "speculation over plain": 1.35, "tree_attention over SDPA": 1.3}


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """A process that computes all the time; it is stopped at first."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.wait()


def rates(model, drafter, tokens: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Tokens a second of decoding, plain and with drafts, prompt by prompt in turn."""
    seconds, counted = dict.fromkeys(("plain", "speculation"), 0.0), dict.fromkeys(("plain", "speculation"), 0)
    for prompt in tokens:
        for name in seconds:
            with_drafts = {} if name == "plain" else {"budget": "auto"}
            stats = pyspec.generate(
                model, prompt, drafter=None if name == "plain" else drafter, max_new_tokens=new_tokens, **with_drafts
            ).stats
            seconds[name] += stats.decode_seconds
            counted[name] += stats.new_tokens - 1
    return {name: counted[name] / seconds[name] for name in seconds}


def attention_seconds(problems: list[Problem], repeats: int) -> dict[str, float]:
    """Seconds of tree_attention and of SDPA with a float mask, in turn."""
    turns = iter(range(2**62))
    calls = {
        "tree_attention": lambda: problems[next(turns) % len(problems)].pyspec(),
        "SDPA": lambda: (problem := problems[next(turns) % len(problems)]).sdpa(problem.bias),
    }
    return measure.in_turn(calls, repeats)


def run(model, tokens: list[list[int]], new_tokens: int, turns: int, repeats: int) -> dict:
    """Medians over the turns, idle and beside the busy process."""
    drafter, problems = new_drafter("merged", model), [Problem(8, 2048, torch.bfloat16) for _ in range(8)]
    rates(model, drafter, tokens, new_tokens)  # measures costs, and fills the drafter's tables
    found: dict[str, list[dict[str, float]]] = {"idle": [], "busy": []}
    with busy_process() as process:
        for _ in range(turns):
            for name, lines in found.items():
                process.send_signal(signal.SIGSTOP if name == "idle" else signal.SIGCONT)
                time.sleep(0.3)
                lines.append(rates(model, drafter, tokens, new_tokens) | attention_seconds(problems, repeats))
    medians = {
        name: {key: statistics.median(line[key] for line in lines) for key in lines[0]} for name, lines in found.items()
    }
    for row in medians.values():
        row["plain over idle"] = row["plain"] / medians["idle"]["plain"]
        row["speculation over plain"] = row["speculation"] / row["plain"]
        row["tree_attention over SDPA"] = row["SDPA"] / row["tree_attention"]
    return medians


def main() -> None:
    parser = parser_of(__doc__, repeats=150)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--prompts", type=positive, default=5)
    parser.add_argument("--new-tokens", type=positive, default=64)
    options = parse(parser)
    model = pyspec.load("demo", dtype=DTYPES[options.dtype], device="cpu")
    questions = prompts.across_categories(prompts.spec_bench(), options.prompts)
    tokens = [question.tokens(model) for question in questions]
    found = run(model, tokens, options.new_tokens, options.turns, options.repeats)
    table = measure.new_table("", "idle", "beside a busy process", "target there")
    for key in found["idle"]:
        shown = ("{:.1f} tokens/s", 1) if key in ("plain", "speculation") else ("{:.2f}x", 1)
        shown = ("{:.0f} us", 1e6) if key in ("tree_attention", "SDPA") else shown
        cells = (shown[0].format(shown[1] * row[key]) for row in found.values())
        table.add_row(key, *cells, f"{TARGETS[key]}x" if key in TARGETS else "")
    from rich.console import Console

    Console().print(table)
    print("wrote", measure.save("neighbour", {"machine": measure.machine(), "dtype": options.dtype, **found}))


if __name__ == "__main__":
    main()
