"""The figure of bench_block_masked_attention: ratios, mask building, time against density and against N."""

from __future__ import annotations

from pyspec import measure


def draw(result: dict, path) -> None:
    plt = measure.pyplot()
    sizes = sorted({row["size"] for row in result["rows"]})
    dtypes = list(dict.fromkeys(row["dtype"] for row in result["rows"]))
    lines = 1 + (len(dtypes) if len(sizes) > 1 else 0)
    figure, grid = plt.subplots(lines, 4, figsize=(18, 4.2 * lines), squeeze=False)
    for axis, dtype in zip(grid[0], dtypes, strict=False):
        _ratios(axis, [row for row in result["rows"] if row["dtype"] == dtype and row["size"] == sizes[-1]])
        axis.set_title(f"{dtype}, N = {sizes[-1]}", fontsize=9)
    grid[0][0].set_ylabel("time over time of block_masked_attention")
    grid[0][0].legend(fontsize=7)
    _builds(grid[0][2], [row for row in result["rows"] if row["dtype"] == dtypes[0] and row["size"] == sizes[-1]])
    _density(grid[0][3], result["density"])
    for axes, dtype in zip(grid[1:], dtypes, strict=False):
        for axis, pattern in zip(axes, ("window", "documents", "tree", "sparse"), strict=True):
            _sizes(axis, [row for row in result["rows"] if (row["dtype"], row["pattern"]) == (dtype, pattern)])
            axis.set_title(f"{dtype}, {pattern}", fontsize=9)
    for axis in grid.flat:
        if not axis.has_data():
            axis.set_axis_off()
    what = f"batch {result['batch']}, {result['heads']} heads of {result['head_dim']}"
    measure.save_figure(figure, what, result, path)


def _ratios(axis, rows: list[dict]) -> None:
    names = ["base", "dense run", "sdpa", "sdpa full", *(["flex"] if "flex" in rows[0]["ms"] else [])]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        ratios = [row["ms"].get(name, 0.0) / row["ms"]["pyspec"] for row in rows]
        bars = axis.bar([x + i * width for x in range(len(rows))], ratios, width, label=name)
        axis.bar_label(bars, fmt="%.1f", fontsize=5)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_yscale("log")
    _name_patterns(axis, rows)


def _builds(axis, rows: list[dict]) -> None:
    names = list(rows[0]["build_ms"])
    for i, name in enumerate(names):
        heights = [row["build_ms"].get(name, 0.0) for row in rows]
        axis.bar([x + 0.8 / len(names) * i for x in range(len(rows))], heights, 0.8 / len(names), label=name)
    axis.set_yscale("log")
    axis.set_title("building the mask, ms", fontsize=9)
    axis.legend(fontsize=7)
    _name_patterns(axis, rows)


def _sizes(axis, rows: list[dict]) -> None:
    for name in ("pyspec", "base", "sdpa", "sdpa full", "flex"):
        points = [(row["size"], row["ms"][name]) for row in rows if name in row["ms"]]
        if points:
            axis.loglog(*zip(*points, strict=True), "o-", label=name)
    axis.set_xlabel("N")
    axis.set_ylabel("ms")
    axis.legend(fontsize=7)


def _density(axis, points: list[dict]) -> None:
    axis.plot([p["density"] for p in points], [p["ms"] for p in points], "o-")
    axis.plot([0, 1], [0, points[-1]["ms"] / points[-1]["over_line"]], "--", color="0.6")
    axis.set_title(f"time against visible tiles, N = {points[0]['size']}", fontsize=9)
    axis.set_xlabel("share of tiles")
    axis.set_ylabel("ms")


def _name_patterns(axis, rows: list[dict]) -> None:
    axis.set_xticks([x + 0.3 for x in range(len(rows))], [row["pattern"] for row in rows], rotation=40, fontsize=8)
