"""How many instructions does each CPU kernel take? A number that no neighbour on the machine can change.

    python bench/instructions.py            compares with bench/results/instructions.json; 1 if any takes 5% more
    python bench/instructions.py --update   writes it

Runs the cases of `pyspec bench kernels` in the shape of a small model once each, on one thread, under valgrind's
callgrind with the AVX2 kernels (valgrind knows no AVX-512), and counts what happens inside the kernels' entry points.
The counts are those of one compiler: with another one there is nothing to compare with, which is said.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RESULT = Path(__file__).parent / "results" / "instructions.json"
LIBRARY = Path(__file__).parent.parent / "pyspec" / "lib" / "libpyspec_cpu.so"
MOST = 1.05  # times as many as before


def compiler() -> str:
    """Of the compiled library, as it says itself."""
    found = subprocess.run(["readelf", "-p", ".comment", str(LIBRARY)], capture_output=True, text=True, check=True)
    return re.search(r"GCC: .*|clang.*", found.stdout).group().strip()


def count() -> dict[str, int]:
    """Instructions inside each kernel's entry point, what it calls included."""
    if shutil.which("valgrind") is None:
        sys.exit("this needs valgrind: apt-get install valgrind")
    environment = os.environ | {"PYSPEC_ISA": "avx2", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        command = ["valgrind", "--tool=callgrind", "--toggle-collect=pyspec_*_avx2", f"--callgrind-out-file={out}"]
        subprocess.run([*command, sys.executable, __file__, "--run"], env=environment, check=True)
        report = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)]
        text = subprocess.run(report, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([\d,]+) .*:pyspec_(\w+)_avx2\b", text, re.MULTILINE)
    return {name: int(number.replace(",", "")) for number, name in found}


def small_cases() -> list:
    """Every case of `pyspec bench kernels`, for a small model."""
    from pyspec.measure import cases

    cases.MODELS = {"small": (cases.Attention(256, 512, 4, 2, 64, 4096), cases.StateSpace(256, 4, 64, 32))}
    cases.CONTEXT, cases.PROMPT = 512, 256
    return list(cases.cases())


def run() -> None:
    """What is counted: every case once."""
    for case in small_cases():
        case.make("cpu").call()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the counts instead of comparing them")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run()
        return 0
    before = json.loads(RESULT.read_text()) if RESULT.exists() else {"compiler": None, "instructions": {}}
    if not options.update and before["compiler"] != compiler():
        print(f"counts are those of {before['compiler']}, this library is of {compiler()}: nothing to compare")
        return 0
    found = count()
    regressed = 0
    for name, instructions in sorted(found.items()):
        old = before["instructions"].get(name)
        ratio = instructions / old if old else 1.0
        regressed += ratio > MOST
        print(f"{name:<24} {instructions:>13,}  {'new' if old is None else f'{ratio:.3f}x'}{'  MORE' * (ratio > MOST)}")
    if options.update:
        RESULT.write_text(json.dumps({"compiler": compiler(), "instructions": found}, indent=1) + "\n")
        return 0
    return 1 if regressed or before["instructions"].keys() - found.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
