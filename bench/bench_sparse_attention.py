"""What does sparse_attention change in the demo model behind a long text, and from what length is it faster?

    python bench/bench_sparse_attention.py          tables, bench/results/sparse_attention_cpu.json

Texts are the articles of the prompts. Their beginning is read with full attention; the rest is fed token by token,
with sparse attention in every layer. Against the same steps with full attention: the error of attention outputs (norm
of the difference over norm, for the queries of the full run), the mean KL divergence of the next-token laws, how often
the best token is the same, and the perplexity of the text. Then the time of one layer's attention for one query, the
keys stored in rows or in columns, against the runner's own kernel and torch's.
"""

from __future__ import annotations

import math
import time

import long_context
import torch
import torch.nn.functional as F
from command_line import parse, parser_of, positive
from long_context import LongContext

import pyspec
from pyspec import measure
from pyspec.ops import sparse_attention

SETTINGS = (
    {"components": 64, "positions": 128, "per_bucket": None},  # all components: the best that positions allow
    {"components": 16, "positions": 128, "per_bucket": None},
    {"components": 16, "positions": 128, "per_bucket": 2},
    {"components": 16, "positions": 128, "per_bucket": 1},
    {"components": 32, "positions": 128, "per_bucket": 2},
    {"components": 32, "positions": 256, "per_bucket": 2},
    {"components": 16, "positions": 32, "per_bucket": 2},
)
LENGTHS = (1024, 4096, 16384, 65536)


def name_of(setting: dict) -> str:
    kept = "exact top-k" if setting["per_bucket"] is None else f"{setting['per_bucket']} per bucket"
    return f"{setting['components']} components, {setting['positions']} positions, {kept}"


def quality(model, texts: list[list[int]], context: int) -> list[dict]:
    found = {name_of(setting): {"error": [], "kl": [], "same": [], "loss": []} for setting in SETTINGS}
    full_loss = []
    for text in texts:
        steps = LongContext(model, text, context)
        errors: dict[str, list[float]] = {name: [] for name in found}

        def compared(layer, q, k, v, errors=errors):
            out = long_context.full(layer, q, k, v)
            for setting in SETTINGS:
                sparse = sparse_attention(q[None], k[None], v[None], **setting)[0]
                errors[name_of(setting)].append(((sparse - out).norm() / out.norm()).item())
            return out

        law = steps.logits(compared).log_softmax(1)
        targets = torch.tensor(text[context + 1 :])
        full_loss.append(F.nll_loss(law, targets).item())
        for setting in SETTINGS:

            def sparse(layer, q, k, v, setting=setting):
                return sparse_attention(q[None], k[None], v[None], **setting)[0]

            other = steps.logits(sparse).log_softmax(1)
            results = found[name_of(setting)]
            results["error"].append(sum(errors[name_of(setting)]) / len(errors[name_of(setting)]))
            results["kl"].append((law.exp() * (law - other)).sum(1).mean().item())
            results["same"].append((law.argmax(1) == other.argmax(1)).float().mean().item())
            results["loss"].append(F.nll_loss(other, targets).item())
    rows = []
    print(f"full attention: perplexity {math.exp(sum(full_loss) / len(full_loss)):.3f}")
    for name, results in found.items():
        mean = {what: sum(values) / len(values) for what, values in results.items()}
        row = {"setting": name, "perplexity": math.exp(mean.pop("loss")), **mean}
        row["full_perplexity"] = math.exp(sum(full_loss) / len(full_loss))
        rows.append(row)
        print(
            f"{name:>48}  output error {row['error']:.3f}, KL {row['kl']:.4f}, same best token {row['same']:.1%}, "
            f"perplexity {row['perplexity']:.3f}",
            flush=True,
        )
    return rows


def speed(heads: int, kv_heads: int, head_dim: int, repeats: int) -> list[dict]:
    rows = []
    generator = torch.Generator().manual_seed(0)
    for n in LENGTHS:
        q = torch.randn(heads, head_dim, generator=generator)
        k, v = (torch.randn(kv_heads, n, head_dim, generator=generator) for _ in range(2))
        columns, mean = k.transpose(1, 2).contiguous().transpose(1, 2), v.mean(1)[None]
        calls = {
            "sparse, keys in columns": lambda: sparse_attention(q[None], columns[None], v[None], value_mean=mean),  # noqa: B023
            "sparse, keys in rows": lambda: sparse_attention(q[None], k[None], v[None], value_mean=mean),  # noqa: B023
            "tree_attention": lambda: long_context.full(0, q, k, v),  # noqa: B023
            "torch": lambda: F.scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True),  # noqa: B023
        }
        ms = {who: 1e3 * seconds for who, seconds in measure.in_turn(calls, repeats).items()}
        rows.append({"n": n, "ms": ms})
        print(f"n={n:<6}  " + ", ".join(f"{who} {value:.3f} ms" for who, value in ms.items()), flush=True)
    return rows


def main() -> None:
    parser = parser_of(__doc__, repeats=15)
    parser.add_argument("--texts", type=positive, default=3)
    parser.add_argument("--context", type=positive, default=2048)
    parser.add_argument("--steps", type=positive, default=48)
    options = parse(parser)
    model = pyspec.load("demo", dtype=torch.float32, device="cpu")
    texts = long_context.texts(model, options.texts, options.context + options.steps + 1)
    start = time.perf_counter()
    result = {
        "machine": measure.machine(),
        **vars(options),
        "quality": quality(model, texts, options.context),
        "speed": speed(model.config.heads, model.config.kv_heads, model.config.head_dim, options.repeats),
    }
    path = measure.save("sparse_attention_cpu", result)
    print(f"wrote {path} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
