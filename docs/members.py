"""Tables of what has a name, as the site shows them: `<!-- members: module.REGISTRY -->` becomes that registry's."""

import re
from importlib import import_module

MARK = re.compile(r"^<!-- members: ([\w.]+)\.(\w+) -->$", re.MULTILINE)


def setup(app) -> None:
    app.connect("source-read", fill)


def fill(app, page: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def filled(text: str) -> str:
    """A page with its tables."""
    return MARK.sub(lambda match: table(getattr(import_module(match[1]), match[2])), text)


def table(registry) -> str:
    """Names and the line about each, as Markdown."""
    rows = [f'| `"{name}"` | {summary} |' for name, summary in registry.summaries.items()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])
