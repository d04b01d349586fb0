"""The command line: pyspec generate, chat, serve, cascade, beams, adadec, bench, convert and info.

The text goes to stdout, everything else to stderr; with --json stdout holds one JSON object and nothing else.
Exit codes: 0, 1 for a failure, 2 for bad input, 130 for Ctrl-C.

Nothing heavy is imported here or in the modules beside: `pyspec --help` must answer at once, so the commands import
torch and rich when they run.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from pyspec.cli import adadec, beams, bench, cascade, chat, convert, generate, info, serve
from pyspec.cli.shared import BadInput, fail, version_of

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    if sys.stderr is None:  # closed, as by `2>&-`: nobody wants to hear
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        return fail("there is nowhere to write to: standard output is closed", 1)
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows "?" instead of failing
    try:
        code = arguments.command(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except BrokenPipeError:
        _drop_output()  # the reader of our output left, as `head` does
        return 1
    except (BadInput, ValueError, TypeError, FileNotFoundError, IsADirectoryError, PermissionError) as error:
        return fail(error, 2)
    except (ImportError, MemoryError) as error:
        return fail(error, 1)
    except Exception as error:
        code = fail(f"{type(error).__name__}: {error}", 1)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()  # a disk that is full, say
        return code


def _drop_output() -> None:
    """Sends what is left to nowhere, or Python would complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pyspec", description="Speculative decoding that never changes the text.")
    parser.add_argument("--version", action="version", version=version_of("pyspec-kernels"))
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (generate, chat, serve, cascade, beams, adadec, bench, convert, info):
        command.add_parser(commands)
    return parser
