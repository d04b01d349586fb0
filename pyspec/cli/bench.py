"""pyspec bench: drafters against plain decoding, every drafter by category, and the kernels one by one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pyspec.arguments import check_unicode
from pyspec.cli.arguments import add_budget_argument, add_generation_arguments, add_model_arguments, generation_settings
from pyspec.cli.shared import (
    DRAFTERS,
    BadInput,
    fail,
    first_difference,
    load_model,
    make_console,
    new_table,
    prepare,
    print_json,
    prompt_tokens,
    ratio_of,
    read_text,
    set_threads,
)

BENCH_PROMPTS = (
    ("summary", "Summarise in three sentences why the sky is blue, and then say the same once more in simpler words."),
    ("code", "Write a Python function that returns the n-th Fibonacci number, then the same function with a cache."),
    ("extraction", "List every number in this text, in order: 3 apples, 12 pears and 7 plums cost 22 euros, not 25."),
    ("writing", "Write a short letter to a friend about a walk in the mountains."),
)


def add_parser(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure drafters against plain decoding",
        description="Measure drafters against plain decoding, on the same prompts, in one process.",
    )
    add_model_arguments(bench)
    bench.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    bench.add_argument("--limit", type=int, help="at most this many prompts of each category")
    bench.add_argument(
        "--drafter", action="append", choices=DRAFTERS[:-1], help="repeatable; default: lookup, recycling and merged"
    )
    add_generation_arguments(bench, max_new_tokens=128)
    bench.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    bench.set_defaults(command=_bench)
    others = bench.add_subparsers(metavar="drafters, kernels, compare")
    _add_drafters_bench(others)
    _add_kernels_bench(others)


def _add_drafters_bench(commands) -> None:
    parser = commands.add_parser(
        "drafters",
        help="what every drafter is worth, by category, greedily and drawn",
        description="What every drafter is worth: tokens a round, speed over plain decoding and the share of drafting, "
        "by category, greedily and drawn; and the speed of several drawn answers to one problem.",
    )
    add_model_arguments(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    parser.add_argument("--limit", type=int, help="at most this many prompts of each category")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS[:-1], help="default: all")
    add_budget_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8], help="default: 0 0.8")
    parser.add_argument("--answers", type=int, default=4, help="to one problem; 0 leaves them out; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE as JSON, and a plot beside it")
    parser.set_defaults(command=_bench_drafters)


def _add_kernels_bench(commands) -> None:
    kernels = commands.add_parser(
        "kernels",
        help="every kernel in the shapes of five models",
        description="Checks every kernel against its reference in the shapes of five models, and times it beside what "
        "one would use instead, and beside what the machine can do.",
    )
    kernels.add_argument("--op", action="append", metavar="OP", help="repeatable; default: all")
    kernels.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    kernels.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    kernels.add_argument("--json", action="store_true", help="print one JSON object")
    kernels.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    kernels.set_defaults(command=_bench_kernels)
    compare = commands.add_parser(
        "compare",
        help="two runs of bench kernels --json",
        description="What became slower between two runs of bench kernels --json; exit status 1 if anything did.",
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(command=_bench_compare)


def _bench(arguments: argparse.Namespace) -> int:
    prompts = _read_bench_prompts(arguments)
    settings = generation_settings(arguments)
    if settings["seed"] is None:
        settings["seed"] = 0  # one for all runs, or there would be nothing to compare
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.drafters import drafter_from_name
    from pyspec.generate import generate

    names = list(dict.fromkeys(arguments.drafter or ("lookup", "recycling", "merged")))
    prepare(names, model, console)
    # one drafter for all prompts, as a server would keep it
    drafters = {"plain": None} | {name: drafter_from_name(name, model) for name in names}
    tokens = [prompt_tokens(model, text, arguments.raw) for _, text in prompts]
    runs = {name: [] for name in drafters}
    with counted(console, len(prompts) * len(drafters)) as advance:
        generate(model, tokens[0], drafter=None, max_new_tokens=4)  # the first call of a kernel is not its speed
        for prompt in tokens:
            for name, drafter in drafters.items():
                advance(name)
                rule = settings["acceptance"] if drafter is not None else "exact"
                run = generate(model, prompt, drafter=drafter, **settings | {"acceptance": rule})
                if run.finish_reason == "interrupted":
                    raise KeyboardInterrupt
                if run.finish_reason == "error":
                    return fail(run.error, 1)
                runs[name].append(run)

    rows = [_bench_row(name, runs[name], runs["plain"]) for name in runs]
    if arguments.json:
        report = {"model": arguments.model, "dtype": str(model.dtype).removeprefix("torch."), **settings}
        report |= {"prompt_attention": arguments.prompt_attention}
        report |= {"drafters": rows, "prompts": [_bench_prompt(i, prompts, runs) for i in range(len(prompts))]}
        print_json(report)
        return 0
    table = new_table("", "tokens/s", "speed-up", "tokens/round", "draft share", "same as plain")
    for row in rows:
        table.add_row(
            row["drafter"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['speed_up']:.2f}x",
            f"{row['mean_accepted_length']:.2f}",
            f"{row['draft_share']:.1%}",
            f"{row['equal']}/{len(prompts)}",
        )
    from rich.console import Console

    Console().print(table)
    return 0


def _bench_drafters(arguments: argparse.Namespace) -> int:
    prompts = _read_bench_prompts(arguments)
    if arguments.answers < 0:
        raise BadInput(f"--answers must be at least 0, got {arguments.answers}")
    if arguments.output is not None and not arguments.output.absolute().parent.is_dir():
        raise BadInput(f"--output: there is no folder {arguments.output.absolute().parent}")
    from pyspec.generate import check_limits
    from pyspec.sampling.sampler import Sampler

    check_limits(arguments.budget, arguments.max_new_tokens)
    for temperature in arguments.temperatures:
        Sampler(temperature, seed=arguments.seed)
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.machine import cpu_name
    from pyspec.measure import drafters as drafter_bench

    names = list(dict.fromkeys(arguments.drafters or drafter_bench.drafters_of(model)))
    tokens = [(category, prompt_tokens(model, text, arguments.raw)) for category, text in prompts]
    prepare(names, model, console)
    total = drafter_bench.runs_of(tokens, names, arguments.temperatures, arguments.answers)
    with counted(console, total) as advance:
        report = drafter_bench.measure(
            model,
            tokens,
            names,
            budget=arguments.budget,
            max_new_tokens=arguments.max_new_tokens,
            temperatures=arguments.temperatures,
            answers=arguments.answers,
            seed=arguments.seed,
            advance=advance,
        )
    dtype = str(model.dtype).removeprefix("torch.")
    report = {"model": arguments.model, "dtype": dtype, "cpu": cpu_name(), **report}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1), encoding="utf-8")
        picture = arguments.output.with_suffix(".png")
        drafter_bench.plot(report, picture, f"{arguments.model}, {dtype}, {cpu_name()}")
        console.print(f"wrote {arguments.output} and {picture.name}", highlight=False)
    if arguments.json:
        print_json(report)
        return 0
    from rich.console import Console

    shown = Console(highlight=False)
    for table in drafter_bench.tables(report):
        shown.print(table)
    return 0


def _bench_kernels(arguments: argparse.Namespace) -> int:
    if arguments.html is not None and not arguments.html.absolute().parent.is_dir():
        raise BadInput(f"--html: there is no folder {arguments.html.absolute().parent}")
    set_threads(arguments)
    console = make_console()
    from rich.console import Console

    from pyspec.measure import kernels
    from pyspec.measure.cases import OPS

    result = kernels.run(arguments.op or OPS, arguments.device, console)
    if arguments.html is not None:
        from pyspec.measure.report import page

        arguments.html.write_text(page(result), encoding="utf-8")
        console.print(f"wrote {arguments.html}", highlight=False)
    if arguments.json:
        print_json(result)
    else:
        kernels.show(result, Console())
    return 1 if any("failed" in row for row in result["rows"]) else 0


def _bench_compare(arguments: argparse.Namespace) -> int:
    make_console()  # says what is missing
    from rich.console import Console

    from pyspec.measure import kernels

    lines = kernels.compare(kernels.read(arguments.before), kernels.read(arguments.after))
    kernels.show_comparison(lines, Console())
    return 1 if any(line["regressed"] for line in lines) else 0


@contextmanager
def counted(console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over runs; what it gives is called with the name of each before it begins."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda name: progress.update(task, description=name, advance=1)


def _bench_row(name: str, runs: list, plain: list) -> dict:
    """The figures of one drafter over all prompts: sums first, ratios then."""
    decode = sum(run.stats.decode_seconds for run in runs)
    lengths = [(length, count) for run in runs for length, count in enumerate(run.stats.accepted_lengths)]
    tokens, rounds = sum(length * count for length, count in lengths), sum(count for _, count in lengths)
    plain_decode = sum(run.stats.decode_seconds for run in plain)
    plain_tokens = sum(run.stats.new_tokens - 1 for run in plain)
    return {
        "drafter": name,
        "tokens_per_second": ratio_of(tokens, decode),
        "speed_up": ratio_of(ratio_of(tokens, decode), ratio_of(plain_tokens, plain_decode)),
        "mean_accepted_length": ratio_of(tokens, rounds),
        "draft_share": ratio_of(sum(run.stats.draft_seconds for run in runs), decode),
        "equal": sum(run.tokens == other.tokens for run, other in zip(runs, plain, strict=True)),
    }


def _bench_prompt(index: int, prompts: list[tuple[str, str]], runs: dict[str, list]) -> dict:
    plain = runs["plain"][index]
    return {
        "category": prompts[index][0],
        "prompt": prompts[index][1],
        "runs": {
            name: {
                "first_difference": first_difference(run[index].tokens, plain.tokens),
                "stats": run[index].stats.to_dict(),
            }
            for name, run in runs.items()
        },
    }


def _read_bench_prompts(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(category, prompt) pairs."""
    if arguments.limit is not None and arguments.limit < 1:
        raise BadInput(f"--limit must be at least 1, got {arguments.limit}")
    prompts = list(BENCH_PROMPTS if arguments.prompts is None else _prompts_of_file(arguments.prompts))
    kept: dict[str, list[tuple[str, str]]] = {}
    for prompt in prompts:
        kept.setdefault(prompt[0], []).append(prompt)
    return [prompt for category in kept.values() for prompt in category[: arguments.limit]]


def _prompts_of_file(path: Path) -> Iterator[tuple[str, str]]:
    # not splitlines, which takes characters for ends of lines that JSON has inside of its strings
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise BadInput(f"{path} holds no prompts")
    for number, line in lines:
        try:
            entry = json.loads(line)
            turns = [entry["prompt"]] if "prompt" in entry else entry["turns"]
            if not isinstance(turns, list) or not isinstance(turns[0], str) or not turns[0].strip():
                raise ValueError("no prompt")
            check_unicode("prompt", turns[0])
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise BadInput(f'{path} line {number} must be a JSON object with "prompt" or "turns"') from None
        yield str(entry.get("category", "all")), turns[0]
