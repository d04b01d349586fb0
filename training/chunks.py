"""Makes the chunks that ChunkDrafter drafts from: runs of a text that the model was sure of.

    python -m training.chunks handbook.txt --model demo --output chunks.npz

The model reads the text. Where it gives several tokens in a row a probability above a bar, they are a chunk, found
again by the token before them and by the model's hidden state before that token. `pyspec generate --draft-chunks
chunks.npz` drafts them; with `--acceptance unverified` they are the text as they are.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

import pyspec
from pyspec.arguments import decode_text
from pyspec.drafters.chunks import ChunkStore, store_of
from pyspec.runners import Runner

__all__ = ["chunks_of", "main"]

WINDOW = 512  # tokens that the model reads at once, each window from its own beginning
SHORTEST, LONGEST = 2, 16  # tokens of a chunk


def chunks_of(
    model: Runner,
    texts: Sequence[Sequence[int]],
    least: float = 0.3,
    progress: Callable[[int, int], None] | None = None,
) -> ChunkStore:
    """The chunks of some texts.

    Args:
        model: a runner with taps.
        texts: token ids.
        least: in (0, 1): the probability that the model gives every token of a chunk, at least. 0.3 is the paper's.
        progress: called with (windows read, windows).

    Raises:
        ValueError: the model is sure nowhere, or least is out of range.
    """
    if not 0 < least < 1:
        raise ValueError(f"least must be in (0, 1), got {least}")
    windows = [text[start : start + WINDOW] for text in texts for start in range(0, len(text), WINDOW)]
    found: defaultdict[int, list] = defaultdict(list)
    for number, window in enumerate(windows, start=1):
        states, chances = [], []

        def keep(slot, chain, verified, states=states, chances=chances, window=window):
            following = window[len(states) + 1 : len(states) + 1 + len(chain)]
            states.extend(verified.taps[:, 0].float().cpu().numpy())
            laws = verified.logits.log_softmax(1)
            chances.extend(float(laws[row, token].exp()) for row, token in enumerate(following))

        model.prefill([window], capacity=len(window), observe=keep, taps=(model.layers + 1,))
        for begin, end in sure_runs(chances, least):
            # chances[i] is that of token i + 1; the state at i - 1 is the one that predicted token i
            found[window[begin]].append((states[begin - 1], window[begin + 1 : end + 1]))
        if progress is not None:
            progress(number, len(windows))
    return store_of(found, model.fingerprint)


def sure_runs(chances: Sequence[float], least: float) -> list[tuple[int, int]]:
    """Where chances stay above the least: (begin, end) of runs of 2 to 16, the first at 1, longer ones in pieces."""
    runs, begin = [], 1
    for place in range(1, len(chances) + 1):
        is_sure = place < len(chances) and chances[place] > least
        if not is_sure or place - begin == LONGEST:
            if place - begin >= SHORTEST:
                runs.append((begin, place))
            begin = place if is_sure else place + 1
    return runs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path, metavar="FILE", help="texts in UTF-8")
    parser.add_argument("--model", default="demo", help="as for pyspec.load; default: demo")
    parser.add_argument("--least", type=float, default=0.3, help="probability of a chunk's tokens; default: 0.3")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    model = pyspec.load(options.model)
    texts = [model.tokenizer.encode(decode_text(str(path), path.read_bytes())) for path in options.texts]
    store = chunks_of(model, texts, options.least)
    store.save(options.output)
    mean = float(np.mean(np.diff(store.starts)))
    print(f"{sum(map(len, texts))} tokens, {len(store.tokens)} chunks of {mean:.1f} tokens; wrote {options.output}")


if __name__ == "__main__":
    main()
