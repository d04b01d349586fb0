"""Draws docs/figures/topk.png: a row in buckets, and the recall that buckets promise against what they keep."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import long_context

import pyspec
from pyspec.ops import expected_recall, topk

ROW = (3, 9, 1, 7, 8, 2, 5, 6, 4, 0, 12, 11)
BUCKETS, COLOURS = 4, ("#b8cfe6", "#7fb77e", "#e08e45", "#d8a0c8")
N, K, ROWS = 2048, 64, 400
SETTINGS = [(per_bucket, factor) for per_bucket in (1, 2, 4) for factor in (1, 2, 4, 8)]


def draw_row(axis, top: float, owner: list[int], title: str) -> None:
    axis.text(0, top + 1.25, title, fontsize=8, fontweight="bold")
    kept = {}
    for place, value in enumerate(ROW):
        axis.add_patch(Rectangle((place, top), 1, 1, facecolor=COLOURS[owner[place]], edgecolor="0.5"))
        axis.text(place + 0.5, top + 0.5, str(value), ha="center", va="center", fontsize=8)
        kept[owner[place]] = max(kept.get(owner[place], -1), value)
    best = sorted(ROW)[-BUCKETS:]
    for bucket in range(BUCKETS):
        x, found = 1.5 + 2.5 * bucket, kept[bucket] in best
        axis.add_patch(Rectangle((x, top - 1.6), 1, 1, facecolor=COLOURS[bucket], edgecolor="black", linewidth=1.5))
        axis.text(x + 0.5, top - 1.1, str(kept[bucket]), ha="center", va="center", fontsize=8)
        axis.text(x + 0.5, top - 2.0, "of the 4 best" if found else "not", ha="center", va="center", fontsize=6)


def recall(x: torch.Tensor, assignment: str) -> list[float]:
    least = x.topk(K).values[:, -1:]
    found = []
    for per_bucket, factor in SETTINGS:
        knobs = {"buckets": K * factor // per_bucket, "per_bucket": per_bucket, "assignment": assignment}
        found.append((topk(x, K, **knobs).values >= least).float().mean().item())
    return found


generator = torch.Generator().manual_seed(0)
model = pyspec.load("demo", dtype=torch.float32, device="cpu")
(text,) = long_context.texts(model, 1, N + 1)
rows = {
    "random": torch.randn(ROWS, N, generator=generator),
    "log-normal": torch.randn(ROWS, N, generator=generator).exp(),
    "attention scores": long_context.attention_scores(model, text),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.2))
draw_row(left, 4, [place % BUCKETS for place in range(len(ROW))], "interleaved: 4 buckets keep 1 each")
draw_row(left, -1, [place * BUCKETS // len(ROW) for place in range(len(ROW))], "contiguous")
left.set_xlim(-0.3, len(ROW) + 0.3)
left.set_ylim(-3.5, 6)
left.axis("off")
expected = [expected_recall(N, K, K * factor // per_bucket, per_bucket) for per_bucket, factor in SETTINGS]
right.plot([0.5, 1], [0.5, 1], color="black", linewidth=0.8)
for (kind, x), colour in zip(rows.items(), ("C0", "C2", "C3"), strict=True):
    right.plot(expected, recall(x, "interleaved"), "o", color=colour, markersize=5, label=f"{kind}, interleaved")
    right.plot(expected, recall(x, "contiguous"), "x", color=colour, markersize=5, label=f"{kind}, contiguous")
right.set_xlabel("expected recall")
right.set_ylabel(f"measured recall of rows of {N}, k={K}")
right.grid(alpha=0.3)
right.legend(fontsize=7)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
