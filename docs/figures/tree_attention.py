"""Draws docs/figures/tree_attention.png: a tree, what its nodes see, and the tiles that one row is folded from."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

PARENTS = [-1, 0, 0, 1, 1, 2, 3]
WORDS = ["the", "cat", "dog", "sat", "ran", "sat", "on"]
PREFIX, TILE = 10, 4
PREFIX_COLOUR, NODE_COLOUR, ROW_COLOUR = "#b8cfe6", "#7fb77e", "#e08e45"
SHOWN = 6  # the node whose row is followed


def path_to(node: int) -> list[int]:
    return (path_to(PARENTS[node]) if PARENTS[node] >= 0 else []) + [node]


def draw_tree(axis) -> None:
    depth = [len(path_to(node)) - 1 for node in range(len(PARENTS))]
    height = {0: 0, 1: 0.8, 2: -0.9, 3: 1.3, 4: 0.3, 5: -0.9, 6: 1.3}
    for node, parent in enumerate(PARENTS):
        if parent >= 0:
            axis.plot([depth[parent], depth[node]], [height[parent], height[node]], color="0.5", zorder=1)
        colour = ROW_COLOUR if node in path_to(SHOWN) else NODE_COLOUR
        axis.scatter(depth[node], height[node], s=750, color=colour, zorder=2)
        axis.text(depth[node], height[node], f"{node}\n{WORDS[node]}", ha="center", va="center", fontsize=8)
    axis.set_title("a draft tree: node 0 is the last committed token", fontsize=9)
    axis.set_xlim(-0.4, 3.4)
    axis.set_ylim(-1.5, 1.9)
    axis.axis("off")


def draw_mask(axis) -> None:
    for node in range(len(PARENTS)):
        seen = [PREFIX + ancestor for ancestor in path_to(node)]
        for slot in range(PREFIX + len(PARENTS)):
            colour = PREFIX_COLOUR if slot < PREFIX else (NODE_COLOUR if slot in seen else "white")
            if node == SHOWN and slot in seen:
                colour = ROW_COLOUR
            axis.add_patch(Rectangle((slot, -node - 1), 1, 1, facecolor=colour, edgecolor="0.8"))
    axis.plot([PREFIX, PREFIX], [-len(PARENTS), 0], color="black", linewidth=1)
    axis.text(PREFIX / 2, 0.25, f"prefix, n = {PREFIX}", ha="center", fontsize=8)
    axis.text(PREFIX + len(PARENTS) / 2, 0.25, "slots n .. n+T-1", ha="center", fontsize=8)
    axis.set_yticks([-node - 0.5 for node in range(len(PARENTS))], [f"node {node}" for node in range(len(PARENTS))])
    axis.set_xlim(0, PREFIX + len(PARENTS))
    axis.set_ylim(-len(PARENTS), 0.9)
    axis.set_xticks([])
    axis.tick_params(length=0, labelsize=8)
    axis.set_title("what each node sees (the op is given the right part, as bits)", fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


def draw_row(axis) -> None:
    slots = list(range(PREFIX)) + [PREFIX + ancestor for ancestor in path_to(SHOWN)]
    for position, slot in enumerate(slots):
        colour = PREFIX_COLOUR if slot < PREFIX else ROW_COLOUR
        axis.add_patch(Rectangle((position, 0), 1, 1, facecolor=colour, edgecolor="0.8"))
        label = slot if slot < PREFIX else f"n+{slot - PREFIX}"
        axis.text(position + 0.5, 0.5, label, ha="center", va="center", fontsize=7)
    for tile in range(-(-len(slots) // TILE)):
        shared = (tile + 1) * TILE <= PREFIX
        axis.add_patch(Rectangle((tile * TILE, 0), TILE, 1, fill=False, edgecolor="black", linewidth=1.8))
        label = f"tile {tile}: {'shared by all rows' if shared else 'gathered for this row'}"
        axis.text(tile * TILE + TILE / 2, -0.35, label, ha="center", fontsize=8)
    axis.set_title(
        f"node {SHOWN} by position: the sequence of plain decoding (tiles of {TILE} here, 64 in the kernels)",
        fontsize=9,
    )
    axis.set_xlim(-0.1, 16.1)
    axis.set_ylim(-0.6, 1.1)
    axis.axis("off")


figure = plt.figure(figsize=(11, 5.2))
grid = figure.add_gridspec(2, 2, height_ratios=(3, 1), width_ratios=(1, 1.9))
draw_tree(figure.add_subplot(grid[0, 0]))
draw_mask(figure.add_subplot(grid[0, 1]))
draw_row(figure.add_subplot(grid[1, :]))
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=120)
