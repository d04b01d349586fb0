"""`pyspec bench kernels`: is every kernel right on this machine, and how near to what the machine can do?"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import pyspec
from pyspec import measure
from pyspec.arguments import decode_text
from pyspec.measure.cases import OPS, Case, Problem, cases
from pyspec.ops import backend, backends

SECONDS = 0.6  # of calls that a case is timed for
ROTATED_BYTES, MOST_COPIES = 256e6, 20  # of inputs on a GPU: several times what its cache holds
SLOWER = 1.15  # of the time before: more is a regression


def run(
    ops: Sequence[str] = OPS, device: str = "cpu", console=None, keep: Callable[[dict], None] | None = None
) -> dict:
    """Checks and times every case of some ops.

    Args:
        keep: called with what there is after each case, for who may be stopped.

    Returns:
        machine, roofline and rows, ready for JSON. A row has the times of ours and of each peer, the floor, the error
        against the reference, or why it could not run.

    Raises:
        ValueError: an op is not known, or there is no such device.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where there is one, got {device!r}")
    wanted = list(cases(tuple(ops)))
    dtypes = (torch.float32, torch.bfloat16, *((torch.int8,) if device == "cpu" else ()))
    with measure.counted(console, len(wanted) + 1) as advance:
        advance("what the machine can do")
        bandwidth = measure.read_bandwidth(device)
        rates = {measure.name_of(dtype): measure.multiply_rate(dtype, device) for dtype in dtypes}
        result = {
            "machine": measure.machine() | {"pyspec": pyspec.__version__},
            "device": device,
            "read_gb_s": bandwidth / 1e9,
            "multiply_gflop_s": {name: rate / 1e9 for name, rate in rates.items()},
            "rows": [],
        }
        for case in wanted:
            advance(f"{case.op}, {case.model}")
            result["rows"].append(_row(case, device, bandwidth, rates))
            if keep is not None:
                keep(result)
    return result


def _row(case: Case, device: str, bandwidth: float, rates: dict[str, float]) -> dict:
    row = {"op": case.op, "model": case.model, "shape": case.shape, "backend": _backend_of(case.op, device)}
    try:
        problem = case.make(device)
        error = error_of(problem)
        if not error <= problem.tolerance:
            raise ValueError(f"differs from the reference by {error:.1e} of its largest value")
        calls, in_a_call = {"pyspec": problem.call} | problem.peers, 1
        if device == "cuda":
            calls, in_a_call = _replayed(case, problem, device)
        seconds = {name: value / in_a_call for name, value in measure.in_turn_for(calls, SECONDS).items()}
    except Exception as error:  # one kernel that fails is a result, and not the end of the others
        return row | {"failed": f"{type(error).__name__}: {error}"}
    floor = max(problem.bytes / bandwidth, problem.operations / rates[measure.name_of(problem.dtype)])
    ours = seconds.pop("pyspec")
    return row | {
        "us": 1e6 * ours,
        "peers_us": {name: 1e6 * value for name, value in seconds.items()},
        "bytes": problem.bytes,
        "operations": problem.operations,
        "gb_s": problem.bytes / ours / 1e9,
        "gflop_s": problem.operations / ours / 1e9,
        "floor_us": 1e6 * floor,
        "share_of_floor": floor / ours,
        "error": error,
    }


def _replayed(case: Case, problem: Problem, device: str) -> tuple[dict[str, Callable], int]:
    """Each call as a graph of several, over inputs of their own: one set of them would stay in the cache of the GPU."""
    copies = min(max(math.ceil(ROTATED_BYTES / problem.bytes), 2), MOST_COPIES)
    problems = [problem, *(case.make(device) for _ in range(copies - 1))]
    calls = {"pyspec": measure.replayed([each.call for each in problems])}
    for peer in problem.peers:
        try:
            calls[peer] = measure.replayed([each.peers[peer] for each in problems])
        except Exception:  # it waits for the device, which no graph can
            calls[peer] = lambda peer=peer: [each.peers[peer]() for each in problems]
    return calls, copies


def error_of(problem: Problem) -> float:
    """The largest difference from the reference, over the reference's largest value."""
    problem.fresh()
    found = problem.call().float()
    problem.fresh()
    with backend("reference"):
        expected = problem.call().float()
    problem.fresh()
    return float((found - expected).abs().max() / expected.abs().max())


def _backend_of(op: str, device: str) -> str:
    return next((row["backend"] for row in backends() if row["op"] == op and row["device"] == device), "torch")


# ==== showing ====


def show(result: dict, console) -> None:
    """A table for each op."""
    machine = result["machine"]
    console.print(
        f"{machine.get('gpu', machine['cpu']) if result['device'] == 'cuda' else machine['cpu']}, "
        f"{machine['threads']} threads, {machine['date']}: reads {result['read_gb_s']:.1f} GB/s, multiplies "
        + ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in result["multiply_gflop_s"].items()),
        highlight=False,
    )
    for op in dict.fromkeys(row["op"] for row in result["rows"]):
        columns = ("time", "floor", "of the floor", "GB/s", "GFLOP/s", "peer", "faster")
        table = measure.new_table("model", "shape", *columns, left=2, title=op)
        for row in (row for row in result["rows"] if row["op"] == op):
            if "failed" in row:
                table.add_row(row["model"], row["shape"], f"[red]{row['failed']}[/red]")
                continue
            name, peer = best_peer(row)
            table.add_row(
                row["model"],
                row["shape"],
                time_text(row["us"]),
                time_text(row["floor_us"]),
                f"{row['share_of_floor']:.0%}",
                f"{row['gb_s']:.1f}",
                f"{row['gflop_s']:.1f}",
                "" if peer is None else f"{name} {time_text(peer)}",
                "" if peer is None else f"{peer / row['us']:.2f}x",
            )
        console.print(table)


def best_peer(row: dict) -> tuple[str, float | None]:
    """The fastest peer of a row and its microseconds, None where there is none."""
    return min(row["peers_us"].items(), key=lambda item: item[1], default=("", None))


def time_text(us: float) -> str:
    return f"{us:.1f} us" if us < 1000 else f"{us / 1000:.2f} ms"


# ==== two runs ====


def compare(before: dict, after: dict) -> list[dict]:
    """The cases of both runs, each with its time before and after, and whether it is a regression.

    Times are taken over the floor of their own run, so that a machine that was slower as a whole is no regression.

    Raises:
        ValueError: the runs are of different devices.
    """
    if before["device"] != after["device"]:
        raise ValueError(f"runs must be of one device, got {before['device']} and {after['device']}")
    earlier = {_key(row): row for row in before["rows"]}
    found = []
    for row in after["rows"]:
        old = earlier.get(_key(row))
        if old is None or "failed" in old:
            continue
        line = {name: row[name] for name in ("op", "model", "shape")} | {"before_us": old["us"]}
        if "failed" in row:
            found.append(line | {"failed": row["failed"], "regressed": True})
            continue
        ratio = old["share_of_floor"] / row["share_of_floor"]
        found.append(line | {"after_us": row["us"], "over_before": ratio, "regressed": ratio > SLOWER})
    return found


def show_comparison(lines: Sequence[dict], console) -> None:
    table = measure.new_table("op", "model", "shape", "before", "after", "over the floor", left=3)
    for line in sorted(lines, key=lambda line: -line.get("over_before", float("inf"))):
        after = line.get("failed") or time_text(line["after_us"])
        ratio = "" if "failed" in line else f"{line['over_before']:.2f}x"
        style = "red" if line["regressed"] else None
        table.add_row(line["op"], line["model"], line["shape"], time_text(line["before_us"]), after, ratio, style=style)
    console.print(table)
    slower = sum(line["regressed"] for line in lines)
    console.print(f"{slower} of {len(lines)} are more than {SLOWER - 1:.0%} slower or fail", highlight=False)


def read(path: Path) -> dict:
    """A run that was written as JSON.

    Raises:
        ValueError: it is not one.
    """
    try:
        result = json.loads(decode_text(str(path), path.read_bytes()))
        result["device"], result["rows"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{path} is not a result of pyspec bench kernels --json") from None
    return result


def _key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["model"], row["shape"]
