"""What do quantised caches cost in quality, on the demo model and real text?

    python bench/kv_cache.py                a table, bench/results/kv_cache.json; a quarter of an hour
    python bench/kv_cache.py --quick        the same of one short text
    python bench/kv_cache.py --caches rvq kivi-2bit --codebooks mine.safetensors    beside codebooks of your own

Texts are pages of Python's own documentation. Perplexity is teacher-forced through the decode path: a prompt is read as
chains of accepted drafts, with the bits of decoding it token by token, so every position reads the cache as it would
when the model speaks. Against the dense cache in the same dtype, over the positions that see quantised blocks:

    perplexity, its change, the mean KL divergence of the next token's law, how often the best token is the same;
    the relative Frobenius error of keys and values, and over that of the same backbone without low rank and outliers;
    of codes, that of the first levels alone too;
    effective bits of a number at 8k tokens; the accepted length of the lookup drafter;
    how many of the numbers that were hidden in a long text are found again.

Peers are measured against their own dense cache: transformers' QuantizedCache where quanto (optimum-quanto, which
compiles an extension at its first use) or hqq is installed, and
llama.cpp's q8_0 and q4_0 caches.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
from pathlib import Path
from pydoc_data.topics import topics

import cache_peers
import torch
from command_line import parse, parser_of, positive
from rich.console import Console

from pyspec import generate, load, measure
from pyspec.caches import CACHES, Codebooks, GearSettings, QuantisedSettings, ResidualVqSettings, cache_from_name
from pyspec.ops import gear_decode, gear_encode, residual_vq_decode, residual_vq_encode, rotary_of_blocks
from pyspec.ops.gear import BLOCK
from pyspec.ops.residual_vq import turn_keys

SETTINGS = {
    **{name: cache for name in CACHES if isinstance(cache := cache_from_name(name), GearSettings)},
    "int4, half": GearSettings(4, 128, keep=0.5),
    "int4, 48 keys": GearSettings(4, 128, key_channels=48),
    "3 bits": GearSettings(3, 64),
    "2 bits, fitted": GearSettings(2, 64, fitted=True),
    "gear-3bit": GearSettings(3, 64, rank=4, outliers=2, fitted=True),
}
FIRST = 2 * BLOCK  # from here on every position sees a quantised block
DEPTHS = (0.1, 0.5, 0.9)  # of a hidden number in its text
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def settings_of(name: str):
    """How a cache of the table is quantised."""
    return SETTINGS[name] if name in SETTINGS else cache_from_name(name)


def texts(model, count: int, tokens: int) -> list[list[int]]:
    """Pages of the language reference, the longest first."""
    pages = sorted(topics.values(), key=len, reverse=True)
    found = [model.tokenizer.encode(page)[:tokens] for page in pages[:count]]
    if len(found) < count or min(map(len, found)) < tokens:
        raise SystemExit(f"there are not {count} pages of {tokens} tokens")
    return found


def passkeys(model, tokens: int, depths=DEPTHS) -> list[tuple[list[int], str]]:
    """Texts of about so many tokens that ask for a number which they hide at some depth, and that number."""
    draw, encode = random.Random(0), model.tokenizer.encode
    filler, found = encode(FILLER), []
    for depth in depths:
        key = str(draw.randrange(10_000, 100_000))
        before, after = (int(share * tokens / len(filler)) for share in (depth, 1 - depth))
        text = [
            *encode("There is important information hidden inside a lot of irrelevant text. Find it. "),
            *filler * before,
            *encode(f"The pass key is {key}. Remember it. {key} is the pass key. "),
            *filler * after,
            *encode("What is the pass key? The pass key is"),
        ]
        found.append((text, key))
    return found


def is_found(model, text: list[int], key: str, cache: str | GearSettings) -> bool:
    return key in generate(model, text, drafter="lookup", max_new_tokens=8, cache=cache).text


def laws(model, text: list[int], cache: QuantisedSettings | None) -> torch.Tensor:
    """[n, V] log-probabilities of the next token at every position but the last."""
    rows = []
    model.prefill([text], cache=cache, observe=lambda _, chain, verified: rows.append(verified.logits.log_softmax(-1)))
    return torch.cat(rows)[:-1]


def keys_values(model, text: list[int]) -> list[torch.Tensor]:
    """Keys and values [layers, heads, n, D] of a text, whole blocks."""
    model.prefill([text])
    whole = len(text) // BLOCK * BLOCK
    return [part[:, 0, :, :whole].clone() for part in model.cache.keys_values.unbind(1)]


def errors(parts: list[torch.Tensor], decoded: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Relative Frobenius errors of keys and values."""
    return [float((x - exact.float()).norm() / exact.float().norm()) for x, exact in zip(decoded, parts, strict=True)]


def gear_errors(parts: list[torch.Tensor], settings: GearSettings) -> list[float]:
    return errors(parts, gear_decode(gear_encode(*parts, settings), settings, parts[0].shape[-1]))


def code_errors(parts: list[torch.Tensor], codebooks: Codebooks, depth: int) -> list[float]:
    """Of the first levels of each layer's codebooks."""
    (k, v), tables, rotary = (part.float() for part in parts), codebooks.tables[:, :, :depth], None
    if codebooks.frequencies is not None:
        rotary = rotary_of_blocks(codebooks.frequencies, k.shape[2] // BLOCK)
        k = turn_keys(k, rotary, back=True)
    k, v = residual_vq_decode(residual_vq_encode(k, v, tables), tables, codebooks.head_dim)
    return errors(parts, (k if rotary is None else turn_keys(k, rotary), v))


def accepted_length(model, text: list[int], cache: str | GearSettings) -> float:
    result = generate(model, text[:FIRST], drafter="lookup", budget=16, max_new_tokens=96, cache=cache)
    return result.stats.mean_accepted_length


def against_dense(dense: torch.Tensor, other: torch.Tensor, text: list[int]) -> dict[str, float]:
    """Figures of a law [n - 1, V] beside the dense one, from FIRST on."""
    dense, other, targets = dense[FIRST:], other[FIRST:], torch.tensor(text[FIRST + 1 :])[:, None]
    return {
        "nll": float(-other.gather(1, targets).mean()),
        "dense_nll": float(-dense.gather(1, targets).mean()),
        "kl": float((dense.exp() * (dense - other)).sum(-1).mean()),
        "same_top": float((other.argmax(-1) == dense.argmax(-1)).float().mean()),
    }


def error_figures(parts: list[torch.Tensor], settings: QuantisedSettings) -> dict[str, float]:
    """Errors of keys and values; of codes by depth, else over those of min-max in as many bits.

    None where some are left out.
    """
    if isinstance(settings, ResidualVqSettings):
        depth = settings.codebooks.format.depth
        found = {level: code_errors(parts, settings.codebooks, level) for level in range(1, depth + 1)}
        by_depth = {
            f"{side}_error_depth_{level}": error
            for level, both in found.items()
            for side, error in zip(("key", "value"), both, strict=True)
        }
        return {"key_error": found[depth][0], "value_error": found[depth][1]} | by_depth
    if settings.keep < 1 or settings.key_channels:
        return {}
    found, plain = gear_errors(parts, settings), gear_errors(parts, GearSettings(settings.bits, settings.group))
    return {
        "key_error": found[0],
        "value_error": found[1],
        "key_ratio": found[0] / plain[0],
        "value_ratio": found[1] / plain[1],
    }


def summary(name: str, figures: list[dict[str, float]]) -> dict:
    """The row of a cache: means over texts."""
    row = {"cache": name} | {
        figure: statistics.mean(each[figure] for each in figures) for each in figures[:1] for figure in each
    }
    dense = math.exp(row.pop("dense_nll"))
    row["perplexity"] = math.exp(row.pop("nll"))
    row["change"] = row["perplexity"] / dense - 1
    return row


def run(model, pages: list[list[int]], names: list[str], hidden: list[tuple[list[int], str]] = ()) -> list[dict]:
    head_dim = model.config.head_dim
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("dense", *names)}
    total = len(pages) * (len(names) + 1) + (len(names) + 1 if hidden else 0)
    with measure.counted(Console(stderr=True), total) as advance:
        for text in pages:
            advance("dense")
            dense = laws(model, text, None)
            accepted = {"accepted": accepted_length(model, text, "dense")}
            found["dense"].append(against_dense(dense, dense, text) | accepted)
            parts = keys_values(model, text)
            for name in names:
                advance(name)
                settings = settings_of(name)
                figures = against_dense(dense, laws(model, text, settings), text) | error_figures(parts, settings)
                found[name].append(figures | {"accepted": accepted_length(model, text, settings)})
        rows = [summary(name, figures) for name, figures in found.items()]
        for row in rows:
            settings = settings_of(row["cache"]) or "dense"
            row["effective_bits_at_8k"] = 16.0 if settings == "dense" else settings.effective_bits(head_dim, 8192)
            if hidden:
                advance(f"{row['cache']}, hidden numbers")
                row["passkeys"] = statistics.mean(is_found(model, *each, settings) for each in hidden)
    return rows


def run_peers(model, pages: list[list[int]], threads: int) -> tuple[list[dict], dict[str, str]]:
    """Rows of the peers' caches, and the reasons for those that are missing."""
    rows, missing = [], {}
    for engine, make in cache_peers.engines(model, max(map(len, pages)), threads):
        try:
            dense_laws, quantised = make()
            dense = [dense_laws(text) for text in pages]
            for name, peer_laws in quantised.items():
                parts = zip(dense, pages, strict=True)
                figures = [against_dense(right, peer_laws(text), text) for right, text in parts]
                rows.append(summary(f"{engine} {name}", figures))
        except Exception as error:  # a peer that cannot run is a result too
            missing[engine] = f"{type(error).__name__}: {error}"
    return rows, missing


COLUMNS = {  # title, width, format
    "effective_bits_at_8k": ("bits", 6, ".2f"),
    "perplexity": ("ppl", 9, ".3f"),
    "change": ("change", 9, ".2%"),
    "kl": ("KL", 9, ".5f"),
    "same_top": ("same", 7, ".1%"),
    "key_error": ("keys", 8, ".4f"),
    "key_ratio": ("ratio", 6, ".2f"),
    "value_error": ("values", 8, ".4f"),
    "value_ratio": ("ratio", 6, ".2f"),
    "accepted": ("accepted", 9, ".2f"),
    "passkeys": ("passkeys", 9, ".0%"),
}


def show(rows: list[dict]) -> None:
    width = max(len(row["cache"]) for row in rows)
    print(" " * width + "".join(f"{title:>{size}}" for title, size, _ in COLUMNS.values()))
    for row in rows:
        cells = (
            f"{format(row[column], style) if column in row else '':>{size}}"
            for column, (_, size, style) in COLUMNS.items()
        )
        print(f"{row['cache']:<{width}}" + "".join(cells))


def show_depths(rows: list[dict]) -> None:
    """Errors of what is codes, by how many of their levels."""
    for row in rows:
        depths = [int(name.rpartition("_")[2]) for name in row if name.startswith("key_error_depth")]
        if not depths:
            continue
        title = f"{row['cache']}, by depth"
        print("\n" + title + "".join(f"{depth:>7}" for depth in depths))
        for side in ("key", "value"):
            found = "".join(f"{row[f'{side}_error_depth_{depth}']:7.3f}" for depth in depths)
            print(f"{side + 's':>{len(title)}}{found}")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--texts", type=positive, default=2)
    parser.add_argument("--tokens", type=positive, default=1024, help="of a text")
    parser.add_argument("--passkey-tokens", type=positive, default=768, help="of a text that hides a number")
    parser.add_argument("--quick", action="store_true", help="one text of 640 tokens, and 512 around one number")
    parser.add_argument("--no-peers", action="store_true", help="leave transformers and llama.cpp out")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--caches", nargs="+", choices=[*SETTINGS, "rvq"], default=[*SETTINGS, "rvq"])
    parser.add_argument("--codebooks", nargs="+", type=Path, default=[], help="measured as rvq and the file's name")
    options = parse(parser)
    if options.quick:
        options.texts, options.tokens, options.passkey_tokens = 1, 640, 512
    if options.tokens < FIRST + BLOCK:
        sys.exit(f"--tokens must be at least {FIRST + BLOCK}, or no position would see a quantised block")
    for path in options.codebooks:
        options.caches.append(f"rvq {path.stem}")
        SETTINGS[options.caches[-1]] = ResidualVqSettings(Codebooks.load(path))
    model = load("demo", dtype=DTYPES[options.dtype], device="cpu")
    pages = texts(model, options.texts, options.tokens)
    hidden = passkeys(model, options.passkey_tokens, DEPTHS[1:2] if options.quick else DEPTHS)
    rows = run(model, pages, options.caches, hidden)
    peer_rows, missing = ([], {}) if options.no_peers else run_peers(model, pages, options.threads)
    show(rows + peer_rows)
    show_depths(rows)
    for peer, reason in missing.items():
        print(f"missing: {peer}: {reason}")
    result = {"machine": measure.machine(), "dtype": options.dtype, "tokens": options.tokens, "rows": rows}
    path = measure.save("kv_cache", result | {"peers": peer_rows, "missing": missing})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
