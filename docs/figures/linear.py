"""Draws docs/figures/linear.png: a weight in panels as it lies in memory, and the one order of a row's sum."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

OUTPUTS, INPUTS, PANEL = 7, 6, 4  # in the kernels a panel has 32 outputs
PANEL_COLOURS, PADDING_COLOUR, ROW_COLOURS = ("#b8cfe6", "#7fb77e"), "0.93", ("#e08e45", "0.8", "0.8")
PANELS = -(-OUTPUTS // PANEL)


def cell(axis, x: float, y: float, colour: str, label: str = "", width: float = 1) -> None:
    axis.add_patch(Rectangle((x, y), width, 1, facecolor=colour, edgecolor="0.6", linewidth=0.8))
    axis.text(x + width / 2, y + 0.5, label, ha="center", va="center", fontsize=7)


def draw_weight(axis) -> None:
    for n in range(PANELS * PANEL):
        for k in range(INPUTS):
            place = (n // PANEL * INPUTS + k) * PANEL + n % PANEL
            colour = PANEL_COLOURS[n // PANEL] if n < OUTPUTS else PADDING_COLOUR
            cell(axis, k, -n - 1, colour, str(place))
        axis.text(-0.2, -n - 0.5, f"output {n}" if n < OUTPUTS else "zeros", ha="right", va="center", fontsize=7)
    for panel in range(PANELS):
        axis.add_patch(Rectangle((0, -(panel + 1) * PANEL), INPUTS, PANEL, fill=False, linewidth=1.8))
        axis.text(INPUTS + 0.2, -panel * PANEL - PANEL / 2, f"panel {panel}", va="center", fontsize=8)
    axis.text(INPUTS / 2, 0.2, f"inputs 0 .. {INPUTS - 1}", ha="center", fontsize=8)
    axis.set_title("a weight as it lies in memory (panels of 4 here, of 32 in the kernels)", fontsize=9)
    axis.set_xlim(-2.2, INPUTS + 2.2)
    axis.set_ylim(-PANELS * PANEL - 0.2, 1)
    axis.axis("off")


def draw_chain(axis, top: float, rows: int, title: str) -> None:
    """Rows of x on the left; on the right the additions that make one output of each."""
    axis.text(0, top + 0.25, title, fontsize=8, fontweight="bold")
    for r in range(rows):
        y = top - 1 - 1.25 * r
        axis.text(-0.2, y + 0.5, f"row {r}", ha="right", va="center", fontsize=7)
        axis.text(0, y + 0.5, "0", ha="center", va="center", fontsize=8)
        for k in range(INPUTS):
            x = 0.6 + 1.75 * k
            axis.annotate("", (x, y + 0.5), (x - 0.45, y + 0.5), arrowprops={"arrowstyle": "->", "linewidth": 0.8})
            cell(axis, x, y, ROW_COLOURS[r], f"+ x{k} w{k}", 1.25)
        x = 0.6 + 1.75 * INPUTS
        axis.annotate("", (x, y + 0.5), (x - 0.45, y + 0.5), arrowprops={"arrowstyle": "->", "linewidth": 0.8})
        axis.text(x + 0.1, y + 0.5, "out", va="center", fontsize=8)


def draw_rows(axis) -> None:
    draw_chain(axis, 0, 1, "one row: plain decoding")
    draw_chain(axis, -2.2, 3, "three rows: a tree; each weight comes from memory once")
    axis.set_title("one output of each row: one chain over the inputs, whatever rows are beside it", fontsize=9)
    axis.set_xlim(-1.3, 1.75 * INPUTS + 2)
    axis.set_ylim(-7.2, 1)
    axis.axis("off")


figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1, 1.3))
draw_weight(axes[0])
draw_rows(axes[1])
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
