"""pyspec bench: drafters against plain decoding, controllers against each other, and the kernels one by one."""

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
    others = bench.add_subparsers(metavar="drafters, controllers, kernels, compare")
    every = others.add_parser(
        "drafters",
        help="what every drafter is worth, by category, greedily and drawn",
        description="What every drafter is worth: tokens a round, speed over plain decoding and the share of drafting, "
        "by category, greedily and drawn; and the speed of several drawn answers to one problem.",
    )
    _add_drafters_arguments(every, (), (0.0, 0.8), answers=4)
    controllers = others.add_parser(
        "controllers",
        help="tokens a second of every controller, beside the best number of nodes",
        description="Tokens a second by category for every controller, beside the best fixed number of nodes of each "
        "category and an oracle that knows each round's best one. A text is written once while the drafters are "
        "recorded; then every controller plays the same rounds, by what they cost on this machine.",
    )
    _add_controllers_arguments(controllers)
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


def _add_controllers_arguments(parser: argparse.ArgumentParser) -> None:
    from pyspec.controllers import CONTROLLERS
    from pyspec.drafters import DRAFTERS

    add_model_arguments(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    parser.add_argument("--limit", type=int, help="at most this many prompts of each category")
    parser.add_argument(
        "--drafter",
        action="append",
        default=[],
        metavar="NAME",
        help=f"one of {', '.join(DRAFTERS)}; repeatable: of several, controllers choose; default: merged",
    )
    parser.add_argument("--draft-model", metavar="MODEL", help="a smaller model of the same vocabulary is a drafter")
    parser.add_argument("--draft-head", metavar="HEAD", help="a trained EAGLE-3 head is a drafter, without tables")
    parser.add_argument(
        "--controllers",
        nargs="+",
        metavar="NAME",
        help=f"of {', '.join(CONTROLLERS)}, or several with + between them; default: all that take the drafters",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE as JSON, and a plot beside it")
    parser.set_defaults(command=_bench_controllers)


def _bench_controllers(arguments: argparse.Namespace) -> int:
    from pyspec.controllers import read_controller
    from pyspec.drafters import DRAFTERS
    from pyspec.generate import check_limits

    prompts = _prompts(arguments)
    _check_folder("--output", arguments.output)
    check_limits("auto", arguments.max_new_tokens)
    for name in arguments.controllers or []:
        read_controller(name)
    for name in arguments.drafter:
        DRAFTERS.named("--drafter", name, "repeatable")
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.measure import controllers, counted, machine, name_of, write

    drafters = _drafters(arguments, model, console)
    tokens = [(prompt.category, prompt_tokens(model, prompt.text, arguments.raw)) for prompt in prompts]
    with counted(console, len(tokens)) as advance:
        measured = controllers.measure(
            model,
            tokens,
            drafters,
            arguments.controllers,
            max_new_tokens=arguments.max_new_tokens,
            advance=advance,
        )
    report = {"machine": machine(), "model": arguments.model, "dtype": name_of(model.dtype), **measured}
    if arguments.output is not None:
        write(arguments.output, report)
        controllers.plot(report, arguments.output.with_suffix(".png"))
        console.print(f"wrote {arguments.output} and {arguments.output.with_suffix('.png').name}", highlight=False)
    _show(arguments, report, controllers.tables(report))
    return 0


def _drafters(arguments: argparse.Namespace, model, console) -> dict:
    """New drafters by name, which know nothing yet of any text."""
    from pyspec.drafters import new_drafter
    from pyspec.drafters.eagle3 import Eagle3
    from pyspec.drafters.model import ModelDrafter

    others = arguments.draft_model is not None or arguments.draft_head is not None
    names = arguments.drafter or ([] if others else ["merged"])
    prepare(names, model, console)
    drafters = {name: new_drafter(name, model) for name in names}
    if arguments.draft_model is not None:
        drafters["draft model"] = ModelDrafter(load_model(arguments, console, arguments.draft_model), model)
    if arguments.draft_head is not None:
        drafters["head"] = Eagle3(arguments.draft_head, model, tables=())
    return drafters


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
    _show(arguments, report, drafters.tables(report))
    return 0


def _show(arguments: argparse.Namespace, report: dict, tables) -> None:
    """Prints a report, as JSON where that was asked for, else its tables."""
    if arguments.json:
        print_json(report)
        return
    from rich.console import Console

    shown = Console(highlight=False)
    for table in tables:
        shown.print(table)


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
