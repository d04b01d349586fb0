"""Draws docs/figures/block_masked_attention.png: masks as tiles, and the lists of one row block."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch, Rectangle

from pyspec import BlockMask

FULL, PARTIAL = "#a9c6e3", "#f2c48d"
ROW_BLOCK = 5

generator = torch.Generator().manual_seed(2)
parents = [-1] + [int(torch.randint(max(0, node - 90), node, (1,), generator=generator)) for node in range(1, 384)]
tree = BlockMask.from_tree(parents, 256)
masks = {
    "documents, prefix-LM": BlockMask.from_documents([200, 120, 320], inputs=[90, 40, 150]),
    "window with 32 global tokens": BlockMask.from_window(640, window=150, global_tokens=32),
    "tree of 384 nodes over a prefix of 256": tree,
    "the same tree, depth first": tree.permuted(),
}


def draw_lists(axis, mask: BlockMask) -> None:
    """The row block whose lists are shown: what the kernel goes through, in its order."""
    begin, end = mask.full_ranges[0, 0, ROW_BLOCK].tolist()
    full = mask.full_tiles[begin:end].tolist()
    begin, end = mask.partial_ranges[0, 0, ROW_BLOCK].tolist()
    partial = mask.partial_tiles[begin:end].tolist()
    axis.text(0, 1.35, f"row block {ROW_BLOCK} of the window: full tiles, whose mask is never read", fontsize=9)
    for place, tile in enumerate(full):
        axis.add_patch(Rectangle((place * 1.2, 0.1), 1, 1, facecolor=FULL, edgecolor="0.4"))
        axis.text(place * 1.2 + 0.5, 0.6, f"keys\n{tile * 64} ..", ha="center", va="center", fontsize=8)
    start = len(full) * 1.2 + 5.2
    axis.text(start, 1.35, "then partial tiles, each with the place of its bits", fontsize=9)
    for place, (tile, index) in enumerate(partial):
        x = start + place * 1.2
        axis.add_patch(Rectangle((x, 0.1), 1, 1, facecolor=PARTIAL, edgecolor="0.4"))
        axis.text(x + 0.5, 0.6, f"keys\n{tile * 64} ..\nbits {index}", ha="center", va="center", fontsize=8)
    axis.set_xlim(-0.2, 14)
    axis.set_ylim(-0.1, 1.7)
    axis.axis("off")


figure = plt.figure(figsize=(13, 5.2))
grid = figure.add_gridspec(2, 4, height_ratios=(3.4, 1))
for column, (name, mask) in enumerate(masks.items()):
    axis = figure.add_subplot(grid[0, column])
    mask.plot(axis)
    axis.set_title(f"{name}\n{mask.density:.0%} of tiles visited", fontsize=9)
    axis.tick_params(labelsize=7)
    if name.startswith("window"):
        axis.add_patch(Rectangle((0, ROW_BLOCK * 64), 640, 64, fill=False, linewidth=2))
draw_lists(figure.add_subplot(grid[1, :]), masks["window with 32 global tokens"])
figure.legend(
    handles=[Patch(color=FULL, label="full"), Patch(color=PARTIAL, label="partial"), Patch(color="0.6", label="seen")],
    loc="lower right",
    fontsize=8,
)
figure.tight_layout()
figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
