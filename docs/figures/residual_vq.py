"""Draws docs/figures/residual_vq.png: a vector as a sum of codewords, and how keys and values are read by tables."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.patches import FancyArrow, Rectangle

from pyspec.caches.codebooks import demo_codebooks
from pyspec.ops.residual_vq import nearest

LAYER, SHOWN = 12, (1, 2, 4, 8)
KEY_COLOUR, VALUE_COLOUR, CODE_COLOUR = "#b8cfe6", "#f3e2b3", "#e08e45"


def draw_sum(axes) -> None:
    """A vector that these codebooks can say well: codewords of their own, and noise."""
    codebooks = demo_codebooks().tables[LAYER, 0].float()
    generator = torch.Generator().manual_seed(2)
    picks = torch.randint(codebooks.shape[1], (len(codebooks),), generator=generator)
    x = sum(words[pick] for words, pick in zip(codebooks, picks, strict=True))
    x = x + 0.1 * torch.randn(32, generator=generator)
    total, sums, codes = torch.zeros(32), [], []
    for words in codebooks:
        code = int(nearest((x - total)[None], words)[0])
        total = total + words[code]
        sums.append(total)
        codes.append(code)
    for axis, depth in zip(axes, SHOWN, strict=True):
        axis.bar(range(32), x, color="#cccccc", width=0.9, label="x / scale")
        axis.step(range(32), sums[depth - 1], where="mid", color=CODE_COLOUR, linewidth=1.4, label="sum of codewords")
        error = float((sums[depth - 1] - x).norm() / x.norm())
        listed = ", ".join(map(str, codes[: min(depth, 4)])) + (", ..." if depth > 4 else "")
        axis.set_title(f"depth {depth}: error {error:.2f}\ncodes {listed}", fontsize=8)
        axis.set_xticks([])
        axis.tick_params(labelsize=6)
    axes[0].legend(fontsize=6, loc="lower left")
    axes[0].set_xlabel("32 channels of a key", fontsize=8)


def box(axis, x: float, y: float, width: float, height: float, text: str, colour: str) -> None:
    axis.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="black"))
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=8)


def arrow(axis, x: float, y: float, length: float) -> None:
    axis.add_patch(FancyArrow(x, y, length, 0, width=0.01, head_width=0.12, head_length=0.12, color="black"))


def draw_reading(axis) -> None:
    box(axis, 0.0, 1.2, 2.0, 0.7, "query q, codebooks C\nonce a step", KEY_COLOUR)
    arrow(axis, 2.05, 1.55, 0.4)
    box(axis, 2.6, 1.2, 2.3, 0.7, "table q . C[j]\n8 levels x 256, in L1", KEY_COLOUR)
    arrow(axis, 4.95, 1.55, 0.4)
    box(axis, 5.5, 1.2, 2.2, 0.7, "score of a token: add\nthe entries of its codes", CODE_COLOUR)
    box(axis, 5.5, 0.1, 2.2, 0.7, "weight of a token: add it\nto the masses of its codes", CODE_COLOUR)
    axis.add_patch(FancyArrow(6.6, 1.18, 0, -0.24, width=0.01, head_width=0.12, head_length=0.12, color="black"))
    axis.text(6.7, 1.0, "softmax", fontsize=8, va="center")
    arrow(axis, 5.45, 0.45, -0.4)
    box(axis, 2.6, 0.1, 2.3, 0.7, "masses m[j]\n8 levels x 256, in L1", VALUE_COLOUR)
    arrow(axis, 2.55, 0.45, -0.4)
    box(axis, 0.0, 0.1, 2.0, 0.7, "out = sum of m[j] C[j]\nonce for 4096 tokens", VALUE_COLOUR)
    axis.set_xlim(-0.05, 7.8)
    axis.set_ylim(0, 2)
    axis.axis("off")


def main() -> None:
    figure = plt.figure(figsize=(10, 4.6))
    grid = figure.add_gridspec(2, 4, height_ratios=(1, 1.05))
    draw_sum([figure.add_subplot(grid[0, column]) for column in range(4)])
    draw_reading(figure.add_subplot(grid[1, :]))
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
