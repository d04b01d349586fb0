"""Does the demo model have llama.cpp's perplexity in every format of GGUF files?

    python bench/perplexity.py          a table, bench/results/perplexity_cpu.json; about 8 minutes

llama.cpp writes the demo model's values in 16 bits, and from these in each format; a matrix whose rows a format's
blocks do not fit gets another one, as llama.cpp chooses. Both engines then read the same tokens of the same files:
prompts of bench/data, one after another.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from command_line import parse, parser_of, positive
from llama_cpp_model import LlamaCppModel
from model_files import requantise

import pyspec
from pyspec import measure
from pyspec.checkpoints.sources import demo_file
from pyspec.measure import prompts

FORMATS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K_M Q4_K_M Q5_K_M Q6_K IQ4_NL IQ4_XS".split()
CHUNK = 512  # tokens that are read as one text
GOAL = 0.002  # at most: the share that a perplexity differs by


def surprise(logits: torch.Tensor, tokens: list[int]) -> float:
    """The sum of -log p of a text's tokens, but for the first; logits [n, V] after each token."""
    logs = logits[:-1].float().log_softmax(-1)
    return -logs.gather(1, torch.tensor(tokens[1:])[:, None]).sum().item()


def surprise_here(model, tokens: list[int]) -> float:
    pieces: list[torch.Tensor] = []
    model.prefill([tokens], capacity=2 * CHUNK, observe=lambda slot, chain, rows: pieces.append(rows.logits.clone()))
    return surprise(torch.cat(pieces), tokens)


def perplexities(file: Path, chunks: list[list[int]], threads: int) -> dict[str, float]:
    """Of both engines, and of the file's values in fp32, where activations are not rounded."""
    model, exact, peer = pyspec.load(file), pyspec.load(file, dtype=torch.float32), LlamaCppModel(file, threads, CHUNK)
    sums = {"pyspec": 0.0, "llama.cpp": 0.0, "fp32": 0.0}
    for tokens in chunks:
        sums["pyspec"] += surprise_here(model, tokens)
        sums["fp32"] += surprise_here(exact, tokens)
        logits = torch.from_numpy(peer.read(tokens, 0, all_logits=True))
        sums["llama.cpp"] += surprise(logits, tokens)
    peer.close()
    count = sum(len(tokens) - 1 for tokens in chunks)
    return {name: math.exp(total / count) for name, total in sums.items()}


def main() -> None:
    parser = parser_of(__doc__)
    cache = Path(tempfile.gettempdir()) / "model_files"
    parser.add_argument("--folder", type=Path, default=cache, help=f"where made files are kept; default: {cache}")
    parser.add_argument("--tokens", type=positive, default=8 * CHUNK, help=f"to read; default: {8 * CHUNK}")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="llama.cpp's names; default: all of them")
    options = parse(parser)
    options.folder.mkdir(parents=True, exist_ok=True)
    source = options.folder / "demo-F16.gguf"
    if not source.exists():
        requantise(demo_file(), source, "F16")
    tokenizer = pyspec.load("demo").tokenizer
    tokens = tokenizer.encode("\n\n".join(prompt.text for prompt in prompts.spec_bench()))[: options.tokens]
    chunks = [tokens[start : start + CHUNK] for start in range(0, len(tokens), CHUNK)]
    rows = []
    for kind in options.formats:
        file = options.folder / f"demo-{kind}.gguf"
        if not file.exists():
            requantise(source, file, kind)
        found = perplexities(file, chunks, options.threads)
        rows.append({"format": kind, **found, "change": found["pyspec"] / found["llama.cpp"] - 1})
        row = rows[-1]
        numbers = f"pyspec {row['pyspec']:.4f} llama.cpp {row['llama.cpp']:.4f} {row['change']:+.3%}"
        print(f"{kind:7} {numbers} values in fp32 {row['fp32']:.4f}", flush=True)
    worst = max(abs(row["change"]) for row in rows)
    print(f"{len(tokens)} tokens; at most {worst:.3%} from llama.cpp, goal {GOAL:.1%}")
    if options.formats == FORMATS:
        print(measure.save("perplexity_cpu", {"machine": measure.machine(), "tokens": len(tokens), "rows": rows}))


if __name__ == "__main__":
    main()
