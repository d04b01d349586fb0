"""What the command lines of the scripts here share."""

from __future__ import annotations

import argparse

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


def positive(text: str) -> int:
    """A number that must be at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parser_of(doc: str, *, repeats: int | None = None, devices: bool = False) -> argparse.ArgumentParser:
    """A parser that shows a script's first line and has --threads, and, where asked for, --repeats and --device."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU; default: 2")
    if repeats is not None:
        parser.add_argument("--repeats", type=positive, default=repeats, help=f"of each call; default: {repeats}")
    if devices:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, once torch has as many threads as they say."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    return options
