"""Models in the bits of their files: steps, verifies, prompts and loading, beside llama.cpp on the same file.

    python bench/models.py              tables, bench/results/models_cpu.json; about 8 minutes
    python bench/models.py --only NAME  some of the files, about a minute each; their rows in the results are replaced

Random weights in the shapes of real models, quantised by llama.cpp, the demo model, and files that --file names. Both
run in one process, in turn. The floor is the bytes of all weights that a step reads over the read bandwidth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from command_line import parse, parser_of
from inside import weight_bytes
from llama_cpp_model import LlamaCppModel
from model_files import FORMATS, SHAPES, random_file

import pyspec
from pyspec import measure
from pyspec.checkpoints.sources import demo_file
from pyspec.measure.results import RESULTS
from pyspec.tree import DraftTree

CONTEXT = 100  # tokens before a step
NODES = 8
PROMPT = 512  # tokens
PROMPT_SHARE = 4  # one prompt for so many steps
GOALS = {"plain": 1.2, "verify": 1.7, "prompt": 1.0}  # llama.cpp's time over ours, at least
RESULT = RESULTS / "models_cpu.json"
MOST_SECONDS, MOST_OVER_FLOOR, MOST_OVER_PLAIN = 4.0, 1.2, 1.6  # of loading, of a step, of a verify with VNNI


def measure_file(file: Path, threads: int, repeats: int) -> dict:
    """Times of both engines on a file, in seconds, and what they are judged by."""
    model, peer = pyspec.load(file), LlamaCppModel(file, threads, PROMPT)
    tokens = [1000 + 7 * place % 997 for place in range(PROMPT)]

    def prompt() -> None:
        model.prefill([tokens], capacity=2 * PROMPT)

    def verify(count: int):
        tree = DraftTree.chain(tokens[CONTEXT : CONTEXT + count])
        return lambda: model.verify({0: tree})

    calls = {
        "plain": verify(1),
        "llama.cpp plain": lambda: peer.read(tokens[:1], CONTEXT, all_logits=True),
        "verify": verify(NODES),
        "llama.cpp verify": lambda: peer.read(tokens[:NODES], CONTEXT, all_logits=True),
    }
    bandwidth = measure.read_bandwidth()
    model.prefill([tokens[:CONTEXT]], capacity=2 * PROMPT)
    peer.read(tokens[:CONTEXT], 0, all_logits=False)
    seconds = measure.in_turn(calls, repeats)
    prompts = {"prompt": prompt, "llama.cpp prompt": lambda: peer.read(tokens, 0, all_logits=False)}
    seconds |= measure.in_turn(prompts, -(-repeats // PROMPT_SHARE), warmup=1)
    bandwidth = max(bandwidth, measure.read_bandwidth())  # it drifts: the better of before and after
    peer.close()
    return {
        "seconds": seconds,
        "faster": {name: seconds[f"llama.cpp {name}"] / seconds[name] for name in GOALS},
        "verify_over_plain": seconds["verify"] / seconds["plain"],
        "plain_over_floor": seconds["plain"] / (weight_bytes(model) / bandwidth),
        "bytes_per_second": bandwidth,
        "weight_bytes": weight_bytes(model),
    }


def loaded(file: Path) -> dict:
    """Seconds and bytes of loading a file in a process of its own."""
    command = [sys.executable, Path(__file__).parent / "loading.py", file, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def show(rows: list[dict]) -> None:
    """Prints what was measured, with the goals in the headings."""
    from rich.console import Console

    title = (
        f"{measure.machine()['cpu']}, {measure.machine()['threads']} threads; ms (llama.cpp's); goals in the headings"
    )
    heads = [f"{name}, {goal}x" for name, goal in GOALS.items()]
    heads += [f"verify / plain, {MOST_OVER_PLAIN}", f"plain / floor, {MOST_OVER_FLOOR}"]
    columns = ["file", *heads, f"load, {MOST_SECONDS:.0f} s", "memory / file"]
    table = measure.new_table(*columns, left=1, title=title)
    for row in rows:
        seconds, load = row["seconds"], row["load"]
        cells = [
            f"{seconds[name] * 1e3:.1f} ({seconds[f'llama.cpp {name}'] * 1e3:.1f}) {row['faster'][name]:.2f}x"
            for name in GOALS
        ]
        cells += [f"{row['verify_over_plain']:.2f}", f"{row['plain_over_floor']:.2f}"]
        cells += [f"{load['seconds']:.1f} s", f"{load['over_file']:.2f}, peak {load['peak_over_file']:.2f}"]
        table.add_row(row["model"], *cells)
    Console(width=max(120, Console().width)).print(table)


def main() -> None:
    parser = parser_of(__doc__, repeats=21)
    cache = Path(tempfile.gettempdir()) / "model_files"
    parser.add_argument("--folder", type=Path, default=cache, help=f"where made files are kept; default: {cache}")
    parser.add_argument("--file", type=Path, action="append", default=[], help="a GGUF file to measure too")
    parser.add_argument("--only", help="measures files whose names have this in them")
    options = parse(parser)
    files = {f"{name} {kind}": (name, kind) for name in SHAPES for kind in FORMATS}
    files |= {file.stem: file for file in (demo_file(), *options.file)}
    rows = []
    for name, source in files.items():
        if options.only and options.only not in name:
            continue
        file = source if isinstance(source, Path) else random_file(*source, options.folder)
        row = {"model": name, "file_bytes": os.path.getsize(file)}
        row |= measure_file(file, options.threads, options.repeats) | {"load": loaded(file)}
        rows.append(row)
        show(rows[-1:])
    show(rows)
    if options.only:
        new = {row["model"]: row for row in rows}
        rows = [new.pop(row["model"], row) for row in json.loads(RESULT.read_text())["rows"]] + list(new.values())
    result = {"machine": measure.machine(), "context": CONTEXT, "nodes": NODES, "prompt": PROMPT, "rows": rows}
    print(measure.save("models_cpu", result))


if __name__ == "__main__":
    main()
