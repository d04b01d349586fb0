"""pyspec cascade: one text of two models."""

from __future__ import annotations

import argparse
from typing import Any

from pyspec.arguments import check_unicode
from pyspec.cli.arguments import (
    add_budget_argument,
    add_model_arguments,
    add_sampling_arguments,
    json_or_text,
    sampling_settings,
)
from pyspec.cli.generate import ENDINGS, add_prompt_arguments, read_prompt
from pyspec.cli.shared import fail, load_model, make_console, print_json, prompt_tokens, write


def add_parser(commands) -> None:
    from pyspec.answers import ANSWER_RULES
    from pyspec.drafters import DRAFTERS
    from pyspec.turns import TURN_RULES

    parser = commands.add_parser(
        "cascade",
        help="continue a prompt with a small and a large model",
        description="Continue a prompt with a small and a large model of one vocabulary.",
    )
    add_prompt_arguments(parser)
    parser.add_argument("--small", metavar="MODEL", required=True, help="as --large")
    add_model_arguments(parser, name="--large")
    summaries = TURN_RULES.summaries | ANSWER_RULES.summaries
    parser.add_argument(
        "--rule",
        choices=list(summaries),
        default="entropy",
        help="who writes what; " + "; ".join(f"{name}: {line}" for name, line in summaries.items()),
    )
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        type=_setting,
        metavar="NAME=VALUE",
        help="of the rule, such as threshold=0.6 (docs/cascades.md); repeatable",
    )
    parser.add_argument("--drafter", choices=[*DRAFTERS, "none"], default="merged", help="of both; default: merged")
    add_budget_argument(parser)
    add_sampling_arguments(parser, max_new_tokens=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy, the default")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.set_defaults(command=_cascade)


def _setting(text: str) -> tuple[str, Any]:
    """A name, and a value that is JSON or else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, json_or_text(value)


def _cascade(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments)
    for text in arguments.stop:
        check_unicode("--stop", text)
    rule = _rule(arguments.rule, dict(arguments.setting))
    settings = sampling_settings(arguments, [arguments.temperature])
    settings |= {"temperature": arguments.temperature, "stop": arguments.stop}
    settings |= {"budget": arguments.budget, "controller": arguments.controller}
    console = make_console()
    small, large = load_model(arguments, console, arguments.small), load_model(arguments, console)
    from pyspec.cascade import cascade

    tokens = prompt_tokens(large, prompt, arguments.raw, arguments.system, arguments.variable)
    drafter = None if arguments.drafter == "none" else arguments.drafter
    stream = None if arguments.json else write
    said = cascade(small, large, tokens, rule=rule, drafters=(drafter, drafter), stream=stream, **settings)
    if arguments.json:
        print_json(_report(arguments, tokens, said))
    else:
        if said.text and not said.text.endswith("\n"):
            write("\n")
        console.print(_summary(said), highlight=False)
    if said.finish_reason == "error":
        return fail(said.error, 1)
    return 130 if said.finish_reason == "interrupted" else 0


def _rule(name: str, settings: dict):
    """The rule of a name with its settings; raises ValueError for one that it has not."""
    from inspect import signature

    from pyspec.answers import ANSWER_RULES
    from pyspec.turns import TURN_RULES

    make = TURN_RULES[name] if name in TURN_RULES else ANSWER_RULES[name]
    known = signature(make).parameters
    for setting in settings:
        if setting not in known:
            raise ValueError(f"--setting of {name} must be one of {', '.join(known)}, got {setting}")
    return make(**settings)


def _report(arguments: argparse.Namespace, tokens: list[int], said) -> dict:
    return {
        "small": arguments.small,
        "large": arguments.model,
        "rule": arguments.rule,
        "prompt_tokens": len(tokens),
        "tokens": said.tokens,
        "text": said.text,
        "finish_reason": said.finish_reason,
        "error": said.error,
        "turns": said.turns,
        "large_share": said.large_share,
        "score": said.score,
        "stats": [stats.to_dict() for stats in said.stats],
    }


def _summary(said) -> str:
    seconds = sum(stats.total_seconds for stats in said.stats)
    line = f"{len(said.tokens)} tokens in {seconds:.2f} s, {said.large_share:.0%} of them by the large model"
    line += f" in {len(said.turns)} turns, {ENDINGS[said.finish_reason]}, seed {said.stats[0].seed}"
    return line if said.score is None else f"{line}; the small model's answer scored {said.score:.3f}"
