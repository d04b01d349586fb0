"""pyspec bench: drafters against plain decoding, and the kernels one by one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pyspec.cli.arguments import add_generation_arguments, add_model_arguments, generation_settings
from pyspec.cli.shared import (
    BadInput,
    load_model,
    make_console,
    prepare,
    print_json,
    prompt_tokens,
    read_text,
    set_threads,
)


def add_parser(commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure drafters against plain decoding",
        description="Measure drafters against plain decoding, on the same prompts, in one process. `pyspec bench "
        "drafters` is the same, but measures every drafter, greedily and drawn, where nothing else is asked for.",
    )
    _add_drafters_arguments(bench, ("lookup", "recycling", "merged"), (0.0,), answers=0)
    others = bench.add_subparsers(metavar="drafters, kernels, compare")
    every = others.add_parser(
        "drafters",
        help="what every drafter is worth, by category, greedily and drawn",
        description="What every drafter is worth: tokens a round, speed over plain decoding and the share of drafting, "
        "by category, greedily and drawn; and the speed of several drawn answers to one problem.",
    )
    _add_drafters_arguments(every, (), (0.0, 0.8), answers=4)
    kernels = others.add_parser(
        "kernels",
        help="every kernel in the shapes of six models",
        description="Checks every kernel against its reference in the shapes of six models, and times it beside what "
        "one would use instead, and beside what the machine can do.",
    )
    kernels.add_argument("--op", action="append", metavar="OP", help="repeatable; default: all")
    kernels.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    kernels.add_argument("--threads", type=int, help="of the CPU; default: torch's own choice")
    kernels.add_argument("--json", action="store_true", help="print one JSON object")
    kernels.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    kernels.set_defaults(command=_bench_kernels)
    compare = others.add_parser(
        "compare",
        help="two runs of bench kernels --json",
        description="What became slower between two runs of bench kernels --json; exit status 1 if anything did.",
    )
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.set_defaults(command=_bench_compare)


def _add_drafters_arguments(
    parser: argparse.ArgumentParser, drafters: Sequence[str], temperatures: Sequence[float], answers: int
) -> None:
    """The arguments of measuring drafters, with the defaults given; no drafters are all that the model can have."""
    from pyspec.drafters import DRAFTERS

    add_model_arguments(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    parser.add_argument("--limit", type=int, help="at most this many prompts of each category")
    shown = " ".join(drafters) or "all"
    parser.add_argument("--drafters", nargs="+", action="extend", choices=list(DRAFTERS), help=f"default: {shown}")
    add_generation_arguments(parser, max_new_tokens=128)
    shown = " ".join(f"{temperature:g}" for temperature in temperatures)
    parser.add_argument(
        "--temperatures", nargs="+", type=float, default=temperatures, help=f"0 is greedy; default: {shown}"
    )
    parser.add_argument(
        "--answers", type=int, default=answers, help=f"drawn to one problem; 0 leaves them out; default: {answers}"
    )
    parser.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE as JSON, and a plot beside it")
    parser.set_defaults(command=_bench_drafters, default_drafters=drafters)


def _bench_drafters(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    if arguments.answers < 0:
        raise BadInput(f"--answers must be at least 0, got {arguments.answers}")
    _check_folder("--output", arguments.output)
    settings = generation_settings(arguments, arguments.temperatures)
    settings["seed"] = settings["seed"] or 0  # one for all runs, or there would be nothing to compare
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.measure import counted, drafters, machine, name_of, write

    names = list(dict.fromkeys(arguments.drafters or arguments.default_drafters or drafters.drafters_of(model)))
    tokens = [(prompt.category, prompt_tokens(model, prompt.text, arguments.raw)) for prompt in prompts]
    prepare(names, model, console)
    plan = {"temperatures": arguments.temperatures, "answers": arguments.answers}
    with counted(console, drafters.runs_of(tokens, names, **plan)) as advance:
        measured = drafters.measure(model, tokens, names, advance=advance, **plan, **settings)
    for text, prompt in zip(measured["texts"], prompts, strict=True):
        text["prompt"] = prompt.text
    report = {"machine": machine(), "model": arguments.model, "dtype": name_of(model.dtype)}
    report |= {"prompt_attention": arguments.prompt_attention, **measured}
    if arguments.output is not None:
        write(arguments.output, report)
        picture = arguments.output.with_suffix(".png")
        drafters.plot(report, picture)
        console.print(f"wrote {arguments.output} and {picture.name}", highlight=False)
    if arguments.json:
        print_json(report)
        return 0
    from rich.console import Console

    shown = Console(highlight=False)
    for table in drafters.tables(report):
        shown.print(table)
    return 0


def _prompts(arguments: argparse.Namespace) -> list:
    from pyspec.measure import prompts

    if arguments.limit is not None and arguments.limit < 1:
        raise BadInput(f"--limit must be at least 1, got {arguments.limit}")
    found = prompts.OWN
    if arguments.prompts is not None:
        found = list(prompts.of_lines(read_text(arguments.prompts), str(arguments.prompts)))
    return prompts.first_of_each_category(found, arguments.limit)


def _check_folder(name: str, file: Path | None) -> None:
    if file is not None and not file.absolute().parent.is_dir():
        raise BadInput(f"{name}: there is no folder {file.absolute().parent}")


def _bench_kernels(arguments: argparse.Namespace) -> int:
    _check_folder("--html", arguments.html)
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
