"""The tables of results.md, made from bench/results/*.json while the site is built: they are never older than the runs.

In the page, a comment `<!-- results: NAME -->` becomes where bench/results/NAME.json was measured and its tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from result_tables import NAME, TABLES

RESULTS = Path(__file__).parent.parent / "bench" / "results"
MARK = re.compile(r"^<!-- results: (\w+) -->$", re.MULTILINE)

# How a machine's entries are said, where not by their names; and those of a run, as far as they are said.
MACHINE = {"cpu": "{}", "date": "{}", "threads": "{} threads", "cores": "{} cores"}
RUN = {"compiler": "{}", "dtype": "{}", "read_gb_s": "{} GB/s read", "context": "{} tokens before"}


def setup(app) -> None:
    app.connect("source-read", fill)


def fill(app, page: str, source: list[str]) -> None:
    source[0] = filled(source[0])


def filled(text: str) -> str:
    """A page with its tables in place of the comments, and behind them the runs and plots that it does not name."""
    names = MARK.findall(text)
    if not names:
        return text
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem not in names:
            text += f"\n## {path.stem}\n\n<!-- results: {path.stem} -->\n"
    for path in sorted(RESULTS.glob("*.png")):
        if path.name not in text:
            text += f"\n![{path.stem}](../bench/results/{path.name})\n"
    return MARK.sub(lambda match: tables(match[1]), text)


def tables(name: str) -> str:
    """Where a run was measured, and its tables, as Markdown."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    parts = [f"{where(result)} All of it: [{name}.json](../bench/results/{name}.json)."]
    like = re.sub("_(cuda|cpu_[a-z0-9_]+)$", "_cpu", name)  # a run on a GPU, or of another instruction set
    for caption, path, columns in TABLES.get(name) or TABLES.get(like) or everything(result):
        rows = rows_of(at(result, path))
        if rows:
            parts += [f"{caption}:"] * bool(caption) + [table(rows, columns)]
    return "\n\n".join(parts)


def where(result: dict) -> str:
    """The machine, and the numbers that hold for the whole run."""
    said = [MACHINE.get(key, key + " {}").format(cell(value)) for key, value in result.get("machine", {}).items()]
    said += [words.format(cell(result[key])) for key, words in RUN.items() if key in result]
    return ", ".join(said) + "."


def everything(result: dict) -> list[tuple]:
    """For a run that TABLES does not know: all its lists of rows, with all their columns."""
    return [
        (key.replace("_", " "), key, [(column, column) for column in dict.fromkeys(c for row in rows for c in row)])
        for key, value in result.items()
        if key != "machine" and (rows := rows_of(value))
    ]


def at(value, path: str):
    """What is at a path of keys; None where there is nothing."""
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def rows_of(value) -> list[dict]:
    """Rows of a list of dicts, or of a dict, whose keys are then the rows' names."""
    if isinstance(value, dict):
        return [{NAME: key, **(row if isinstance(row, dict) else {"value": row})} for key, row in value.items()]
    if isinstance(value, list):
        return [row for row in value if isinstance(row, dict)]
    return []


def table(rows: list[dict], columns: list[tuple]) -> str:
    cells = [[shown(row, *column[1:]).replace("|", r"\|") for column in columns] for row in rows]
    kept = [place for place in range(len(columns)) if any(line[place] for line in cells)]
    lines = [[columns[place][0] for place in kept], ["---"] * len(kept)]
    lines += [[line[place] for place in kept] for line in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(row: dict, path: str, over: str | None = None) -> str:
    value = at(row, path)
    if over == "%":
        return "" if value is None else f"{100 * value:.3g}%"
    if over is None:
        return cell(value)
    divisor = at(row, over)
    if not divisor:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key} {number / divisor:.2f}x" for key, number in value.items() if number is not divisor)
    return "" if value is None else f"{value / divisor:.2f}x"


def cell(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {cell(number)}" for key, number in value.items())
    if isinstance(value, list):
        return " ".join(map(cell, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"
    return "" if value is None else str(value)
