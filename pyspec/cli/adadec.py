"""pyspec adadec: greedy text that looks ahead where the model is unsure."""

from __future__ import annotations

import argparse

from pyspec.arguments import check_unicode
from pyspec.cli.arguments import add_model_arguments
from pyspec.cli.generate import ENDINGS, add_prompt_arguments, read_prompt
from pyspec.cli.shared import fail, load_model, make_console, print_json, prompt_tokens, write


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "adadec",
        help="continue a prompt greedily, looking ahead where the model is unsure",
        description="Continue a prompt greedily, looking ahead where the model is unsure of the next token (AdaDec).",
    )
    add_prompt_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--threshold", type=float, default=1.0, help="entropy in nats; default: 1")
    parser.add_argument("--choices", type=int, default=3, help="tokens that are looked ahead from; default: 3")
    parser.add_argument("--depth", type=int, default=5, help="tokens of a look-ahead; default: 5")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="default: 256")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; repeatable")
    parser.set_defaults(command=_adadec)


def _adadec(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments)
    for text in arguments.stop:
        check_unicode("--stop", text)
    from pyspec.adadec import adadec, check_adadec

    check_adadec(arguments.threshold, arguments.choices, arguments.depth)
    console = make_console()
    model = load_model(arguments, console)
    tokens = prompt_tokens(model, prompt, arguments.raw, arguments.system, arguments.variable)
    names = ("threshold", "choices", "depth", "max_new_tokens", "stop")
    settings = {name: getattr(arguments, name) for name in names}
    said = adadec(model, tokens, stream=None if arguments.json else write, **settings)
    stats = said.stats
    if arguments.json:
        fields = ("tokens", "text", "finish_reason", "error")
        print_json({name: getattr(said, name) for name in fields} | {"stats": stats.to_dict()})
    else:
        write("" if not said.text or said.text.endswith("\n") else "\n")
        console.print(
            f"{stats.new_tokens} tokens in {stats.total_seconds:.2f} s, {stats.nodes} nodes verified, "
            f"{ENDINGS[said.finish_reason]}",
            highlight=False,
        )
    if said.finish_reason == "error":
        return fail(said.error, 1)
    return 130 if said.finish_reason == "interrupted" else 0
