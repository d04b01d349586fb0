"""What the commands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from pyspec.arguments import decode_text

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8", "int4": "int4"}


class BadInput(Exception):
    """An error in what the user gave; its text is for the terminal."""


def print_json(report: dict) -> None:
    """Prints one JSON object, in UTF-8 whatever the locale is."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # which is JSON's own way to escape
    print(json.dumps(report, ensure_ascii=False))


def read_text(path: Path) -> str:
    """The text of a file, see decode_text."""
    try:
        return decode_text(str(path), path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None


def fail(error: object, code: int) -> int:
    print(f"pyspec: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def set_threads(arguments: argparse.Namespace) -> None:
    """Sets torch's threads to --threads, if it is given."""
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise BadInput(f"--threads must be at least 1, got {arguments.threads}")
        import torch

        torch.set_num_threads(arguments.threads)


def load_model(arguments: argparse.Namespace, console, source: str | None = None, **options):
    """Loads the model as the arguments say, or a draft model, with a progress bar where that takes long.

    options are further arguments of pyspec.load.
    """
    import torch

    import pyspec

    set_threads(arguments)
    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    if dtype not in (None, "int4"):  # torch has an int4 too, which is something else
        dtype = getattr(torch, dtype)
    prompt_attention = arguments.prompt_attention if source is None else "pyspec"
    source = arguments.model if source is None else source
    with progress_of(console, f"loading {source}") as progress:
        model = pyspec.load(
            source,
            dtype=dtype,
            prompt_attention=prompt_attention,
            progress=progress,
            announce=lambda need: console.print(f"{source}: {need}", highlight=False, markup=False, soft_wrap=True),
            **options,
        )
    if model.tokenizer is None:
        raise BadInput(f"{source} has no tokenizer, and the command line works with text")
    return model


def prepare(names: Sequence[str], model, console) -> None:
    """Computes what some drafters need of a model, once for each model, with a progress bar."""
    from pyspec.drafters import DRAFTERS

    for name in names:
        if (compute := DRAFTERS[name].prepare) is not None:
            with progress_of(console, f"what {name} needs of the model, once") as progress:
                compute(model, progress=progress)


@contextmanager
def progress_of(console, description: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def prompt_tokens(model, prompt: str, raw: bool, system: str | None = None, variables: Sequence = ()) -> list[int]:
    """The prompt as the user's turn of a chat, or as it is: then names of special tokens are those tokens.

    system is the turn before it; variables are pairs of a name and a value, for the model's chat template.
    """
    if raw or model.tokenizer.chat_template is None:
        if system is not None or variables:
            reason = "--raw leaves that out" if raw else "this model has none"
            raise BadInput(f"{'--variable' if system is None else '--system'} needs a chat template: {reason}")
        return model.tokenizer.encode(prompt, special=raw)
    turns = [] if system is None else [{"role": "system", "content": system}]
    return model.tokenizer.chat([*turns, {"role": "user", "content": prompt}], **dict(variables))


def make_console():
    try:
        from rich.console import Console
    except ImportError:
        raise ImportError("this command needs rich: pip install 'pyspec-kernels[hf]'") from None
    return Console(stderr=True)


def write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
