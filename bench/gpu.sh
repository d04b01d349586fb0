#!/usr/bin/env bash
# On a machine with a GPU, torch, Triton and nvcc, and no network: is everything right there, and how fast is it?
#
#   make gpu-kit; bench/gpu.sh              every step, the most telling first: nine minutes at most
#   bench/gpu.sh tests verify_int8          these steps
#   bench/gpu.sh again                      what failed the last time, with every launch waited for: two and a half
#   PYSPEC_DRY=1 bench/gpu.sh               what can be tried without a GPU: tiny, on the CPU, as the tests run it
#
# Results go to the folder PYSPEC_RESULTS, by default build/gpu. What is there is packed into the folder OUT, by default
# build, as results.tgz, every few seconds, whole or not at all: whenever the script is stopped, what was finished is
# kept. Steps that fail or take longer than their limit do not stop the others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=${PYSPEC_DRY:-}
export PYSPEC_RESULTS=${PYSPEC_RESULTS:-$PWD/build/gpu}
here=$PYSPEC_RESULTS
archive=${OUT:-build}/results.tgz
mkdir -p "$here" "$(dirname "$archive")"
export PATH=$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD:$PWD/bench PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$PWD/build/triton-cache TORCHINDUCTOR_CACHE_DIR=$PWD/build/inductor-cache
export OMP_NUM_THREADS=$([ -z "$dry" ] && echo 2 || echo 1)

# ==== what a step is ====

pack() {
  tar czf "$archive.part" -C "$(dirname "$here")" "$(basename "$here")" && mv "$archive.part" "$archive"
}

step() { # NAME SECONDS COMMAND...: at most so long, its output in NAME.log, its end in steps.jsonl
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [ -z "$dry" ] || limit=$((4 * limit)) # a CPU may be busy with other tests
  [ $((start + limit)) -le "$most" ] || limit=$((most - start))
  [ "$limit" -gt 0 ] || { echo "== $name: no time is left" && return; }
  echo "== $name (after $start s, at most $limit s)"
  timeout -k 5 "$limit" "$@" > "$here/$name.log" 2>&1 &
  local process=$!
  while kill -0 $process 2> /dev/null; do
    sleep 1
    [ $(((SECONDS - start) % 3)) -ne 0 ] || pack
  done
  wait $process
  local status=$?
  grep -v "\"$name\"" "$here/steps.jsonl" > "$here/steps.part" 2> /dev/null
  echo "{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - start))}" >> "$here/steps.part"
  mv "$here/steps.part" "$here/steps.jsonl"
  pack
  tail -n "${lines:-12}" "$here/$name.log"
  echo "== $name: status $status after $((SECONDS - start)) s"
}

# ==== the steps, by worth ====

GPU_TESTS="tests/kernels tests/runners/test_llama_cuda.py tests/runners/test_replayed_families.py"
GPU_TESTS="$GPU_TESTS tests/runners/test_verified.py"
GPU_TESTS="$GPU_TESTS --ignore-glob */test_compile*.py --ignore tests/kernels/triton/test_interpreter.py"
GPU_TESTS="$GPU_TESTS --ignore tests/kernels/cuda/test_nvcc.py"
GPU_TESTS="$GPU_TESTS -n 14 --timeout 90"
[ -z "$dry" ] || GPU_TESTS="tests/runners/test_verified.py"

ceilings() { step ceilings 12 "$python" bench/gpu/ceilings.py; }
smoke() { lines=40 step smoke 35 "$python" bench/gpu/smoke.py; }
tests() {
  lines=60 step tests 140 "$python" -m pytest -v --dist worksteal --tb short --junitxml "$here/tests.xml" $GPU_TESTS
}
verify_bf16() { lines=55 step verify_bf16 42 "$python" bench/gpu/verify.py bf16; }
verify_int8() { lines=55 step verify_int8 32 "$python" bench/gpu/verify.py int8; }
verify_int4() { lines=55 step verify_int4 32 "$python" bench/gpu/verify.py int4; }
verify_fp32() { lines=20 step verify_fp32 36 "$python" bench/gpu/verify.py fp32; }
kernels() { lines=90 step kernels 32 "$python" bench/gpu/kernels.py; }
state_space() {
  lines=30 step state_space 30 "$python" bench/bench_selective_state.py --device cuda --models "Mamba-2 2.7B" \
    --batches 1 16 --repeats 5
}
generation() { step generation 36 "$python" bench/gpu/generation.py; }
# In bench/gpu/flex.py the same shapes, so that FlexAttention need not be compiled here.
backward() {
  step backward 28 "$python" bench/bench_block_masked_attention.py --backward --device cuda --sizes 8192 \
    --patterns documents causal --seconds 1.5
}
block_masks() {
  lines=20 step block_masks 28 "$python" bench/bench_block_masked_attention.py --device cuda --sizes 8192 \
    --patterns documents causal --seconds 1.5
}
attention() { step attention 24 "$python" bench/bench_tree_attention.py --device cuda --dtypes bf16; }
topk() { lines=20 step topk 12 "$python" bench/bench_topk.py --device cuda --parts shapes; }
memory() { step memory 20 bash -c "$(memory_checks)"; }
memory_checks() { # each op of CUDA C++ under compute-sanitizer, at once
  for op in topk selective_state causal_conv residual_vq; do
    for tool in memcheck racecheck; do
      echo "compute-sanitizer --tool $tool --error-exitcode 9 $python bench/gpu/smoke.py --tiny --here $op" \
        "> $here/memory_${tool}_$op.log 2>&1 || echo $tool $op: status \$? &"
    done
  done
  echo "wait; tail -qn 1 $here/memory_*.log"
}
ALL="ceilings smoke tests verify_bf16 verify_int8 verify_int4 kernels backward generation state_space block_masks"
ALL="$ALL attention verify_fp32 topk memory"

# ==== is there anything to measure? ====

if [ -n "$dry" ]; then
  ALL="ceilings smoke tests verify_bf16 verify_int8 verify_int4 verify_fp32 kernels generation"
elif ! "$python" - << 'END'; then
import sys

import torch

if not torch.cuda.is_available():
    sys.exit("gpu.sh: torch sees no GPU here: nothing is run")
major, minor = torch.cuda.get_device_capability()
if major < 8:
    sys.exit(f"gpu.sh: {torch.cuda.get_device_name()} has compute capability {major}.{minor}, and 8.0 is the least: nothing is run")
try:
    torch.zeros(1, device="cuda").sum().item()
except RuntimeError as error:
    sys.exit(f"gpu.sh: the GPU does not work with this driver and torch {torch.__version__}: {error}")
END
  exit 1
fi

# ==== what was compiled elsewhere, and the compilation here, which must work too ====

if [ -z "$dry" ]; then
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv | tee "$here/nvidia-smi.csv"
  ln -sfn ../kernels/triton pyspec/kernels
  mkdir -p pyspec/lib
  cp build/gpu-kit/pyspec/lib/*.so pyspec/lib/
  if [ ! -e "$here/built" ]; then
    (CUDAARCHS=90 PYSPEC_ISAS=native nice "$python" setup.py -q build_ext --build-lib build/gpu-built \
      > "$here/build.log" 2>&1 && cp build/gpu-built/pyspec/_host*.so pyspec/ && touch "$here/built") &
  fi
fi

wanted=${*:-$ALL} most=$([ -z "$dry" ] && echo 540 || echo 2160)
if [ "$wanted" = again ]; then
  most=150
  wanted=$(sed -n 's/.*"step": "\([a-z_0-9]*\)", "status": [1-9].*/\1/p' "$here/steps.jsonl" | tr '\n' ' ')
  export CUDA_LAUNCH_BLOCKING=1
  GPU_TESTS="--tb long --last-failed $GPU_TESTS"
fi
if [[ -z $dry && $wanted =~ backward|block_masks|attention ]]; then # beside the tests, which time nothing
  for kind in forward backward tree; do
    TORCHINDUCTOR_COMPILE_THREADS=4 timeout 100 nice "$python" bench/gpu/flex.py $kind > "$here/flex_$kind.log" 2>&1 &
  done
fi
for name in $wanted; do "$name"; done
cat "$here/steps.jsonl"
! grep -q '"status": [1-9]' "$here/steps.jsonl"
