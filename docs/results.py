"""The tables of results.md, made from bench/results/*.json while the site is built: they are never older than the runs.

In the page, a comment `<!-- results: NAME -->` becomes where bench/results/NAME.json was measured and its tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pyspec.caches import CACHES
from pyspec.drafters import DRAFTERS

RESULTS = Path(__file__).parent.parent / "bench" / "results"
MARK = re.compile(r"^<!-- results: (\w+) -->$", re.MULTILINE)
NAME = "name"  # what rows are called that come with a name each

# How a machine's entries are said, where not by their names; and those of a run, as far as they are said.
MACHINE = {"cpu": "{}", "date": "{}", "threads": "{} threads", "cores": "{} cores"}
RUN = {"compiler": "{}", "dtype": "{}", "read_gb_s": "{} GB/s read", "context": "{} tokens before"}

# By result: a caption, where its rows are, and its columns. A column is a heading and a path in the row; with a second
# path the first one's value over its own, as "2.5x"; with "%" a share. What a row lacks is left empty.
TIMES = [("ms", "ms/pyspec"), ("over SDPA", "ms/sdpa", "ms/pyspec"), ("over FlexAttention", "ms/flex", "ms/pyspec")]
ENGINES = [
    ("engine", NAME),
    ("tokens/s", "tokens_per_second"),
    ("over plain", "over pyspec plain/tokens_per_second"),
    ("with the prompt", "tokens_per_second_end_to_end"),
    ("tokens a round", "tokens_per_round"),
    ("texts like plain", "equal_to_plain"),
]
STEPS = [("nodes", NAME), ("seconds", "value")]
QUANTISED = [("nodes", "nodes"), ("tokens", "length"), ("dense ms", "ms/dense"), ("SDPA ms", "ms/sdpa")]
DRAFTING = [
    ("drafter", NAME),
    ("tokens/s", "tokens_per_second"),
    ("over plain", "speed_up"),
    ("over recycling", "over_recycling"),
    ("tokens a round", "tokens_per_round"),
    ("share of drafting", "draft_share", "%"),
    ("texts", "texts"),
    ("those of plain decoding", "equal"),
]
QUALITY = [
    ("cache", "cache"),
    ("bits at 8k", "effective_bits_at_8k"),
    ("perplexity", "perplexity"),
    ("change", "change", "%"),
    ("KL divergence", "kl"),
    ("same best token", "same_top", "%"),
    ("error of keys", "key_error"),
    ("of values", "value_error"),
    ("tokens a round", "accepted"),
    ("numbers found", "passkeys", "%"),
]
FLOORS = [
    (
        "Microseconds of a call on an H100, at the least",
        "calls",
        [
            ("call", NAME),
            ("for its bytes", "floors/memory"),
            ("for its instructions", "floors/instructions"),
            ("busiest", "floors/pipe"),
        ],
    )
]
FASTER = "How many times as fast as our dense attention"
TABLES = {
    "generate_bf16": [("Texts", "engines", ENGINES), ("A verify of so many nodes", "steps/seconds", STEPS)],
    "generate_int8": [("Texts", "engines", ENGINES), ("A verify of so many nodes", "steps/seconds", STEPS)],
    "drafters_bf16": [
        ("Greedy, all categories", "temperatures/0.0/all", DRAFTING),
        ("Temperature 0.8", "temperatures/0.8/all", DRAFTING),
        ("Several drawn answers to one problem", "answers", DRAFTING),
    ],
    "equality": [
        (
            "Texts with a drafter that are those of plain decoding, token by token",
            "checks",
            [
                ("check", NAME),
                ("texts", "prompts"),
                ("tokens", "tokens"),
                *((drafter, f"drafters/{drafter}/equal") for drafter in DRAFTERS),
            ],
        )
    ],
    "bit_equality": [
        (
            "Tokens, and rows of logits they were drawn from, that differ from plain decoding's in any bit",
            "checks",
            [
                ("dtype", "dtype"),
                ("drafter", "drafter"),
                ("nodes", "budget"),
                ("batch", "batch"),
                ("texts", "sequences"),
                ("tokens", "tokens"),
                ("rounds", "rounds"),
                ("tokens that differ", "token_differences"),
                ("rows that differ", "logit_differences"),
            ],
        )
    ],
    "kernels_cpu": [
        (
            "Every op in the shapes of five models",
            "rows",
            [
                ("op", "op"),
                ("model", "model"),
                ("shape", "shape"),
                ("us", "us"),
                ("share of the floor", "share_of_floor", "%"),
                ("over peers", "peers_us", "us"),
            ],
        )
    ],
    "attention_implementation_cpu": [
        (
            "",
            "rows",
            [
                ("dtype", "dtype"),
                ("documents", "documents"),
                ("attention, sdpa ms", "ms/sdpa/attention"),
                ("pyspec ms", "ms/pyspec/attention"),
                ("faster", "ms/sdpa/attention", "ms/pyspec/attention"),
                ("mask, sdpa ms", "ms/sdpa/mask"),
                ("pyspec's ms", "ms/pyspec/mask"),
                ("forward, faster", "ms/sdpa/forward", "ms/pyspec/forward"),
            ],
        )
    ],
    "tree_attention_cpu": [
        (
            "",
            "rows",
            [
                ("nodes", "nodes"),
                ("keys", "prefix"),
                ("dtype", "dtype"),
                *TIMES,
                ("over SDPA with a float mask", "ms/sdpa, float mask", "ms/pyspec"),
                ("floor ms", "floor_ms"),
            ],
        )
    ],
    "block_masked_attention_cpu": [
        (
            "",
            "rows",
            [
                ("mask", "pattern"),
                ("rows", "size"),
                ("visible tiles", "density", "%"),
                ("dtype", "dtype"),
                *TIMES,
                ("over SDPA's causal path", "ms/sdpa causal", "ms/pyspec"),
                ("mask built in ms", "build_ms/pyspec"),
                ("FlexAttention's", "build_ms/flex"),
            ],
        )
    ],
    "linear_cpu": [
        (
            "All linears of the demo model",
            "results",
            [
                ("weights", "weights"),
                ("rows", "rows"),
                ("ms", "ms/pyspec"),
                ("over one row", "ms/pyspec", "one_row_ms"),
                ("floor ms", "floor_ms"),
                ("bound by", "floor"),
                ("over peers", "ms", "ms/pyspec"),
            ],
        )
    ],
    "topk_cpu": [
        (
            "",
            "shapes",
            [
                ("rows", "rows"),
                ("values", "n"),
                ("k", "k"),
                ("dtype", "dtype"),
                ("torch.topk ms", "ms/torch.topk"),
                *((f"{how} over it", "ms/torch.topk", f"ms/{how}") for how in ("exact", "recall 0.99", "one stage")),
                ("recall of one stage", "recall/one stage", "%"),
            ],
        )
    ],
    "sparse_attention_cpu": [
        (
            "Quality",
            "quality",
            [
                ("setting", "setting"),
                ("error of the outputs", "error"),
                ("KL divergence", "kl"),
                ("same best token", "same", "%"),
                ("perplexity", "perplexity"),
                ("full attention's", "full_perplexity"),
            ],
        ),
        (
            "Time of a layer",
            "speed",
            [
                ("tokens", "n"),
                ("tree_attention ms", "ms/tree_attention"),
                ("torch ms", "ms/torch"),
                ("sparse, keys in columns, ms", "ms/sparse, keys in columns"),
                ("keys in rows", "ms/sparse, keys in rows"),
            ],
        ),
    ],
    "gear_cpu": [
        (
            FASTER,
            "rows",
            QUANTISED + [(cache, "ms/dense", f"ms/{cache}") for cache in CACHES if cache != "dense"],
        ),
        (
            "Encoding",
            "encode",
            [
                ("cache", NAME),
                ("us a token and layer", "us_per_token_and_layer"),
                ("bits at 8k", "effective_bits_at_8k"),
            ],
        ),
    ],
    "residual_vq_cpu": [
        (
            FASTER,
            "rows",
            QUANTISED + [(codes, "ms/dense", f"ms/{codes}") for codes in ("8 x 256", "4 x 256", "8 x 2048")],
        ),
        (
            "Encoding",
            "encode",
            [("codebooks", NAME), ("us a token and layer", "us_per_token_and_layer"), ("bits", "bits")],
        ),
    ],
    "selective_state_cpu": [
        (
            "A round of six drafts, all accepted, over a plain step",
            "results",
            [
                ("model", "model"),
                ("weights", "weights"),
                ("batch", "batch"),
                *((way, f"over_plain/{way} 6") for way in ("replay", "kept", "snapshots", "joint", "recompute")),
                ("plain step, s", "seconds/replay 1"),
                ("over its floor", "plain_over_floor"),
                ("transformers' step over ours", "over_plain/transformers 1"),
            ],
        ),
        (
            "Texts of a trained model, tokens a second",
            "texts",
            [
                ("model", "model"),
                *((name, f"tokens_per_second/{name}") for name in ("plain", "lookup", "merged", "transformers")),
                ("lookup over plain", "tokens_per_second/lookup", "tokens_per_second/plain"),
            ],
        ),
    ],
    "verify_cuda": [
        (
            "Seconds of a verify of so many nodes, behind 512 tokens, random weights",
            "results",
            [
                ("model", "model"),
                ("weights", "weights"),
                *((f"{nodes} nodes", f"seconds/{nodes}") for nodes in (1, 8, 16, 32, 64)),
                ("8 nodes over plain", "over_plain/8"),
                ("plain over its floor", "plain_over_floor"),
            ],
        )
    ],
    "generation_cuda": [
        (
            caption,
            f"models/{model}",
            [
                ("drafter", NAME),
                ("tokens/s", "tokens_per_second"),
                ("texts", "texts"),
                ("those of plain decoding", "equal_to_plain"),
            ],
        )
        for caption, model in (
            ("models/demo-ssm, 5.4M parameters, trained", "demo_ssm"),
            ("A random Llama of 8B, bf16, which repeats nothing", "random_llama"),
        )
    ],
    "kv_cache": [("", "rows", QUALITY), ("llama.cpp, each over its own dense cache", "peers", QUALITY)],
    "compiled_kernels_triton_3_6": FLOORS,
    "compiled_kernels_triton_3_9": FLOORS,
    "compiled_kernels_nvcc_13_0": FLOORS,
    "instructions": [("", "instructions", [("kernel", NAME), ("instructions a call", "value")])],
}


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
    for caption, path, columns in TABLES.get(name) or TABLES.get(name.replace("_cuda", "_cpu")) or everything(result):
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
