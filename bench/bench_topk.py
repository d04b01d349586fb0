"""Is topk faster than torch.topk, and does it keep its word about recall?

    python bench/bench_topk.py                      tables, bench/results/topk_<device>.{json,png}
    pytest bench --benchmark-only                   the op alone, to compare before and after a change

The peer is torch.topk(sorted=False) on the same rows; the floor is one pass over them, which is amax. Recall is
measured on the same rows, by value. Every goal is printed with what was reached. On a GPU calls are replayed as CUDA
graphs, 20 in one, and torch.topk and topk are timed eagerly as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from command_line import parse, parser_of

from pyspec import measure
from pyspec.ops import choose_buckets, expected_recall, topk

MODES = {"one stage": {"per_bucket": 2}, "recall 0.99": {"recall": 0.99}, "exact": {}}
SHAPES = {  # rows, n, k
    "cpu": [(64, 16384, 64), (64, 16384, 256), (1, 131072, 256)],
    "cuda": [(1, 65536, 256), (256, 65536, 256)],
}
DTYPES = {"cpu": (torch.float32, torch.bfloat16, torch.float16), "cuda": (torch.float16, torch.float32)}
FASTER_THAN_TORCH = {"one stage": (8, 8, 4), "recall 0.99": (4, 4, 2), "exact": (1.5, 1.5, 1.5)}  # fp32 on a CPU
MICROSECONDS = {"one stage": (6, 40), "recall 0.99": (15, 95)}  # fp16 on an H200
CURVE = (64, 16384, 256)
PER_BUCKET, FACTORS, PROMISES = (1, 2, 3, 4), (1, 2, 4, 8, 16), (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
GRID = {"n": (1024, 4096, 16384, 65536, 262144, 1048576), "k": (1, 8, 64, 256, 4096), "rows": (1, 8, 64)}
NEVER_SLOWER = 0.95
IN_A_GRAPH = 20


def rows_of(rows: int, n: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(n)).to(device, dtype)


def check(x: torch.Tensor, k: int) -> None:
    """Refuses to time a wrong result."""
    for mode, knobs in MODES.items():
        found = topk(x, k, **knobs)
        assert torch.equal(found.values, x.gather(1, found.indices)), mode
        assert mode != "exact" or torch.equal(found.values.sort().values, x.topk(k).values.sort().values)


def measured_recall(x: torch.Tensor, k: int, **knobs) -> float:
    return (topk(x, k, **knobs).values >= x.topk(k).values[:, -1:]).float().mean().item()


def milliseconds(calls: dict[str, Callable], device: str, repeats: int) -> dict[str, float]:
    """Of one call each, in turn."""
    if device == "cpu":
        return {who: 1e3 * seconds for who, seconds in measure.in_turn(calls, repeats).items()}
    graphs = {}
    for who, call in calls.items():
        graphs[who] = measure.replayed([call] * IN_A_GRAPH)
    return {who: 1e3 * seconds / IN_A_GRAPH for who, seconds in measure.in_turn(graphs, repeats).items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES["cpu"], ids=str)
def test_topk(benchmark, shape, mode):
    rows, n, k = shape
    x = rows_of(rows, n, torch.float32, "cpu")
    check(x, k)
    benchmark(lambda: topk(x, k, **MODES[mode]))


# ==== the shapes that have goals ====


def time_shapes(device: str, repeats: int) -> list[dict]:
    results = []
    for place, (rows, n, k) in enumerate(SHAPES[device]):
        for dtype in DTYPES[device]:
            x = rows_of(rows, n, dtype, device)
            check(x, k)
            calls = {mode: (lambda x=x, k=k, knobs=knobs: topk(x, k, **knobs)) for mode, knobs in MODES.items()}
            calls["torch.topk"] = lambda x=x, k=k: torch.topk(x, k, sorted=False)
            calls["amax"] = lambda x=x: x.amax(1)
            row = {
                "rows": rows,
                "n": n,
                "k": k,
                "dtype": measure.name_of(dtype),
                "ms": milliseconds(calls, device, repeats),
                "recall": {mode: measured_recall(x, k, **knobs) for mode, knobs in MODES.items()},
                "chosen": choose_buckets(n, k, 0.99, device),
                "gb_s": 0.0,
                "goals": {},
            }
            row["gb_s"] = x.nbytes / row["ms"]["one stage"] / 1e6
            if device == "cuda":
                eager = {who: calls[who] for who in (*MODES, "torch.topk")}
                row["eager_ms"] = {who: 1e3 * s for who, s in measure.in_turn(eager, repeats).items()}
            if dtype == DTYPES[device][0]:
                row["goals"] = {mode: goals[place] for mode, goals in goals_of(device).items()}
            results.append(row)
            show_shape(row, device)
    return results


def goals_of(device: str) -> dict[str, tuple[float, ...]]:
    return FASTER_THAN_TORCH if device == "cpu" else MICROSECONDS


def show_shape(row: dict, device: str) -> None:
    ms = row["ms"]
    where = f"{row['rows']} x {row['n']} {row['dtype']} k={row['k']}"
    print(f"{where:>32}  torch.topk {ms['torch.topk']:.3f} ms, amax {ms['amax']:.3f} ms; .99 is {row['chosen']}")
    for mode in MODES:
        ratio, goal = ms["torch.topk"] / ms[mode], row["goals"].get(mode)
        verdict = ""
        if goal is not None and device == "cpu":
            verdict = f"goal {goal}x: {'reached' if ratio >= goal else 'MISSED'}"
        elif goal is not None:
            verdict = f"goal {goal} us: {'reached' if 1e3 * ms[mode] <= goal else 'MISSED'}"
        eager = f", eager {row['eager_ms'][mode]:.3f} ms" if "eager_ms" in row else ""
        print(
            f"{mode:>32}  {ms[mode]:.4f} ms{eager}, {ratio:5.1f}x torch.topk, {ms['amax'] / ms[mode]:4.0%} of floor, "
            f"recall {row['recall'][mode]:.4f}  {verdict}",
            flush=True,
        )


# ==== time against recall ====


def time_curve(device: str, repeats: int) -> dict:
    rows, n, k = CURVE
    x = rows_of(rows, n, DTYPES[device][0], device)
    knobs = {"exact": {}}
    for per_bucket in PER_BUCKET:
        for factor in FACTORS:
            buckets = -(-k * factor // per_bucket)
            if 2 * buckets * per_bucket <= n:
                knobs[f"{per_bucket} per bucket, {buckets} buckets"] = {"buckets": buckets, "per_bucket": per_bucket}
    knobs |= {f"recall {promise}": {"recall": promise} for promise in PROMISES}
    calls = {who: (lambda chosen=chosen: topk(x, k, **chosen)) for who, chosen in knobs.items()}
    calls["torch.topk"] = lambda: torch.topk(x, k, sorted=False)
    ms = milliseconds(calls, device, repeats)
    points = []
    for who, chosen in knobs.items():
        point = {"who": who, **chosen, "ms": ms[who], "measured": measured_recall(x, k, **chosen)}
        if "buckets" in chosen:
            point["expected"] = expected_recall(n, k, chosen["buckets"], chosen["per_bucket"])
        if "recall" in chosen:
            point["chosen"] = choose_buckets(n, k, chosen["recall"], device)
        points.append(point)
        expected = f", expected {point['expected']:.4f}" if "expected" in point else ""
        print(f"{who:>32}  {ms[who]:.4f} ms  recall {point['measured']:.4f}{expected} {point.get('chosen', '')}")
    return {"shape": CURVE, "torch_ms": ms["torch.topk"], "points": points}


# ==== exact, everywhere ====


def time_grid(device: str, repeats: int) -> list[dict]:
    results = []
    for n in GRID["n"]:
        for rows in GRID["rows"]:
            x = rows_of(rows, n, torch.float32, device)
            for k in (k for k in GRID["k"] if k <= n):
                calls = {"pyspec": lambda: topk(x, k), "torch.topk": lambda: torch.topk(x, k, sorted=False)}  # noqa: B023
                some = max(5, min(10 * repeats, repeats * 2**18 // (rows * n)))
                ms = milliseconds(calls, device, some)
                results.append({"rows": rows, "n": n, "k": k, "ms": ms, "ratio": ms["torch.topk"] / ms["pyspec"]})
            print(
                f"{rows:>4} x {n:<8}"
                + "".join(
                    f"  k={row['k']}: {row['ratio']:.2f}x" for row in results if (row["rows"], row["n"]) == (rows, n)
                ),
                flush=True,
            )
    slowest = min(results, key=lambda row: row["ratio"])
    verdict = "reached" if slowest["ratio"] >= NEVER_SLOWER else "MISSED"
    print(
        f"exact, least of the grid: {slowest['ratio']:.2f}x at {slowest['rows']} x {slowest['n']}, k={slowest['k']}; "
        f"goal {NEVER_SLOWER}x everywhere: {verdict}"
    )
    return results


PARTS = {"shapes": time_shapes, "curve": time_curve, "grid": time_grid}


def run(repeats: int, device: str = "cpu", parts: Sequence[str] = tuple(PARTS)) -> dict:
    result = {
        "machine": measure.machine(),
        "device": device,
        "repeats": repeats,
        "read_gb_s": measure.read_bandwidth(device) / 1e9,
    }
    for part in parts:
        result[part] = PARTS[part](device, repeats)
        measure.save(f"topk_{device}", result)
    return result


def plot(result: dict, path) -> None:
    plt = measure.pyplot()
    figure, (curve, grid) = plt.subplots(1, 2, figsize=(11, 4))
    points = result["curve"]["points"]
    for per_bucket in PER_BUCKET:
        some = [point for point in points if point.get("per_bucket") == per_bucket]
        curve.plot(
            [1 - p["measured"] for p in some], [p["ms"] for p in some], "o-", ms=3, label=f"{per_bucket} per bucket"
        )
    promised = [point for point in points if "recall" in point]
    curve.plot([1 - p["recall"] for p in promised], [p["ms"] for p in promised], "kx", label="recall=, at its promise")
    curve.axhline(points[0]["ms"], color="black", linewidth=1, label="exact")
    curve.axhline(result["curve"]["torch_ms"], color="black", linewidth=1, linestyle="--", label="torch.topk")
    curve.set_xscale("symlog", linthresh=1e-4)
    curve.set_yscale("log")
    curve.set_xlim(0.6, 0)
    rows, n, k = result["curve"]["shape"]
    curve.set_xlabel("share of the true top k that is missed")
    curve.set_ylabel(f"ms for {rows} x {n}, k={k}")
    curve.grid(alpha=0.3, which="both")
    curve.legend(fontsize=7)
    for k in GRID["k"]:
        for rows, style in zip(GRID["rows"], ("-", "--", ":"), strict=True):
            some = [row for row in result["grid"] if (row["k"], row["rows"]) == (k, rows)]
            colour = f"C{GRID['k'].index(k)}"
            label = f"k={k}" if rows == GRID["rows"][0] else None
            grid.plot([row["n"] for row in some], [row["ratio"] for row in some], style, color=colour, label=label)
    grid.axhline(1, color="black", linewidth=1)
    grid.set_xscale("log", base=2)
    grid.set_yscale("log")
    grid.set_xlabel(f"n; rows {', '.join(map(str, GRID['rows']))} are solid, dashed, dotted")
    grid.set_ylabel("exact topk, times faster than torch.topk")
    grid.grid(alpha=0.3, which="both")
    grid.legend(fontsize=7)
    measure.save_figure(figure, "topk", result, path)


def main() -> None:
    parser = parser_of(__doc__, repeats=30, devices=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="the figure needs all")
    options = parse(parser)
    result = run(options.repeats, options.device, options.parts)
    path = measure.save(f"topk_{options.device}", result)
    print(f"wrote {path}")
    if len(result.keys() & PARTS.keys()) == len(PARTS):
        plot(result, path.with_suffix(".png"))
        print(f"wrote {path.with_suffix('.png')}")


if __name__ == "__main__":
    main()
