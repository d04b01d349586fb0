"""Draws docs/figures/selective_state.png: two rounds of one layer, what is replayed, verified and recorded."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

REPLAYED, ACCEPTED, REJECTED, MEMORY = "#7fb77e", "#7fb77e", "0.85", "#b8cfe6"
ROUNDS = (  # tokens replayed, then the tree: token, parent, accepted
    (["a"], [("b", -1, True), ("c", 0, True), ("x", 0, False), ("d", 1, True), ("y", 1, False)]),
    (["b", "c", "d"], [("e", -1, True), ("u", 0, False), ("f", 0, True), ("v", 1, False)]),
)


def box(axis, x: float, y: float, label: str, colour: str, width: float = 0.62, height: float = 0.5) -> None:
    style = "round,pad=0.02,rounding_size=0.08"
    patch = FancyBboxPatch((x - width / 2, y - height / 2), width, height, style, facecolor=colour, edgecolor="0.4")
    axis.add_patch(patch)
    axis.text(x, y, label, ha="center", va="center", fontsize=8)


def arrow(axis, start: tuple, end: tuple, label: str = "", colour: str = "0.35", style: str = "-") -> None:
    options = {"arrowstyle": "->", "color": colour, "linestyle": style, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", end, start, arrowprops=options)
    if label:
        axis.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.14, label, ha="center", fontsize=7)


def draw_round(axis, top: float, number: int, replayed: list[str], tree: list[tuple[str, int, bool]]) -> None:
    axis.text(-0.4, top + 0.95, f"round {number}: one call", fontsize=9, fontweight="bold")
    box(axis, 0.3, top, "state", MEMORY, 0.9)
    x = 1.9
    arrow(axis, (0.77, top), (x - 0.33, top), "read")
    for token in replayed:
        box(axis, x, top, token, REPLAYED)
        x += 0.85
        arrow(axis, (x - 0.85 + 0.33, top), (x - 0.33, top))
    axis.text((1.9 + x - 0.85) / 2, top + 0.4, "replay", ha="center", fontsize=8)
    box(axis, x + 0.15, top, "state", MEMORY, 0.9)
    axis.text(x + 0.15, top + 0.4, "store", ha="center", fontsize=8)
    start = x + 1.45
    places, depths, used = [], [], {}
    for token, parent, accepted in tree:
        depth = 0 if parent < 0 else depths[parent] + 1
        row = used.get(depth, 0)
        used[depth] = row + 1
        depths.append(depth)
        places.append((start + 0.95 * depth, top - 0.75 * row))
        source = (x + 0.62, top) if parent < 0 else (places[parent][0] + 0.33, places[parent][1])
        arrow(axis, source, (places[-1][0] - 0.33, places[-1][1]))
        box(axis, *places[-1], token, ACCEPTED if accepted else REJECTED)
    end = max(place[0] for place in places)
    axis.text((start + end) / 2, top + 0.4, "verify, nothing stored", ha="center", fontsize=8)
    box(axis, end + 1.75, top, "record\nx, dt, B", MEMORY, 1.3, 0.62)
    arrow(axis, (end + 0.4, top), (end + 1.08, top), "inputs", style=":")


figure, axis = plt.subplots(figsize=(9.5, 3.7))
for number, (replayed, tree) in enumerate(ROUNDS, start=1):
    draw_round(axis, -2.6 * (number - 1), number, replayed, tree)
arrow(axis, (7.7, -0.34), (3.1, -2.0), colour=REPLAYED, style="--")
axis.text(5.6, -1.6, "the accepted path b c d", fontsize=8, color="#4c8a4b")
axis.set_xlim(-0.5, 11.2)
axis.set_ylim(-3.8, 1.2)
axis.axis("off")
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
