"""Tables of what is registered, made while the site is built: nobody keeps them by hand.

In a page, a comment `<!-- registry: pyspec.architectures.FAMILIES -->` becomes the names and what they stand for.
"""

from __future__ import annotations

import re
from importlib import import_module

MARK = re.compile(r"^<!-- registry: ([\w.]+)\.(\w+) -->$", re.MULTILINE)


def filled(text: str) -> str:
    """A page with its tables."""
    return MARK.sub(lambda mark: table(getattr(import_module(mark[1]), mark[2]).summaries), text)


def table(summaries: dict[str, str]) -> str:
    lines = ["| name | what it stands for |", "| --- | --- |"]
    lines += [f"| {name} | {summary} |" for name, summary in summaries.items()]
    return "\n".join(lines)


def setup(app) -> None:
    app.connect("source-read", lambda app, page, source: source.__setitem__(0, filled(source[0])))
