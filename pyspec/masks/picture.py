"""A picture of a mask that a person can check."""

from __future__ import annotations


def draw(kinds, seen, height: int, width: int, axis=None):
    """Draws tiles [R, C], 0 empty, 1 partial (orange), 2 full (blue), and what rows see [N, M] (dark), with matplotlib.

    A tile is height rows and width keys. Returns the axis.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    rows, keys = seen.shape
    axis = axis or plt.subplots(figsize=(6, 6 * max(rows, 1) / max(keys, 1) + 0.5))[1]
    colours = ListedColormap(["white", "#f2c48d", "#a9c6e3"])
    extent = (0, kinds.shape[1] * width, kinds.shape[0] * height, 0)
    axis.imshow(kinds, cmap=colours, vmin=0, vmax=2, extent=extent, interpolation="nearest", aspect="auto")
    axis.imshow(seen, cmap="Greys", alpha=0.35 * seen, extent=(0, keys, rows, 0), aspect="auto")
    axis.set_xlim(0, keys)
    axis.set_ylim(rows, 0)
    axis.set_xlabel("keys")
    axis.set_ylabel("rows")
    return axis
