"""How many tokens of a prompt should a call have on a CPU? pyspec/runners/native.py has the answer as CHUNK.

    python bench/prompt_chunks.py MODEL [MODEL ...]      the least ms of a prompt of 512 tokens, by tokens of a call

Lengths are tried in turn, so that all see the same machine. Keys have the same bits in any chunks.
"""

import argparse
import time

from pyspec import load, measure
from pyspec.runners import native

CHUNKS, TOKENS, TURNS = (32, 64, 128, 256, 512), 512, 5


def milliseconds(source: str) -> list[float]:
    model, prompt = load(source), [index * 7919 % 30000 for index in range(TOKENS)]
    least = dict.fromkeys(CHUNKS, float("inf"))
    for _ in range(TURNS):
        for native.CHUNK in CHUNKS:
            start = time.perf_counter()
            model.prefill([prompt], capacity=TOKENS + 1)
            least[native.CHUNK] = min(least[native.CHUNK], time.perf_counter() - start)
    return [1e3 * seconds for seconds in least.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    table = measure.new_table("", *map(str, CHUNKS))
    for source in parser.parse_args().models:
        table.add_row(source, *(f"{found:.0f}" for found in milliseconds(source)))
    from rich.console import Console

    Console().print(table)


if __name__ == "__main__":
    main()
