"""Checks that take hours: finished units of work are kept, so that an interrupted run goes on where it was.

A unit is a dict that says what is checked, and becomes a line: the unit, with what was found.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pyspec
from pyspec import measure
from pyspec.generate import generate


class Finished:
    """The lines of finished units, in a file whose first line says what they were made with.

    Args:
        path: the file. It starts over where pyspec, the machine or the settings are others than its own.
        settings: whatever else the lines depend on.
    """

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.made_with = {"pyspec": fingerprint(), **settings}
        machine = measure.machine()
        machine.pop("date")
        text = path.read_text() if path.exists() else ""
        # a line that was cut off by the end of the machine or the run is not finished
        made_before, *lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines() or ["null"])
        self.lines: list[dict] = lines if made_before == self.made_with | machine else []
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in (self.made_with | machine, *self.lines)))

    def line_of(self, unit: dict) -> dict | None:
        return next((line for line in self.lines if unit.items() <= line.items()), None)

    def add(self, line: dict) -> None:
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def fingerprint() -> str:
    """A hash of pyspec's files, compiled ones included, so that no result outlives the code it speaks of."""
    folder = Path(pyspec.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".so")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def work_through(
    units: Sequence[dict],
    finished: Finished,
    work: Callable[[dict], dict],
    describe: Callable[[dict], str],
    expected_seconds: Callable[[list[dict]], float],
    console,
) -> list[dict]:
    """Does what is not finished yet, with a progress bar on a rich console; Ctrl-C ends the process.

    Args:
        units: all of them, in the order to do them in.
        finished: gets a line for each.
        work: what was found for one unit.
        describe: a word on what one unit is.
        expected_seconds: about how long some units will take; called once, if there are any to do.

    Returns:
        The lines of all units, in their order.
    """
    remaining = [unit for unit in units if finished.line_of(unit) is None]
    console.print(f"{len(units) - len(remaining)} of {len(units)} finished before, kept in {finished.path}")
    if remaining:
        console.print(f"about {expected_seconds(remaining) / 60:.0f} minutes at the speed of plain decoding")
    try:
        with measure.counted(console, len(remaining)) as advance:
            for unit in remaining:
                advance(describe(unit))
                finished.add(unit | work(unit))
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on from here")
        sys.exit(130)
    return [finished.line_of(unit) for unit in units]


def seconds_a_token(model, prompt: list[int]) -> float:
    """Of plain decoding, after a warm-up."""
    for new_tokens in (4, 16):
        stats = generate(model, prompt, drafter=None, max_new_tokens=new_tokens).stats
    return 1 / stats.tokens_per_second
