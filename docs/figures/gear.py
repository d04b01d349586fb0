"""Draws docs/figures/gear.png: what rows see quantised and in full precision, and what a quantised block is made of."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Rectangle

from pyspec.ops import GearFormat, gear_decode, gear_encode
from pyspec.ops.gear import BLOCK, blocks_seen

PREFIX, WINDOW = 318, 64
ROWS = (("root", 0), ("node at depth 1", 1), ("node at depth 2", 2), ("node at depth 9", 9))
QUANTISED_COLOUR, EXACT_COLOUR, TREE_COLOUR = "#b8cfe6", "#f3e2b3", "#e08e45"
SHOWN = 64  # tokens and channels of the block that is taken apart


def draw_rows(axis) -> None:
    for line, (name, depth) in enumerate(ROWS):
        y, position = -line, PREFIX + depth
        start = blocks_seen(position, WINDOW) * BLOCK
        for first in range(0, start, BLOCK):
            axis.add_patch(Rectangle((first, y), BLOCK, 0.7, facecolor=QUANTISED_COLOUR, edgecolor="black"))
            axis.text(first + BLOCK / 2, y + 0.35, "quantised", ha="center", va="center", fontsize=8)
        axis.add_patch(Rectangle((start, y), PREFIX - start, 0.7, facecolor=EXACT_COLOUR, edgecolor="black"))
        axis.text((start + PREFIX) / 2, y + 0.35, "full precision", ha="center", va="center", fontsize=8)
        axis.add_patch(Rectangle((PREFIX, y), depth + 1, 0.7, facecolor=TREE_COLOUR, edgecolor="black"))
        axis.text(-4, y + 0.35, f"{name}, p = {position}", ha="right", va="center", fontsize=8)
    axis.plot([2 * BLOCK + WINDOW] * 2, [-len(ROWS) + 0.8, 0.9], color="black", linestyle=":", linewidth=1)
    axis.text(2 * BLOCK + WINDOW, 0.95, f"2 x {BLOCK} + window {WINDOW}", ha="center", fontsize=8)
    axis.text(0, 0.95, f"{PREFIX} committed tokens, then each node's ancestors: its position alone decides", fontsize=8)
    axis.set_xlim(-70, PREFIX + 14)
    axis.set_ylim(-len(ROWS) + 0.8, 1.3)
    axis.axis("off")


def block() -> torch.Tensor:
    """Keys as models have them: channels of several sizes, a few directions that tokens share, and spikes."""
    generator = torch.Generator().manual_seed(4)
    keys = torch.randn(BLOCK, SHOWN, generator=generator) * (0.6 + torch.rand(SHOWN, generator=generator))
    keys += 1.2 * torch.randn(BLOCK, 2, generator=generator) @ torch.randn(2, SHOWN, generator=generator)
    spikes = torch.rand(keys.shape, generator=generator) < 0.004
    return keys + 14 * spikes * torch.randn(keys.shape, generator=generator).sign()


def draw_block(axes) -> None:
    keys = block()

    def decoded(**parts: int) -> torch.Tensor:
        settings = GearFormat(2, 64, **parts)
        return gear_decode(gear_encode(keys[None, None], keys[None, None], settings), settings, SHOWN)[0][0, 0]

    def error(found: torch.Tensor) -> str:
        return f"error {float((found - keys).norm() / keys.norm()):.2f}"

    backbone, without, whole = decoded(outliers=2), decoded(), decoded(rank=4, outliers=2)
    pictures = (
        (keys, "X: keys of a block"),
        (backbone, f"D + S: 2 bits beside outliers\n{error(backbone)}; without S {error(without)}"),
        (whole - backbone, "L: rank 4 of what is left"),
        (whole, f"D + L + S\n{error(whole)}"),
    )
    for axis, (picture, title) in zip(axes, pictures, strict=True):
        axis.imshow(picture[:SHOWN], cmap="RdBu", vmin=-5, vmax=5, interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_xlabel(f"{SHOWN} channels", fontsize=8)
    axes[0].set_ylabel(f"{SHOWN} of {BLOCK} tokens", fontsize=8)


def main() -> None:
    figure = plt.figure(figsize=(10, 5.6))
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.15))
    draw_rows(figure.add_subplot(grid[0, :]))
    draw_block([figure.add_subplot(grid[1, column]) for column in range(4)])
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
