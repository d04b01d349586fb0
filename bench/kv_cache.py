"""What do packed caches cost in quality, on the demo model and real text?

    python bench/kv_cache.py                a table, bench/results/kv_cache.json

Texts are pages of Python's own documentation. Perplexity is teacher-forced through the decode path: a prompt is read as
chains of accepted drafts, with the bits of decoding it token by token, so every position reads the cache as it would
when the model speaks. Against the dense cache in the same dtype, over the positions that see packed blocks:

    perplexity, its change, the mean KL divergence of the next token's law, how often the best token is the same;
    the relative Frobenius error of keys and values, and over that of the same backbone without low rank and outliers;
    effective bits of a number at 8k tokens; the accepted length of the lookup drafter.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pydoc_data.topics import topics

import measure
import torch
from rich.console import Console

from pyspec import generate, load
from pyspec.caches import CACHES, GearCache
from pyspec.ops import gear_decode, gear_encode
from pyspec.ops.gear import BLOCK

SETTINGS = {
    **CACHES,
    "int4, rotated": GearCache(4, 128, rotate=True),
    "3 bits": GearCache(3, 64),
    "gear-3bit": GearCache(3, 64, rank=4, outliers=2, fitted=True),
}
FIRST = 2 * BLOCK  # from here on every position sees a packed block
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def texts(model, count: int, tokens: int) -> list[list[int]]:
    """Pages of the language reference, the longest first."""
    pages = sorted(topics.values(), key=len, reverse=True)
    found = [model.tokenizer.encode(page)[:tokens] for page in pages[:count]]
    if len(found) < count or min(map(len, found)) < tokens:
        raise SystemExit(f"there are not {count} pages of {tokens} tokens")
    return found


def laws(model, text: list[int], cache: GearCache | None) -> torch.Tensor:
    """[n, V] log-probabilities of the next token at every position but the last."""
    rows = []
    model.prefill([text], cache=cache, observe=lambda _, chain, logits: rows.append(logits.log_softmax(-1)))
    return torch.cat(rows)[:-1]


def keys_values(model, text: list[int]) -> list[torch.Tensor]:
    """Keys and values [layers, heads, n, D] of a text, whole blocks."""
    model.prefill([text])
    whole = len(text) // BLOCK * BLOCK
    return [part[:, 0, :, :whole].clone() for part in model._cache.keys_values.unbind(1)]


def errors(parts: list[torch.Tensor], settings: GearCache) -> list[float]:
    """Relative Frobenius errors of keys and values."""
    decoded = gear_decode(gear_encode(*parts, settings), settings, parts[0].shape[-1])
    return [float((x - exact.float()).norm() / exact.float().norm()) for x, exact in zip(decoded, parts, strict=True)]


def accepted_length(model, text: list[int], cache: str | GearCache) -> float:
    result = generate(model, text[:FIRST], drafter="lookup", budget=16, max_new_tokens=96, cache=cache)
    return result.stats.mean_accepted_length


def run(model, pages: list[list[int]], names: list[str]) -> list[dict]:
    head_dim = model.config.head_dim
    found: dict[str, dict[str, list[float]]] = {name: {} for name in ("dense", *names)}

    def note(name: str, **figures: float) -> None:
        for figure, value in figures.items():
            found[name].setdefault(figure, []).append(value)

    with measure.progress(Console(stderr=True)) as progress:
        task = progress.add_task("texts", total=len(pages) * (len(names) + 1))
        for text in pages:
            dense = laws(model, text, None)[FIRST:]
            targets = torch.tensor(text[FIRST + 1 :])[:, None]
            note("dense", nll=float(-dense.gather(1, targets).mean()), accepted=accepted_length(model, text, "dense"))
            parts = keys_values(model, text)
            progress.advance(task)
            for name in names:
                settings = SETTINGS[name]
                packed = laws(model, text, settings)[FIRST:]
                kl = (dense.exp() * (dense - packed)).sum(-1)
                key_error, value_error = errors(parts, settings)
                plain = errors(parts, GearCache(settings.bits, settings.group))
                note(
                    name,
                    nll=float(-packed.gather(1, targets).mean()),
                    kl=float(kl.mean()),
                    same_top=float((packed.argmax(-1) == dense.argmax(-1)).float().mean()),
                    key_error=key_error,
                    value_error=value_error,
                    key_ratio=key_error / plain[0],
                    value_ratio=value_error / plain[1],
                    accepted=accepted_length(model, text, settings),
                )
                progress.advance(task)
    rows = []
    for name, figures in found.items():
        row = {"cache": name} | {figure: statistics.mean(values) for figure, values in figures.items()}
        row["perplexity"] = math.exp(row.pop("nll"))
        row["effective_bits_at_8k"] = SETTINGS[name].effective_bits(head_dim, 8192) if name in SETTINGS else 16.0
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    dense = rows[0]["perplexity"]
    print(f"{'':<16}{'bits':>6}{'ppl':>9}{'change':>9}{'KL':>9}{'same':>7}{'keys':>14}{'values':>14}{'accepted':>10}")
    for row in rows:
        line = f"{row['cache']:<16}{row['effective_bits_at_8k']:>6.2f}{row['perplexity']:>9.3f}"
        if "kl" in row:
            line += f"{row['perplexity'] / dense - 1:>9.2%}{row['kl']:>9.5f}{row['same_top']:>7.1%}"
            line += "".join(f"{row[f'{x}_error']:>7.4f} ({row[f'{x}_ratio']:.2f})" for x in ("key", "value"))
        print(f"{line}{'' if 'kl' in row else ' ' * 53}{row['accepted']:>10.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=measure.positive, default=4)
    parser.add_argument("--tokens", type=measure.positive, default=1536, help="of a text")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--caches", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.tokens < FIRST + BLOCK:
        sys.exit(f"--tokens must be at least {FIRST + BLOCK}, or no position would see a packed block")
    torch.set_num_threads(options.threads)
    model = load("demo", dtype=DTYPES[options.dtype], device="cpu")
    rows = run(model, texts(model, options.texts, options.tokens), options.caches)
    show(rows)
    path = measure.save(
        "kv_cache", {"machine": measure.machine(), "dtype": options.dtype, "tokens": options.tokens, "rows": rows}
    )
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
