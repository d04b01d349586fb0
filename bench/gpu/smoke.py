"""Does an op run here, and is it right? Every op in a process of its own, for one that fails can spoil the context.

    python bench/gpu/smoke.py               all of them at once
    python bench/gpu/smoke.py topk gear     these ones
    python bench/gpu/smoke.py --here topk   in this process, tiny: for a program that checks every access to memory

Compiled kernels stay in Triton's cache, so what runs later finds them.
"""

import argparse
import json
import subprocess
import sys
import time
import traceback

import where

from pyspec import measure
from pyspec.measure import cases, kernels

MODELS = ("Llama-3.1-8B", "Mamba-2 2.7B")  # the shapes that are tried


def check(op: str) -> dict:
    """Errors against the reference, by the case."""
    found = {}
    for case in cases.cases((op,)):
        if case.model not in MODELS:
            continue
        start = time.perf_counter()
        name = f"{case.model}, {case.shape}"
        try:
            problem = case.make(where.DEVICE)
            error = kernels.error_of(problem)
            where.synchronize()
            found[name] = {"error": error, "tolerance": problem.tolerance, "ok": error <= problem.tolerance}
        except Exception as error:
            lines = traceback.format_exc().splitlines()
            found[name] = {"ok": False, "failed": f"{type(error).__name__}: {error}"[:2000], "trace": lines[-12:]}
        found[name]["seconds"] = time.perf_counter() - start
    return found


def check_apart(ops: list[str]) -> dict:
    """`check` of some ops, each in a process of its own."""
    commands = {op: [sys.executable, __file__, "--print", "--here", op] for op in ops}
    running = {op: subprocess.Popen(line, stdout=-1, stderr=-1, text=True) for op, line in commands.items()}
    results = {}
    for op, process in running.items():
        out, err = process.communicate()
        try:
            results[op] = json.loads(out.splitlines()[-1])
        except (IndexError, ValueError):
            results[op] = {"": {"ok": False, "failed": f"exit {process.returncode}: {err[-2000:]}"}}
        measure.save("smoke", results)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", choices=[*cases.OPS, []], metavar="OP")
    parser.add_argument("--here", action="store_true", help="in this process")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--print", action="store_true", help="JSON")
    options = parser.parse_args()
    if options.tiny:
        where.make_tiny()
    ops = options.ops or list(cases.OPS)
    results = {op: check(op) for op in ops} if options.here else check_apart(ops)
    if options.print:
        print(json.dumps(results[ops[0]]))
        return 0
    for op, found in results.items():
        for name, row in found.items():
            what = f"error {row['error']:.1e} of at most {row['tolerance']:.0e}" if "error" in row else row["failed"]
            print(f"{'ok  ' if row['ok'] else 'FAIL'} {op}: {name}: {what} ({row.get('seconds', 0):.1f} s)")
    return 0 if all(row["ok"] for found in results.values() for row in found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
