#!/usr/bin/env bash
# On a machine with a GPU, torch and Triton: builds, tests and benchmarks in one go; results are JSON under bench/results/.
# Results are also copied to the folder named by $1, if any.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m pip install -q --no-build-isolation --no-deps -e .
python3 -m pytest -q tests/kernels tests/ops
python3 bench/bench_tree_attention.py --device cuda
if [ $# -gt 0 ]; then cp bench/results/*cuda* "$1"; fi
