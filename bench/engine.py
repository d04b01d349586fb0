"""What does an engine bring: many requests at once, prompts between rounds, and the second turn of a chat?

    python bench/engine.py [throughput] [gaps] [chat] --model demo --threads 2

throughput: tokens a second of some questions, one at a time and 8 at a time. gaps: milliseconds between the pieces of
texts that are being written, while prompts of 1,000 tokens come. chat: the first token of a second turn behind 2,000
tokens, with the prefix cache and without.
"""

import argparse
import itertools
import time

import numpy as np
import torch

from pyspec import generate, load
from pyspec.drafters import new_drafter
from pyspec.measure import prompts
from pyspec.serving.engine import Engine

TOKENS, QUESTIONS, AT_ONCE, LONG, CHAT = 128, 24, 8, 1000, 2000


def questions(model, count: int) -> list[list[int]]:
    return [question.tokens(model) for question in prompts.spec_bench()[:count]]


def text(model, tokens: int, start: int = 0) -> list[int]:
    """Questions one after another, so many tokens."""
    return list(itertools.islice(itertools.chain(*questions(model, 80)[start:]), tokens))


def throughput(model) -> None:
    found = {}
    for slots in (1, AT_ONCE):
        with Engine(model, slots=slots, prefix_memory=0, drafter=new_drafter("merged", model)) as engine:
            for warm in (True, False):
                start = time.perf_counter()
                asked = questions(model, QUESTIONS)[: slots if warm else None]
                answers = [engine.submit(prompt, max_new_tokens=TOKENS) for prompt in asked]
                tokens = sum(len(answer.result().tokens) for answer in answers)
                found[slots] = tokens / (time.perf_counter() - start)
    rates = ", ".join(f"{slots} at once {rate:.0f}" for slots, rate in found.items())
    print(f"tokens a second: {rates}, ratio {found[AT_ONCE] / found[1]:.2f}")


def gaps(model) -> None:
    times: dict[int, list[float]] = {}
    with Engine(model, slots=AT_ONCE, prefix_memory=0) as engine:
        going = [
            engine.submit(prompt, max_new_tokens=400, temperature=1.0, seed=number, on_piece=noting(times, number))
            for number, prompt in enumerate(questions(model, 4))
        ]
        while not all(len(times.get(number, ())) > 4 for number in range(4)):
            time.sleep(0.01)
        start = time.perf_counter()
        for number in range(4):  # one long prompt behind the other
            engine.submit(text(model, LONG, 10 * number), max_new_tokens=1).result()
        end = time.perf_counter()
        for answer in going:
            answer.cancel()
    between = np.concatenate([np.diff([at for at in each if start <= at <= end]) for each in times.values()]) * 1e3
    p50, p95 = np.percentile(between, (50, 95))
    print(f"ms between pieces while prompts come: p50 {p50:.1f}, p95 {p95:.1f}, ratio {p95 / p50:.2f} ({len(between)})")


def noting(times: dict, number: int):
    return lambda piece: times.setdefault(number, []).append(time.perf_counter())


def chat(model) -> None:
    turn = text(model, CHAT - TOKENS)
    first = generate(model, turn, max_new_tokens=TOKENS, prefix_memory=2**28)
    turn += first.tokens + text(model, 30, 60)
    seconds = {}
    for memory in (2**28, 0, 2**28, 0):
        if memory:
            generate(model, turn[: CHAT - TOKENS], max_new_tokens=TOKENS, prefix_memory=memory)
        start = time.perf_counter()
        found = generate(model, turn, max_new_tokens=1, prefix_memory=memory)
        seconds[memory] = time.perf_counter() - start
    with_it, without = seconds.values()
    print(
        f"first token of the second turn, {len(turn)} tokens: {with_it * 1e3:.0f} ms with the prefix cache, "
        f"{without * 1e3:.0f} without, ratio {with_it / without:.3f}, {found.tokens}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=("throughput", "gaps", "chat", []), default=[])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model = load(given.model)
    for measure in (throughput, gaps, chat):
        if not given.what or measure.__name__ in given.what:
            measure(model)


if __name__ == "__main__":
    main()
