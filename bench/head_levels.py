"""What does a level of drafting with a trained head cost, of a plain step?

    python bench/head_levels.py --head models/demo-draft    a table, bench/results/head_levels.json

A text is decoded plainly, token by token, and after every step trees of 1, 2, ... levels are grown in turn and thrown
away, so that each finds the caches as a step leaves them and first reads the newest token with what the target said of
it. The floor is the bytes of the head's matrices by what this machine reads in a second: later levels may find some of
them in a cache.
"""

from __future__ import annotations

import statistics
import sys
import time

from command_line import DTYPES, parse, parser_of, positive

import pyspec
from pyspec import DraftTree, measure
from pyspec.drafters.eagle3 import Eagle3
from pyspec.drafters.shapes.reranked import TopPaths
from pyspec.measure import prompts

MOST_LEVELS = 5


def matrix_bytes(head) -> int:
    """Bytes that a level reads of a head's matrices, that of the taps left out."""
    layers = [getattr(layer, name) for layer in head.layers for name in layer.MATRICES]
    return sum(matrix.nbytes for matrix in (head.embedding_qkv, head.head, *layers))


def run(model, head, prompt: list[int], width: int, steps: int) -> tuple[list[float], dict[int, list[float]]]:
    """Seconds of plain steps, and by levels those of proposing."""
    drafters = {levels: Eagle3(head, model, TopPaths(width, levels), tables=()) for levels in range(1, MOST_LEVELS + 1)}
    readers = {levels: drafter.start(prompt) for levels, drafter in drafters.items()}

    def observe(slot, chain, verified):
        for reader in readers.values():
            reader.observe(chain, verified, range(len(chain)))

    taps = head.config.taps
    (logits,) = model.prefill([prompt], capacity=len(prompt) + steps + 1, taps=taps, observe=observe)
    context, plain, drafting = [*prompt, int(logits.argmax())], [], {levels: [] for levels in readers}
    for step in range(steps):
        for levels in readers:  # each behind a step of its own
            start = time.perf_counter()
            root = DraftTree.chain(context[-1:])
            verified = model.verify({0: root})[0]
            plain.append(time.perf_counter() - start)
            if levels == 1 + step % MOST_LEVELS:  # its readers wait for it: all have read the same
                told = verified
            start = time.perf_counter()
            readers[levels].propose(context, 64)
            drafting[levels].append(time.perf_counter() - start)
        model.commit({0: [0]})
        for reader in readers.values():
            reader.observe(root, told, [0])
        context.append(int(told.logits[0].argmax()))
    return plain, drafting


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--head", required=True, help="an EAGLE-3 head's folder")
    parser.add_argument("--dtype", choices=DTYPES, default="int8", help="default: int8")
    parser.add_argument("--weights", help="of the head: int8, int4, bf16; default: its own")
    parser.add_argument("--width", type=positive, default=4, help="of a tree; default: 4")
    parser.add_argument("--steps", type=positive, default=100, help="default: 100")
    options = parse(parser)
    model = pyspec.load(options.model, dtype=DTYPES[options.dtype], device="cpu")
    head = Eagle3(options.head, model, weights=DTYPES.get(options.weights, options.weights)).head
    prompt = prompts.spec_bench()[0].tokens(model)
    run(model, head, prompt, options.width, 10)  # which records what is run
    plain, drafting = run(model, head, prompt, options.width, options.steps)
    step, bandwidth, nbytes = statistics.median(plain), measure.read_bandwidth("cpu"), matrix_bytes(head)
    floor = nbytes / bandwidth
    print(f"a plain step {1e3 * step:.2f} ms; {nbytes / 1e6:.1f} MB a level: {1e6 * floor:.0f} us, {floor / step:.1%}")
    found, before = [], 0.0
    for levels, seconds in drafting.items():
        median, least = statistics.median(seconds), min(seconds)
        share = (median - before) / step
        print(f"{levels} levels {1e6 * median:5.0f} us ({1e6 * least:.0f} at best), {median / step:.1%}: {share:+.1%}")
        found.append({"levels": levels, "seconds": median, "least_seconds": least})
        before = median
    settings = {name: value for name, value in vars(options).items() if name != "threads"}
    rows = {"plain_seconds": step, "floor_seconds": floor, "bytes": nbytes, "levels": found}
    measure.save("head_levels", {"machine": measure.machine(), "settings": settings, **rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
