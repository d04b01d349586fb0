"""What measurements look like in a terminal, and the small arithmetic of their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


def new_table(*columns: str, left: int = 1, title: str | None = None):
    """A rich table, whose first `left` columns are words and the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right")
    return table


@contextmanager
def counted(console, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` pieces of work; what it gives is called with the name of each before it begins.

    There is none on a console that is no terminal, or that is None.
    """
    if console is None:
        yield lambda name: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Remaining())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, completed=-1)
        yield lambda name: progress.update(task, description=name, advance=1)


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, None where they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def ratio(value: float, of: float) -> float:
    """value / of, and 0 where there is nothing to divide by."""
    return value / of if of else 0.0


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")
