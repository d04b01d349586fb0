"""Draws docs/figures/round.png: one round of the loop, as propose, verify, accept and commit."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

TOKENS = ["is", "blue", "not", "since", "and", "the", "of"]
PARENTS = [-1, 0, 0, 1, 1, 3, 3]
DRAWN = ["blue", "since", "always", "the", "clear", "air", "dust"]  # what the model draws after each node
PLACES = [(0, 0), (1.3, 0.5), (1.3, -0.85), (2.6, 0.95), (2.6, 0), (3.9, 1.4), (3.9, 0.5)]
ACCEPTED = (0, 1, 3, 5)
PREFIX = ["Why", "?", "The", "sky"]

BLUE, GREEN, ORANGE, GREY = "#b8cfe6", "#7fb77e", "#f0a860", "#e4e4e4"
INK, FAINT = "#2b2b2b", "#8a8a8a"


def box(axis, x: float, y: float, label: str, colour: str, width: float = 0.98, height: float = 0.5, **text) -> None:
    style = "round,pad=0,rounding_size=0.1"
    edge = "none" if colour == "none" else "#5c5c5c"
    corner = (x - width / 2, y - height / 2)
    axis.add_patch(
        FancyBboxPatch(corner, width, height, style, facecolor=colour, edgecolor=edge, linewidth=0.9, zorder=2)
    )
    axis.text(x, y - 0.01, label, ha="center", va="center", zorder=3, **{"fontsize": 9, "color": INK} | text)


def arrow(axis, start: tuple, end: tuple, colour: str = FAINT, width: float = 1.1) -> None:
    options = {
        "arrowstyle": "-|>",
        "color": colour,
        "linewidth": width,
        "shrinkA": 0,
        "shrinkB": 1,
        "mutation_scale": 9,
    }
    axis.annotate("", end, start, arrowprops=options, zorder=1)


def panel(axis, number: int, title: str, words: str, width: float, bottom: float, top: float) -> None:
    axis.set_title(f"{number}  {title}", loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=20)
    axis.text(0, 1.02, words, transform=axis.transAxes, fontsize=9, color="#555555", va="bottom")
    axis.set_xlim(-0.52, width)
    axis.set_ylim(bottom, top)
    axis.axis("off")


def tree(axis, colours: list[str], path: tuple[int, ...] = ()) -> None:
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            on_path = node in path
            (x, y), (to_x, to_y) = PLACES[parent], PLACES[node]
            axis.plot(
                [x + 0.49, to_x - 0.49],
                [y, to_y],
                color="#4c8a4b" if on_path else FAINT,
                linewidth=2.4 if on_path else 1.1,
                zorder=1,
            )
        fades = bool(path) and node not in path
        box(axis, *PLACES[node], TOKENS[node], colours[node], color=FAINT if fades else INK)


def propose(axis) -> None:
    panel(axis, 1, "propose", "the drafter guesses what may follow, as a tree", 5.75, -1.3, 1.85)
    tree(axis, [BLUE, *[ORANGE] * 6])
    axis.text(0, -0.42, "the newest\ntoken", ha="center", va="top", fontsize=8, color=FAINT)


def verify(axis) -> None:
    panel(axis, 2, "verify", "the model reads all nodes in one pass, each after its own path", 6.4, -1.3, 1.85)
    for node, (token, drawn) in enumerate(zip(TOKENS, DRAWN, strict=True)):
        box(axis, 0.95 * node, 1.3, token, BLUE if node == 0 else ORANGE, 0.88)
        arrow(axis, (0.95 * node, 1.05), (0.95 * node, 0.53))
        arrow(axis, (0.95 * node, -0.03), (0.95 * node, -0.53))
        box(axis, 0.95 * node, -0.8, drawn, "white", 0.88, style="italic")
    box(axis, 2.85, 0.25, "one pass of the model", BLUE, 6.6, 0.5, fontsize=10)
    axis.text(2.85, -1.18, "one token drawn at each node", ha="center", va="top", fontsize=8, color=FAINT)


def accept(axis) -> None:
    panel(axis, 3, "accept", "from the root, follow the model's own draws while the tree has them", 5.75, -1.3, 1.85)
    tree(axis, [GREEN if node in ACCEPTED else GREY for node in range(len(TOKENS))], ACCEPTED)
    arrow(axis, (4.39, 1.4), (4.73, 1.4), "#4c8a4b", 2)
    box(axis, 5.23, 1.4, "air", "white", style="italic")
    axis.text(5.23, 1.02, "not in the tree:\nthe round ends", ha="center", va="top", fontsize=8, color=FAINT)


def commit(axis) -> None:
    panel(axis, 4, "commit", "the accepted path becomes state; rejected nodes are forgotten", 7.45, -1.3, 1.85)
    before = [*PREFIX, *TOKENS[:1]]
    kept = [TOKENS[node] for node in ACCEPTED[1:]]
    for row, words, colours, said in (
        (1.05, before, [*[BLUE] * 5], "the text before"),
        (0.0, [*before, *kept, "air"], [*[BLUE] * 5, *[GREEN] * 3, "white"], "the text after"),
    ):
        axis.text(-0.43, row + 0.3, said, fontsize=8, color=FAINT, va="bottom")
        for place, (word, colour) in enumerate(zip(words, colours, strict=True)):
            style = "italic" if colour == "white" else "normal"
            box(axis, 0.86 * place - 0.05, row, word, colour, 0.8, style=style)
    axis.text(0.86 * 6 - 0.05, -0.35, "accepted drafts", ha="center", va="top", fontsize=8, color="#4c8a4b")
    axis.text(0.86 * 8 - 0.05, -0.35, "next root", ha="center", va="top", fontsize=8, color=FAINT)
    text = "four tokens from one pass, the same four that plain decoding says"
    axis.text(-0.43, -1.0, text, fontsize=9, color=INK, fontweight="bold")


figure, axes = plt.subplots(2, 2, figsize=(11, 5.9), width_ratios=(5, 5.6))
for draw, axis in zip((propose, verify, accept, commit), axes.flat, strict=True):
    draw(axis)
figure.subplots_adjust(left=0.015, right=0.99, top=0.9, bottom=0.01, wspace=0.07, hspace=0.3)
figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
