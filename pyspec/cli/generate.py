"""pyspec generate."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pyspec.arguments import check_unicode, decode_text
from pyspec.cli.arguments import add_generation_arguments, add_model_arguments, generation_settings, json_or_text
from pyspec.cli.shared import (
    BadInput,
    fail,
    load_model,
    make_console,
    prepare,
    print_json,
    prompt_tokens,
    read_text,
    write,
)
from pyspec.measure import first_difference, new_table, ratio
from pyspec.stats import PHASES

ENDINGS = {
    "eos": "ended by the model",
    "stop": "ended by a stop string",
    "length": "ended at the limit",
    "interrupted": "interrupted",
    "error": "ended by an error",
}


def add_parser(commands) -> None:
    generate = commands.add_parser("generate", help="continue a prompt", description="Continue a prompt.")
    add_prompt_arguments(generate)
    add_model_arguments(generate)
    add_drafter_arguments(generate)
    add_generation_arguments(generate, max_new_tokens=256)
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    generate.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    generate.add_argument("--no-compare", action="store_true", help="do not run plain decoding for comparison")
    generate.add_argument(
        "--drafter-state", type=Path, metavar="FILE", help="what the drafter has learned: read it if there, then write"
    )
    generate.set_defaults(command=_generate)


def add_drafter_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of which drafter."""
    from pyspec.drafters import DRAFTERS

    drafter = parser.add_mutually_exclusive_group()
    drafter.add_argument("--drafter", choices=[*DRAFTERS, "none"], default="merged", help="default: merged")
    drafter.add_argument("--draft-model", metavar="MODEL", help="a smaller model of the same vocabulary is the drafter")
    drafter.add_argument("--draft-head", metavar="HEAD", help="a trained head for this model is the drafter")
    drafter.add_argument(
        "--draft-chunks", metavar="FILE", help="chunks of python -m training.chunks for this model are the drafter"
    )


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of a prompt and of how a model is to take it."""
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", metavar="PROMPT", help="the prompt, or - for standard input")
    prompt.add_argument("--file", type=Path, help="read the prompt from a file")
    parser.add_argument("--raw", action="store_true", help="give the prompt to the model as it is, no chat template")
    add_template_arguments(parser)


def add_template_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of what the chat template is given beside the prompt."""
    parser.add_argument("--system", metavar="TEXT", help="the system's turn before the prompt")
    parser.add_argument(
        "--variable",
        action="append",
        default=[],
        type=_variable,
        metavar="NAME=VALUE",
        help="for the chat template, such as enable_thinking=false or tools='[...]'; repeatable",
    )


def _variable(text: str) -> tuple[str, Any]:
    """A name, and a value that is JSON or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name == "messages":
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE with a name of the chat template's, got {text!r}")
    check_unicode("--variable", value)
    return name, json_or_text(value)


def _generate(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments)
    for text in arguments.stop:
        check_unicode("--stop", text)
    if arguments.system is not None:
        check_unicode("--system", arguments.system)
    if arguments.drafter_state is not None:
        _check_state(arguments)
    settings = generation_settings(arguments, [arguments.temperature])
    settings |= {"temperature": arguments.temperature, "stop": arguments.stop}
    console = make_console()
    model = load_model(arguments, console)
    from pyspec.acceptance import settings_of_rules
    from pyspec.generate import generate

    tokens = prompt_tokens(model, prompt, arguments.raw, arguments.system, arguments.variable)
    laws = {"temperature": arguments.temperature or 1.0, "top_k": arguments.top_k, "top_p": arguments.top_p}
    drafter = drafter_of(arguments, model, console, **laws)
    if arguments.drafter_state is not None and arguments.drafter_state.exists():
        drafter.load(arguments.drafter_state)

    stream = None if arguments.json else write
    result = generate(model, tokens, drafter=drafter, stream=stream, **settings)
    if stream is not None and result.text and not result.text.endswith("\n"):
        write("\n")
    if arguments.drafter_state is not None:
        drafter.save(arguments.drafter_state)

    plain = None
    if drafter is not None and not arguments.no_compare and result.finish_reason in ("eos", "stop", "length"):
        settings |= {"seed": result.stats.seed, "acceptance": "exact"} | dict.fromkeys(settings_of_rules().values())
        with console.status("plain decoding of the same prompt, for comparison (--no-compare leaves it out)"):
            plain = generate(model, tokens, drafter=None, **settings)
        if plain.finish_reason == "interrupted":
            plain = None
    if arguments.json:
        print_json(_generate_report(arguments, model, tokens, result, plain))
    else:
        _show_figures(console, arguments, tokens, result, plain)
    if result.finish_reason == "error":
        return fail(result.error, 1)
    return 130 if result.finish_reason == "interrupted" else 0


def drafter_of(arguments: argparse.Namespace, model, console, **laws):
    """The drafter that was asked for, or None. laws are those of a sampled one: temperature, top_k and top_p."""
    from pyspec.drafters import drafter_from_name

    if arguments.draft_chunks is not None:
        from pyspec.drafters.chunks import ChunkDrafter

        return ChunkDrafter(arguments.draft_chunks, model)
    if arguments.draft_model is None and arguments.draft_head is None:
        if arguments.drafter == "none":
            return None
        prepare([arguments.drafter], model, console)
        return drafter_from_name(arguments.drafter, model)
    from pyspec.acceptance import acceptance_from_name, settings_of_rules
    from pyspec.drafters.heads import drafter_of_head
    from pyspec.drafters.model import ModelDrafter
    from pyspec.drafters.shapes.by_rule import growth_for

    own = {setting: getattr(arguments, setting) for setting in settings_of_rules().values()}
    rule = acceptance_from_name(arguments.acceptance, own)
    if arguments.draft_head is not None:
        return drafter_of_head(arguments.draft_head, model, rule, **laws)
    return ModelDrafter(load_model(arguments, console, arguments.draft_model), model, growth_for(rule), **laws)


def read_prompt(arguments: argparse.Namespace) -> str:
    if arguments.file is not None:
        prompt = read_text(arguments.file)
    elif arguments.prompt == "-":
        prompt = _read_stdin()
    else:
        prompt = arguments.prompt
        check_unicode("the prompt", prompt)
    if not prompt.strip():
        raise BadInput("the prompt is empty")
    return prompt


def _read_stdin() -> str:
    if sys.stdin is None:
        raise BadInput("the prompt cannot be read: standard input is closed")
    return decode_text("standard input", sys.stdin.buffer.read()) if hasattr(sys.stdin, "buffer") else sys.stdin.read()


def _generate_report(arguments, model, tokens, result, plain) -> dict:
    report = {
        "model": arguments.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "drafter": _drafter_name(arguments),
        "budget": arguments.budget,
        "acceptance": arguments.acceptance,
        "cache": arguments.cache,
        "prompt_attention": arguments.prompt_attention,
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
            "speedup": ratio(result.stats.tokens_per_second, plain.stats.tokens_per_second),
            "equal": plain.tokens == result.tokens,
            "first_difference": first_difference(result.tokens, plain.tokens),
        }
    return report


def _show_figures(console, arguments, tokens, result, plain) -> None:
    stats = result.stats
    rows = [("plain" if _drafter_name(arguments) == "none" else _drafter_name(arguments), stats)]
    columns = ["tokens/s", "tokens/round", *PHASES]
    if plain is not None:
        rows.append(("plain", plain.stats))
        columns.append("speedup")
    table = new_table("", *columns)
    for name, figures in rows:
        cells = [name, f"{figures.tokens_per_second:.1f}", f"{figures.mean_accepted_length:.2f}"]
        cells += [f"{ratio(getattr(figures, f'{phase}_seconds'), figures.decode_seconds):.1%}" for phase in PHASES]
        if plain is not None:
            cells.append(f"{ratio(figures.tokens_per_second, plain.stats.tokens_per_second):.2f}x")
        table.add_row(*cells)
    console.print(table)
    seed = f", seed {stats.seed}" if arguments.temperature > 0 else ""
    console.print(
        f"{len(tokens)} prompt tokens in {stats.prefill_seconds:.2f} s, {stats.new_tokens} new tokens in "
        f"{stats.decode_seconds:.2f} s, {ENDINGS[result.finish_reason]}{seed}",
        highlight=False,
    )
    if plain is not None:
        first = first_difference(result.tokens, plain.tokens)
        if first is None:
            console.print(f"plain decoding says the same {len(plain.tokens)} tokens", style="green", highlight=False)
        else:
            message = f"plain decoding says something else from token {first} on"
            if arguments.acceptance != "exact" and arguments.temperature > 0:
                console.print(f"{message}, as it may with acceptance {arguments.acceptance}", highlight=False)
            else:
                console.print(message, style="red", highlight=False)


def _drafter_name(arguments: argparse.Namespace) -> str:
    return arguments.draft_model or arguments.draft_head or arguments.draft_chunks or arguments.drafter


def _check_state(arguments: argparse.Namespace) -> None:
    from pyspec.drafters import DRAFTERS

    name = _drafter_name(arguments)
    if name not in DRAFTERS or not DRAFTERS[name].learns:
        raise BadInput(f"--drafter-state needs a drafter that learns, got {name}")
    if not arguments.drafter_state.absolute().parent.is_dir():
        raise BadInput(f"--drafter-state: there is no folder {arguments.drafter_state.absolute().parent}")
