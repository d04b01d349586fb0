"""pyspec beams: the likeliest continuations of a prompt."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pyspec.cli.arguments import add_model_arguments
from pyspec.cli.generate import add_prompt_arguments, read_prompt
from pyspec.cli.shared import load_model, make_console, print_json, prompt_tokens, write


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "beams",
        help="the likeliest continuations of a prompt",
        description="The likeliest continuations of a prompt, in groups that differ from each other.",
    )
    add_prompt_arguments(parser)
    add_model_arguments(parser)
    parser.add_argument("--beams", type=int, default=8, help="how many; default: 8")
    parser.add_argument("--groups", type=int, default=1, help="that differ from each other; default: 1")
    parser.add_argument(
        "--diversity", type=float, default=0.5, help="nats off a token for each group that chose it; default: 0.5"
    )
    parser.add_argument(
        "--length-penalty", type=float, default=1.0, help="exponent of the length that scores are over; default: 1"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.set_defaults(command=_beams)


def _beams(arguments: argparse.Namespace) -> int:
    prompt = read_prompt(arguments)
    names = ("beams", "groups", "diversity", "length_penalty", "max_new_tokens")
    settings = {name: getattr(arguments, name) for name in names}
    from pyspec.beams import beam_search, check_beams

    check_beams(**settings)
    console = make_console()
    model = load_model(arguments, console)
    tokens = prompt_tokens(model, prompt, arguments.raw, arguments.system, arguments.variable)
    found = beam_search(model, tokens, **settings)
    if arguments.json:
        print_json({"beams": [asdict(beam) for beam in found.beams], "stats": found.stats.to_dict()})
        return 0
    for beam in found.beams:
        write(f"{beam.score:.4f}  group {beam.group}  {beam.text}\n")
    stats = found.stats
    console.print(
        f"{stats.rounds} steps of {len(found.beams)} beams in {stats.total_seconds:.2f} s, {stats.nodes} nodes",
        highlight=False,
    )
    return 0
