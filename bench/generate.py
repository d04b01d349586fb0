"""Is pyspec faster than what I would use instead, on real prompts?

    python bench/generate.py            a table, bench/results/generate_<dtype>.{json,png}

Every engine continues the same token ids greedily, with the same weights in the same dtype, in one process, in turn
prompt by prompt. "Decoding" begins with the first new token; "end to end" is the whole call, prefill included. A rate
is all tokens over all seconds. The drafters start empty and keep what they learn from prompt to prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import peers
import steps
from command_line import DTYPES, parse, parser_of, positive
from peers import Engine, Run

import pyspec
from pyspec import measure
from pyspec.cli.arguments import add_budget_argument
from pyspec.controllers import LARGEST
from pyspec.measure import first_difference, prompts, ratio
from pyspec.stats import PHASES

# in bf16, from the project's plan: how many times as fast in decoding
GOALS = {
    "pyspec merged": {"pyspec plain": 1.4, "llama.cpp": 1.35, "transformers": 7.0, "transformers lookup": 5.0},
    "transformers pyspec": {"transformers": 2.0, "transformers lookup": 1.5},
    "transformers native": {"transformers": 2.0, "transformers lookup": 1.5},
    "llama.cpp pyspec": {"llama.cpp": 1.15},
}
LEAST_OF_A_CATEGORY = 0.97  # of plain decoding
WARM_UP_TOKENS = 32


def warm_up(engines: dict[str, Engine], prompt: list[int]) -> dict[str, Run]:
    """One short run of each engine, after one that pays for what happens only once."""
    runs = {}
    for name, engine in engines.items():
        engine.run(prompt, WARM_UP_TOKENS)
        runs[name] = engine.run(prompt, WARM_UP_TOKENS)
    return runs


def expected_seconds(warm: dict[str, Run], warm_prompt: list[int], tokens: list[list[int]], new_tokens: int) -> float:
    """What one pass of all engines over the prompts will take, if no text ends early."""
    seconds = 0.0
    for run in warm.values():
        prefill = (run.total_seconds - run.decode_seconds) / len(warm_prompt)
        decode = run.decode_seconds / max(1, run.decode_tokens)
        seconds += prefill * sum(map(len, tokens)) + decode * new_tokens * len(tokens)
    return seconds


def measure_all(
    engines: dict[str, Engine], tokens: list[list[int]], new_tokens: int, repeats: int, advance
) -> dict[str, list[Run]]:
    """Each engine's runs, one for each prompt: the one of median total time of `repeats` passes."""
    passes: dict[str, list[list[Run]]] = {name: [[] for _ in tokens] for name in engines}
    for _ in range(repeats):
        for engine in engines.values():
            engine.restart()
        for index, prompt in enumerate(tokens):
            for name, engine in engines.items():
                advance(name)
                passes[name][index].append(engine.run(prompt, new_tokens))
    return {name: [_median(runs) for runs in of_prompts] for name, of_prompts in passes.items()}


def _median(runs: list[Run]) -> Run:
    return sorted(runs, key=lambda run: run.total_seconds)[(len(runs) - 1) // 2]


def figures(runs: Sequence[Run], plain: Sequence[Run]) -> dict:
    """One engine's figures over some prompts; plain holds pyspec's plain decoding of the same ones."""
    decode_seconds = sum(run.decode_seconds for run in runs)
    decode_tokens = sum(run.decode_tokens for run in runs)
    differences = [first_difference(run.tokens, other.tokens) for run, other in zip(runs, plain, strict=True)]
    different = [place for place in differences if place is not None]
    return {
        "tokens_per_second": ratio(decode_tokens, decode_seconds),
        "tokens_per_second_end_to_end": ratio(
            sum(len(run.tokens) for run in runs), sum(run.total_seconds for run in runs)
        ),
        "tokens_per_round": ratio(decode_tokens, sum(run.rounds for run in runs)),
        "phase_shares": {
            phase: ratio(sum(run.phase_seconds[phase] for run in runs), decode_seconds)
            for phase in PHASES
            if all(phase in run.phase_seconds for run in runs)
        },
        "equal_to_plain": len(runs) - len(different),
        "median_first_difference": statistics.median(different) if different else None,
    }


def report(questions: list[prompts.Prompt], tokens: list[list[int]], runs: dict[str, list[Run]]) -> dict:
    """The figures of every engine, over all prompts and by category, and the plain facts of every run."""
    plain = runs["pyspec plain"]
    overall = {name: figures(engine_runs, plain) for name, engine_runs in runs.items()}
    for row in overall.values():
        for other in ("transformers", "pyspec plain"):
            if other in overall:
                row[f"over {other}"] = {
                    key: ratio(row[key], overall[other][key])
                    for key in ("tokens_per_second", "tokens_per_second_end_to_end")
                }
    categories = {}
    for category in dict.fromkeys(question.category for question in questions):
        members = [index for index, question in enumerate(questions) if question.category == category]
        categories[category] = {
            name: figures([engine_runs[index] for index in members], [plain[index] for index in members])
            for name, engine_runs in runs.items()
        }
    return {
        "engines": overall,
        "categories": categories,
        "prompts": [
            {
                "question_id": question.question_id,
                "category": question.category,
                "prompt_tokens": len(tokens[index]),
                "runs": {
                    name: {
                        "new_tokens": len(engine_runs[index].tokens),
                        "rounds": engine_runs[index].rounds,
                        "seconds": round(engine_runs[index].total_seconds, 4),
                        "decode_seconds": round(engine_runs[index].decode_seconds, 4),
                        "first_difference": first_difference(engine_runs[index].tokens, plain[index].tokens),
                    }
                    for name, engine_runs in runs.items()
                },
            }
            for index, question in enumerate(questions)
        ],
    }


def show(result: dict) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    count = len(result["prompts"])
    columns = ("tokens/s", "end to end", "over transformers", "over plain", "tokens/round", *PHASES, "same as plain")
    table = measure.new_table("", *columns, title=title(result))
    for name, row in result["engines"].items():
        cells = [f"{row['tokens_per_second']:.1f}", f"{row['tokens_per_second_end_to_end']:.1f}"]
        for other in ("transformers", "pyspec plain"):
            over = row.get(f"over {other}")
            cells.append("" if over is None else " / ".join(f"{value:.2f}x" for value in over.values()))
        cells.append(f"{row['tokens_per_round']:.2f}")
        cells += [f"{row['phase_shares'][phase]:.1%}" if row["phase_shares"] else "" for phase in PHASES]
        difference = row["median_first_difference"]
        cells.append(
            f"{row['equal_to_plain']}/{count}" + ("" if difference is None else f", others from {difference:.0f}")
        )
        table.add_row(name, *cells)
    console.print(table)
    console.print("ratios: decoding / end to end; others from: the median place of the first different token")
    for name, reason in result["missing"].items():
        console.print(f"[red]missing: {name}[/red] ({reason})")

    table = measure.new_table("", *result["engines"], title="tokens/s in decoding")
    for category, rows in result["categories"].items():
        table.add_row(category, *(f"{row['tokens_per_second']:.1f}" for row in rows.values()))
    console.print(table)
    has_goals = result["device"] == "cpu" and result["dtype"] == "bf16"
    steps.show(console, result["steps"], has_goals)
    merged = result["engines"].get("pyspec merged")
    if merged is None or not has_goals:
        return
    speedups = {
        category: ratio(rows["pyspec merged"]["tokens_per_second"], rows["pyspec plain"]["tokens_per_second"])
        for category, rows in result["categories"].items()
    }
    worst = min(speedups, key=speedups.__getitem__)
    engines = result["engines"]
    for ours, goals in GOALS.items():
        found = [
            f"{ratio(engines[ours]['tokens_per_second'], engines[name]['tokens_per_second']):.2f}x {name} (goal {goal})"
            for name, goal in goals.items()
            if ours in engines and name in engines
        ]
        if found:
            console.print(f"{ours} in decoding: {', '.join(found)}")
    least = f"{speedups[worst]:.2f}x plain (goal {LEAST_OF_A_CATEGORY})"
    console.print(f"the merged drafter's worst category is {worst} with {least}")


def title(result: dict) -> str:
    machine = result["machine"]
    where = f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads of {machine['cores']} cores"
    return (
        f"{result['model']}, {result['dtype']}, {len(result['prompts'])} Spec-Bench prompts, greedy, "
        f"at most {result['new_tokens']} new tokens\n"
        f"{machine['gpu'] if result['device'] == 'cuda' else where}, torch {machine['torch']}, {machine['date']}"
    )


def plot(result: dict, path) -> None:
    plt = measure.pyplot()
    names = list(result["engines"])
    palette = {
        "pyspec": plt.get_cmap("Blues"),
        "transformers": plt.get_cmap("Oranges"),
        "llama.cpp": plt.get_cmap("Greys"),
    }
    families = {family: [name for name in names if name.startswith(family)] for family in palette}
    colors = {
        name: palette[family](0.35 + 0.55 * (place + 1) / len(members))
        for family, members in families.items()
        for place, name in enumerate(members)
    }
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(13, 9), height_ratios=(1, 1.3))

    for offset, (key, alpha) in enumerate((("tokens_per_second", 1.0), ("tokens_per_second_end_to_end", 0.55))):
        rates = [result["engines"][name][key] for name in names]
        places = [index + 0.4 * offset for index in range(len(names))]
        bars = top.bar(places, rates, 0.4, color=[colors[name] for name in names], alpha=alpha)
        top.bar_label(bars, [f"{rate:.0f}" for rate in rates], fontsize=8)
    labels = [*names, *(f"{name}\n(missing)" for name in result["missing"])]
    top.set_xticks([index + 0.2 for index in range(len(labels))], labels, fontsize=9)
    top.set_ylabel("tokens a second")
    top.set_title("all prompts: decoding (left bar) and end to end, prefill included (right bar)", fontsize=10)

    categories = list(result["categories"])
    width = 0.85 / len(names)
    for index, name in enumerate(names):
        rates = [result["categories"][category][name]["tokens_per_second"] for category in categories]
        places = [place + index * width for place in range(len(categories))]
        bottom.bar(places, rates, width, color=colors[name], label=name)
    bottom.set_xticks(
        [place + 0.425 - width / 2 for place in range(len(categories))],
        [category.replace("_", "\n") for category in categories],
        fontsize=9,
    )
    bottom.set_ylabel("tokens a second")
    bottom.set_title("decoding, by category", fontsize=10)
    bottom.legend(fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title(result), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def machine() -> dict:
    """measure.machine, with what only these engines depend on."""
    info = measure.machine() | {"cores": os.cpu_count()}
    for package in ("transformers", "llama-cpp-python"):
        try:
            info[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            info[package] = None
    return info


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__, devices=True)
    parser.add_argument("--limit", type=positive, default=5, help="prompts of each category; default: 5")
    parser.add_argument("--new-tokens", type=positive, default=128, help="default: 128")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all engines; default: bf16")
    parser.add_argument(
        "--drafters", nargs="+", choices=peers.DRAFTERS, default=["merged"], help="of pyspec; default: merged"
    )
    add_budget_argument(parser)
    parser.add_argument("--repeats", type=positive, default=1, help="passes over the prompts; medians are taken")
    parser.add_argument("--model", default="demo", help="as for pyspec.load, of the Llama family; default: demo")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the tables")
    return parse(parser)


def main() -> int:
    options = arguments()
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("loading the engines"):
        model = pyspec.load(options.model, dtype=DTYPES[options.dtype], device=options.device)
        questions = prompts.first_of_each_category(prompts.spec_bench(), options.limit)
        tokens = [question.tokens(model) for question in questions]
        nodes = LARGEST if isinstance(options.budget, str) else options.budget
        context = max(map(len, tokens)) + options.new_tokens + max(nodes, peers.LOOKUP_TOKENS + 1)
        is_demo = options.model == "demo" and options.device == "cpu"
        engines, missing = peers.engines(model, options.drafters, options.budget, context, options.threads, is_demo)
    for name, reason in missing.items():
        console.print(f"[red]missing: {name}[/red] ({reason})")
    with console.status("measuring steps"):
        measured_steps = steps.steps(model)
    with console.status("warming up"):
        warm = warm_up(engines, tokens[0])
    minutes = options.repeats * expected_seconds(warm, tokens[0], tokens, options.new_tokens) / 60
    console.print(f"{len(tokens)} prompts, {len(engines)} engines: about {minutes:.0f} minutes at the warm-up's speed")

    with measure.counted(console, options.repeats * len(tokens) * len(engines)) as advance:
        runs = measure_all(engines, tokens, options.new_tokens, options.repeats, advance)

    result = {
        "machine": machine(),
        "model": "SmolLM2-135M-Instruct" if options.model == "demo" else Path(options.model).name,
        "device": options.device,
        "dtype": options.dtype,
        "budget": options.budget,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
        "missing": missing,
        "steps": measured_steps,
        **report(questions, tokens, runs),
    }
    path = measure.save(f"generate_{options.dtype}{'' if options.device == 'cpu' else '_cuda'}", result)
    plot(result, path.with_suffix(".png"))
    if options.json:
        print(json.dumps(result))
    else:
        show(result)
    console.print(f"wrote {path} and {path.with_suffix('.png').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
