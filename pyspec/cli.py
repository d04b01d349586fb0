"""The command line: pyspec generate, pyspec bench, pyspec info.

The text goes to stdout, everything else to stderr; with --json stdout holds one JSON object and nothing else.
Exit codes: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata, util
from pathlib import Path

# nothing heavy here: `pyspec --help` must answer at once, so torch and rich are imported by the commands

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
DRAFTERS = ("merged", "lookup", "recycling", "suffix", "stand", "aded", "ngrammys", "layer_skip", "none")
ACCEPTANCE = ("exact", "with_replacement", "recursive", "k_seq", "block", "traversal", "typical")
CACHES = ("dense", "int8", "int4", "kivi-2bit", "gear-l-2bit", "gear-2bit", "gear-4bit", "rvq")
BENCH_PROMPTS = (
    ("summary", "Summarise in three sentences why the sky is blue, and then say the same once more in simpler words."),
    ("code", "Write a Python function that returns the n-th Fibonacci number, then the same function with a cache."),
    ("extraction", "List every number in this text, in order: 3 apples, 12 pears and 7 plums cost 22 euros, not 25."),
    ("writing", "Write a short letter to a friend about a walk in the mountains."),
)
PHASES = ("draft", "verify", "accept", "commit")
ENDINGS = {
    "eos": "ended by the model",
    "stop": "ended by a stop string",
    "length": "ended at the limit",
    "interrupted": "interrupted",
    "error": "ended by an error",
}
EXTRAS = {
    "hf": ("gguf", "safetensors", "tokenizers", "huggingface_hub", "transformers", "jinja2", "rich"),
    "bench": ("pytest", "pytest_benchmark", "matplotlib", "accelerate", "llama_cpp"),
    "train": ("transformers", "tokenizers", "safetensors", "rich", "matplotlib"),
    "test": ("pytest", "xdist", "hypothesis", "pytest_benchmark"),
}
INSTRUCTION_SETS = (
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)


class BadInput(Exception):
    """What the user gave does not fit; its text is for the terminal."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" instead of failing
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # the reader of our output left, as `head` does; Python would complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BadInput, ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        return _fail(error, 2)
    except ImportError as error:
        return _fail(error, 1)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", 1)


def _fail(error: object, code: int) -> int:
    print(f"pyspec: {' '.join(str(error).split())}", file=sys.stderr)
    return code


# ---- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyspec", description="Speculative decoding that never changes the text.")
    parser.add_argument("--version", action="version", version=_version("pyspec-kernels"))
    commands = parser.add_subparsers(required=True, metavar="command")

    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt, or - for standard input")
    prompt.add_argument("--file", type=Path, help="read the prompt from a file")
    _add_model_arguments(generate)
    drafter = generate.add_mutually_exclusive_group()
    drafter.add_argument("--drafter", choices=DRAFTERS, default="merged", help="default: merged")
    drafter.add_argument("--draft-model", metavar="MODEL", help="a smaller model of the same vocabulary is the drafter")
    _add_generation_arguments(generate, max_new_tokens=256)
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    generate.add_argument("--raw", action="store_true", help="give the prompt to the model as it is, no chat template")
    generate.add_argument("--no-compare", action="store_true", help="do not run plain decoding for comparison")
    generate.add_argument(
        "--drafter-state", type=Path, metavar="FILE", help="what the drafter has learned: read it if there, then write"
    )
    generate.set_defaults(command=_generate)

    bench = commands.add_parser(
        "bench",
        help="measure drafters against plain decoding",
        description="Measure drafters against plain decoding, on the same prompts, in one process.",
    )
    _add_model_arguments(bench)
    bench.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    bench.add_argument("--limit", type=int, help="at most this many prompts of each category")
    bench.add_argument(
        "--drafter", action="append", choices=DRAFTERS[:-1], help="repeatable; default: lookup, recycling and merged"
    )
    _add_generation_arguments(bench, max_new_tokens=128)
    bench.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    bench.set_defaults(command=_bench)
    _add_drafters_bench(bench.add_subparsers(metavar="drafters"))

    info = commands.add_parser("info", help="what is in use and why", description="Versions, backends and reasons.")
    info.add_argument(
        "--costs", action="store_true", help="measure what verifying a tree costs, and what a tree must give to pay"
    )
    _add_model_arguments(info)
    info.set_defaults(command=_info)
    return parser


def _add_drafters_bench(commands) -> None:
    parser = commands.add_parser(
        "drafters",
        help="what every drafter is worth, by category, greedily and drawn",
        description="What every drafter is worth: tokens a round, speed over plain decoding and the share of drafting, "
        "by category, greedily and drawn; and the speed of several drawn answers to one problem.",
    )
    _add_model_arguments(parser)
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines with "prompt" or "turns"')
    parser.add_argument("--limit", type=int, help="at most this many prompts of each category")
    parser.add_argument("--drafters", nargs="+", choices=DRAFTERS[:-1], help="default: all")
    parser.add_argument(
        "--budget", type=_budget, default="auto", help="tree nodes a round; default: auto, as many as pay"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.8], help="default: 0 0.8")
    parser.add_argument("--answers", type=int, default=4, help="to one problem; 0 leaves them out; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--raw", action="store_true", help="give the prompts to the model as they are")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write FILE as JSON, and a plot beside it")
    parser.set_defaults(command=_bench_drafters)


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="demo", help="demo, a GGUF file, a Hugging Face folder or a hub id; default: demo"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: the model's own")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def _add_generation_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> None:
    parser.add_argument(
        "--budget", type=_budget, default="auto", help="tree nodes a round; default: auto, as many as pay"
    )
    parser.add_argument(
        "--acceptance",
        choices=ACCEPTANCE,
        default="exact",
        help="default: exact; see docs/acceptance.md; typical is lossy",
    )
    parser.add_argument("--max-new-tokens", type=int, default=max_new_tokens, help=f"default: {max_new_tokens}")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens, the default")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens, the default")
    parser.add_argument("--seed", type=int, help="default: a new one, which is shown")
    parser.add_argument("--cache", choices=CACHES, default="dense", help="how keys and values are kept; default: dense")


def _budget(text: str) -> int | str:
    if text != "auto" and not text.lstrip("+-").isdecimal():
        raise argparse.ArgumentTypeError(f"must be a number of nodes or auto, got {text!r}")
    return text if text == "auto" else int(text)


def _generation_settings(arguments: argparse.Namespace) -> dict:
    """The settings of generate, checked before a model is loaded for them."""
    from pyspec.acceptance.sampling import Sampler
    from pyspec.generate import check_limits

    check_limits(arguments.budget, arguments.max_new_tokens)
    Sampler(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    names = ("budget", "acceptance", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "cache")
    return {name: getattr(arguments, name) for name in names}


# ---- pyspec generate


def _generate(arguments: argparse.Namespace) -> int:
    prompt = _read_prompt(arguments)
    if arguments.drafter_state is not None:
        _check_state(arguments)
    settings = _generation_settings(arguments) | {"stop": arguments.stop}
    console = _console()
    model = _load(arguments, console)
    from pyspec.generate import generate

    tokens = _prompt_tokens(model, prompt, arguments.raw)
    drafter = _drafter(arguments, model, console)
    if arguments.drafter_state is not None and arguments.drafter_state.exists():
        drafter.load(arguments.drafter_state)

    stream = None if arguments.json else _write
    result = generate(model, tokens, drafter=drafter, stream=stream, **settings)
    if stream is not None and result.text and not result.text.endswith("\n"):
        _write("\n")
    if arguments.drafter_state is not None:
        drafter.save(arguments.drafter_state)

    plain = None
    if drafter is not None and not arguments.no_compare and result.finish_reason in ("eos", "stop", "length"):
        settings |= {"seed": result.stats.seed, "acceptance": "exact"}
        with console.status("plain decoding of the same prompt, for comparison (--no-compare leaves it out)"):
            plain = generate(model, tokens, drafter=None, **settings)
        if plain.finish_reason == "interrupted":
            plain = None
    if arguments.json:
        print(json.dumps(_generate_report(arguments, model, tokens, result, plain), ensure_ascii=False))
    else:
        _show_figures(console, arguments, tokens, result, plain)
    if result.finish_reason == "error":
        return _fail(result.error, 1)
    return 130 if result.finish_reason == "interrupted" else 0


def _drafter(arguments: argparse.Namespace, model, console):
    """The drafter that was asked for, or None."""
    from pyspec.drafting import drafter_from_name

    if arguments.draft_model is None:
        if arguments.drafter == "none":
            return None
        _prepare([arguments.drafter], model, console)
        return drafter_from_name(arguments.drafter, model)
    from pyspec.drafting.model import ModelDrafter
    from pyspec.growth.dyspec import DySpecThreshold
    from pyspec.growth.static import FixedBranching

    growth = {
        "with_replacement": FixedBranching((3, 2, 1, 1), "with replacement"),
        "k_seq": FixedBranching((3, 2, 1, 1), "with replacement"),
        "recursive": DySpecThreshold(0.05),
        "traversal": DySpecThreshold(0.05),
        "block": FixedBranching((1,) * 6),
    }
    return ModelDrafter(
        _load(arguments, console, arguments.draft_model),
        model,
        growth.get(arguments.acceptance),
        temperature=arguments.temperature or 1.0,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
    )


def _read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.file is not None:
        prompt = arguments.file.read_text(encoding="utf-8")
    else:
        prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    if not prompt.strip():
        raise BadInput("the prompt is empty")
    return prompt


def _generate_report(arguments, model, tokens, result, plain) -> dict:
    report = {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "drafter": _drafter_name(arguments),
        "budget": arguments.budget,
        "acceptance": arguments.acceptance,
        "cache": arguments.cache,
        "prompt_tokens": len(tokens),
        "tokens": result.tokens,
        "text": result.text,
        "finish_reason": result.finish_reason,
        "error": result.error,
        "stats": result.stats.to_dict(),
        "plain": None,
    }
    if plain is not None:
        report["plain"] = {
            "stats": plain.stats.to_dict(),
            "speed_up": _ratio(result.stats.tokens_per_second, plain.stats.tokens_per_second),
            "equal": plain.tokens == result.tokens,
            "first_difference": _first_difference(result.tokens, plain.tokens),
        }
    return report


def _show_figures(console, arguments, tokens, result, plain) -> None:
    stats = result.stats
    rows = [("plain" if _drafter_name(arguments) == "none" else _drafter_name(arguments), stats)]
    columns = ["tokens/s", "tokens/round", *PHASES]
    if plain is not None:
        rows.append(("plain", plain.stats))
        columns.append("speed-up")
    table = _table("", *columns)
    for name, figures in rows:
        cells = [name, f"{figures.tokens_per_second:.1f}", f"{figures.mean_accepted_length:.2f}"]
        cells += [f"{_ratio(getattr(figures, f'{phase}_seconds'), figures.decode_seconds):.1%}" for phase in PHASES]
        if plain is not None:
            cells.append(f"{_ratio(figures.tokens_per_second, plain.stats.tokens_per_second):.2f}x")
        table.add_row(*cells)
    console.print(table)
    seed = f", seed {stats.seed}" if arguments.temperature > 0 else ""
    console.print(
        f"{len(tokens)} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new tokens in "
        f"{stats.decode_seconds:.2f} s, {ENDINGS[result.finish_reason]}{seed}",
        highlight=False,
    )
    if plain is not None:
        first = _first_difference(result.tokens, plain.tokens)
        if first is None:
            console.print(f"plain decoding says the same {len(plain.tokens)} tokens", style="green", highlight=False)
        else:
            message = f"plain decoding says something else from token {first} on"
            if arguments.acceptance != "exact" and arguments.temperature > 0:
                console.print(f"{message}, as it may with acceptance {arguments.acceptance}", highlight=False)
            else:
                console.print(message, style="red", highlight=False)


def _drafter_name(arguments: argparse.Namespace) -> str:
    return arguments.drafter if arguments.draft_model is None else arguments.draft_model


def _check_state(arguments: argparse.Namespace) -> None:
    if arguments.draft_model is not None or arguments.drafter in ("lookup", "ngrammys", "layer_skip", "none"):
        raise BadInput(f"--drafter-state needs a drafter that learns, got {_drafter_name(arguments)}")
    if not arguments.drafter_state.absolute().parent.is_dir():
        raise BadInput(f"--drafter-state: there is no folder {arguments.drafter_state.absolute().parent}")


# ---- pyspec bench


def _bench(arguments: argparse.Namespace) -> int:
    prompts = _read_bench_prompts(arguments)
    settings = _generation_settings(arguments)
    if settings["seed"] is None:
        settings["seed"] = 0  # one for all runs, or there would be nothing to compare
    console = _console()
    model = _load(arguments, console)
    from pyspec.drafting import drafter_from_name
    from pyspec.generate import generate

    names = list(dict.fromkeys(arguments.drafter or ("lookup", "recycling", "merged")))
    _prepare(names, model, console)
    # one drafter for all prompts, as a server would keep it
    drafters = {"plain": None} | {name: drafter_from_name(name, model) for name in names}
    tokens = [_prompt_tokens(model, text, arguments.raw) for _, text in prompts]
    runs = {name: [] for name in drafters}
    with _counted(console, len(prompts) * len(drafters)) as advance:
        generate(model, tokens[0], drafter=None, max_new_tokens=4)  # the first call of a kernel is not its speed
        for prompt in tokens:
            for name, drafter in drafters.items():
                advance(name)
                rule = settings["acceptance"] if drafter is not None else "exact"
                run = generate(model, prompt, drafter=drafter, **settings | {"acceptance": rule})
                if run.finish_reason == "interrupted":
                    raise KeyboardInterrupt
                if run.finish_reason == "error":
                    return _fail(run.error, 1)
                runs[name].append(run)

    rows = [_bench_row(name, runs[name], runs["plain"]) for name in runs]
    if arguments.json:
        report = {"model": arguments.model, "dtype": str(model.dtype).removeprefix("torch."), **settings}
        report |= {"drafters": rows, "prompts": [_bench_prompt(i, prompts, runs) for i in range(len(prompts))]}
        print(json.dumps(report, ensure_ascii=False))
        return 0
    table = _table("", "tokens/s", "speed-up", "tokens/round", "draft share", "same as plain")
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
    from pyspec.acceptance.sampling import Sampler
    from pyspec.generate import check_limits

    check_limits(arguments.budget, arguments.max_new_tokens)
    for temperature in arguments.temperatures:
        Sampler(temperature, seed=arguments.seed)
    console = _console()
    model = _load(arguments, console)
    from pyspec.benchmarks import drafters as drafter_bench
    from pyspec.machine import cpu_name

    names = list(dict.fromkeys(arguments.drafters or drafter_bench.drafters_of(model)))
    tokens = [(category, _prompt_tokens(model, text, arguments.raw)) for category, text in prompts]
    _prepare(names, model, console)
    total = drafter_bench.runs_of(tokens, names, arguments.temperatures, arguments.answers)
    with _counted(console, total) as advance:
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
        print(json.dumps(report))
        return 0
    from rich.console import Console

    shown = Console(highlight=False)
    for table in drafter_bench.tables(report):
        shown.print(table)
    return 0


@contextmanager
def _counted(console, total: int) -> Iterator[Callable[[str], None]]:
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
        "tokens_per_second": _ratio(tokens, decode),
        "speed_up": _ratio(_ratio(tokens, decode), _ratio(plain_tokens, plain_decode)),
        "mean_accepted_length": _ratio(tokens, rounds),
        "draft_share": _ratio(sum(run.stats.draft_seconds for run in runs), decode),
        "equal": sum(run.tokens == other.tokens for run, other in zip(runs, plain, strict=True)),
    }


def _bench_prompt(index: int, prompts: list[tuple[str, str]], runs: dict[str, list]) -> dict:
    plain = runs["plain"][index]
    return {
        "category": prompts[index][0],
        "prompt": prompts[index][1],
        "runs": {
            name: {
                "first_difference": _first_difference(run[index].tokens, plain.tokens),
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
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise BadInput(f"{path} holds no prompts")
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            prompt = entry["prompt"] if "prompt" in entry else entry["turns"][0]
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError("empty prompt")
        except (ValueError, KeyError, IndexError, TypeError):
            raise BadInput(f'{path} line {number} must be a JSON object with "prompt" or "turns"') from None
        yield str(entry.get("category", "all")), prompt


# ---- pyspec info


def _info(arguments: argparse.Namespace) -> int:
    if arguments.costs:
        return _info_costs(arguments)
    import torch

    from pyspec.machine import cpu_name
    from pyspec.ops import backends

    report = {
        "versions": {name: _version(name) for name in ("pyspec-kernels", "torch", "triton", "numpy", "transformers")}
        | {"python": platform.python_version()},
        "platform": platform.platform(),
        "cpu": {
            "name": cpu_name(),
            "instruction_sets": _instruction_sets(),
            "torch_sees": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "ops": backends(),
        "extras": {name: _missing_modules(modules) or "installed" for name, modules in EXTRAS.items()},
        "demo_model": _demo_model(),
    }
    if arguments.json:
        print(json.dumps(report, ensure_ascii=False))
        return 0
    cpu = report["cpu"]
    _section("versions", report["versions"].items())
    _section(
        "machine",
        [
            ("platform", report["platform"]),
            ("cpu", cpu["name"]),
            ("instructions", ", ".join(cpu["instruction_sets"]) or "none that matter here"),
            ("torch sees", cpu["torch_sees"]),
            ("threads", cpu["threads"]),
            ("gpus", ", ".join(report["gpus"]) or "none"),
        ],
    )
    _section(
        "ops", [(f"{row['op']} on {row['device']}", f"{row['backend']} ({row['reason']})") for row in report["ops"]]
    )
    _section(
        "extras",
        [(name, found if found == "installed" else f"missing {found}") for name, found in report["extras"].items()],
    )
    _section("models", [("demo", report["demo_model"])])
    return 0


def _info_costs(arguments: argparse.Namespace) -> int:
    model = _load(arguments, _console())
    import torch

    from pyspec.costs import CONTEXT, measure_costs

    costs = measure_costs(model)
    plain, before = costs.seconds[0], (1, costs.seconds[0])
    rows = []
    for nodes, seconds in zip(costs.nodes, costs.seconds, strict=True):
        # the chance that a draft must have so that taking it in makes the round's tokens no dearer
        chance = None if nodes == 1 else (seconds - before[1]) / (nodes - before[0]) / plain
        rows.append({"nodes": nodes, "seconds": seconds, "plain_steps": seconds / plain, "chance_to_pay": chance})
        before = (nodes, seconds)
    dtype = str(model.weight_dtype if hasattr(model, "weight_dtype") else model.dtype).removeprefix("torch.")
    report = {"model": arguments.model, "dtype": dtype, "threads": torch.get_num_threads(), "context": CONTEXT}
    if arguments.json:
        print(json.dumps(report | {"costs": rows}, ensure_ascii=False))
        return 0
    table = _table("nodes", "ms", "pays from", "and a draft more from")
    for row in rows:
        chance = "" if row["chance_to_pay"] is None else f"a chance of {row['chance_to_pay']:.0%}"
        tokens = f"{row['plain_steps']:.2f} tokens a round"
        table.add_row(str(row["nodes"]), f"{row['seconds'] * 1e3:.1f}", tokens, chance)
    from rich.console import Console

    console = Console(highlight=False)
    console.print(f"verifying trees behind {CONTEXT} tokens: {arguments.model}, {dtype}, {report['threads']} threads")
    console.print(table)
    best = max(rows, key=lambda row: row["nodes"] / row["plain_steps"])
    console.print(
        f"Would it pay? {best['nodes']} right guesses are {best['nodes'] / best['plain_steps']:.1f}x as fast as plain "
        "decoding, wrong ones only cost. --budget auto takes the drafts that pay, or none."
    )
    return 0


def _section(title: str, rows) -> None:
    rows = [(str(name), str(value)) for name, value in rows]
    width = max(len(name) for name, _ in rows)
    print(title)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def _missing_modules(modules: Sequence[str]) -> str:
    return ", ".join(module for module in modules if util.find_spec(module) is None)


def _demo_model() -> str:
    from pyspec.models.loading import demo_file

    try:
        return str(demo_file())
    except FileNotFoundError as error:
        return f"not found: {error}"


def _instruction_sets() -> list[str]:
    """Those that a kernel variant may want, of the ones that the processor has."""
    from pyspec.machine import cpu_fields

    fields = cpu_fields()
    has = set((fields.get("flags") or fields.get("Features", "")).split())
    return [name for name in INSTRUCTION_SETS if name in has]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- shared


def _load(arguments: argparse.Namespace, console, source: str | None = None):
    """Loads the model, or another source, with a progress bar where that takes long."""
    import torch

    import pyspec

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise BadInput(f"--threads must be at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    dtype = None if arguments.dtype is None else getattr(torch, DTYPES[arguments.dtype])
    source = arguments.model if source is None else source
    with _progress_of(console, f"loading {source}") as progress:
        model = pyspec.load(source, dtype=dtype, progress=progress)
    if model.tokenizer is None:
        raise BadInput(f"{source} has no tokenizer, and the command line works with text")
    return model


def _prepare(names: Sequence[str], model, console) -> None:
    """Computes what some drafters need of a model, once for each model, with a progress bar."""
    from pyspec.drafting.layer_skip import find_skipped_layers
    from pyspec.drafting.ngrammys import model_bigrams

    for name, compute in (("ngrammys", model_bigrams), ("layer_skip", find_skipped_layers)):
        if name in names:
            with _progress_of(console, f"what {name} needs of the model, once") as progress:
                compute(model, progress=progress)


@contextmanager
def _progress_of(console, description: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _prompt_tokens(model, prompt: str, raw: bool) -> list[int]:
    """The prompt as the user's turn of a chat, or as it is: then names of special tokens are those tokens."""
    if raw or model.tokenizer.chat_template is None:
        return model.tokenizer.encode(prompt, special=raw)
    return model.tokenizer.chat([{"role": "user", "content": prompt}])


def _console():
    try:
        from rich.console import Console
    except ImportError:
        raise ImportError("this command needs rich: pip install 'pyspec-kernels[hf]'") from None
    return Console(stderr=True)


def _table(first: str, *columns: str):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, None where they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _ratio(value: float, of: float) -> float:
    return value / of if of else 0.0
