"""pyspec convert."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyspec.cli.shared import DTYPES, BadInput, load_model, make_console


def add_parser(commands) -> None:
    convert = commands.add_parser(
        "convert",
        help="keep a model as it lies in memory",
        description="Write a model to a file as it lies in memory, which is mapped at the next start and used in "
        "place: pyspec generate --model OUTPUT.",
    )
    convert.add_argument("model", help="demo, a GGUF file, a Hugging Face folder or a hub id")
    convert.add_argument("output", type=Path, help="the file, NAME.pyspec; it is about as large as the weights")
    convert.add_argument("--dtype", choices=DTYPES, help="default: the model's own")
    convert.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    convert.set_defaults(command=_convert, prompt_attention="pyspec")


def _convert(arguments: argparse.Namespace) -> int:
    if arguments.output.suffix != ".pyspec":
        raise BadInput(f"OUTPUT must end in .pyspec, got {arguments.output}")
    if not arguments.output.absolute().parent.is_dir():
        raise BadInput(f"there is no folder {arguments.output.absolute().parent}")
    console = make_console()
    model = load_model(arguments, console, device="cpu")
    from pyspec.checkpoints.converted import save_converted

    save_converted(model, arguments.output)
    size = arguments.output.stat().st_size / 1e9
    console.print(f"wrote {arguments.output}, {size:.2f} GB", highlight=False, soft_wrap=True)
    return 0
