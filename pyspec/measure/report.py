"""One self-contained HTML page of a run of `pyspec bench kernels`."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

from pyspec.measure import pyplot
from pyspec.measure.kernels import best_peer, time_text

OURS, PEER, FLOOR = "#2f6fb7", "#b9bec6", "#d1495b"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .3rem; }
p { margin: .3rem 0; } nav a { margin-right: .9rem; } a { color: #2f6fb7; } .muted { color: #66707f; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th { text-align: right; font-weight: 600; border-bottom: 1px solid #c7ccd4; }
td { text-align: right; border-bottom: 1px solid #eceef1; } td, th { padding: .2rem .55rem; }
td:not(:nth-child(2)) { white-space: nowrap; }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left; } .failed { color: #d1495b; } svg { max-width: 100%; }
"""
COLUMNS = ("model", "shape", "time", "floor", "of the floor", "GB/s", "GFLOP/s", "best peer", "faster")


def page(result: dict) -> str:
    """The page; needs matplotlib, and a browser no network.

    Args:
        result: of pyspec.measure.kernels.run.
    """
    machine, rows = result["machine"], result["rows"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    where = machine.get("gpu", machine["cpu"]) if result["device"] == "cuda" else machine["cpu"]
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result["multiply_gflop_s"].items())
    software = (
        f"{where} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"pyspec {machine['pyspec']}, {machine['date']}"
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>pyspec kernels</title>",
        f"<style>{STYLE}</style><h1>pyspec kernels</h1>",
        f"<p class='muted'>{html.escape(software)}</p>",
        f"<p>In the same run: reads {result['read_gb_s']:.1f} GB/s; multiplies {html.escape(rates)}. The floor "
        "of a case is the larger of its bytes over the one and its operations over the other. Small cases live in the "
        "caches and may pass the floor. Every kernel agreed with its reference before it was timed.</p>",
        "<nav>" + "".join(f"<a href='#{op}'>{op}</a>" for op in ops) + "</nav>",
    ]
    for op in ops:
        own = [row for row in rows if row["op"] == op]
        backend = own[0]["backend"]
        parts.append(f"<h2 id='{op}'>{op} <span class='muted'>({html.escape(backend)})</span></h2>")
        timed = [row for row in own if "failed" not in row]
        if timed:
            parts.append(_chart(timed))
        parts.append(_table(own))
    return "\n".join([*parts, "</html>"])


def _table(rows: Sequence[dict]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in COLUMNS) + "</tr>"]
    for row in rows:
        cells = [row["model"], row["shape"]]
        if "failed" in row:
            lines.append(
                "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
                + f"<td class='failed' colspan='{len(COLUMNS) - 2}'>{html.escape(row['failed'])}</td></tr>"
            )  # fmt: skip
            continue
        name, peer = best_peer(row)
        cells += [time_text(row["us"]), time_text(row["floor_us"]), f"{row['share_of_floor']:.0%}"]
        cells += [f"{row['gb_s']:.1f}", f"{row['gflop_s']:.1f}"]
        cells += ["", ""] if peer is None else [f"{name} {time_text(peer)}", f"{peer / row['us']:.2f}x"]
        lines.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _chart(rows: Sequence[dict]) -> str:
    """Bars of ours and the best peer, and a line where the floor is: as SVG, times on a logarithmic axis."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    plt = pyplot()
    figure, axis = plt.subplots(figsize=(10, 0.7 + 0.42 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        name, peer = best_peer(row)
        axis.barh(place - 0.19, row["us"], 0.36, color=OURS)
        if peer is not None:
            axis.barh(place + 0.19, peer, 0.36, color=PEER)
            axis.text(peer, place + 0.19, f" {name}", va="center", fontsize=7, color="#66707f")
        axis.plot([row["floor_us"]] * 2, [place - 0.4, place + 0.4], color=FLOOR, linewidth=2)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [f"{row['model']}: {row['shape']}" for row in rows], fontsize=8)
    axis.margins(y=0.02)
    axis.invert_yaxis()
    axis.set_xlabel("microseconds", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    marks = [
        Patch(color=OURS, label="pyspec"),
        Patch(color=PEER, label="best peer"),
        Line2D([], [], color=FLOOR, label="floor"),
    ]
    figure.legend(handles=marks, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    plt.close(figure)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
