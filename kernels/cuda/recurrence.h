// What the kernels of a recurrent state share on the GPU: elements as floats, and a round that can be
// trusted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/overlap.h"
#include "params/round.h"

namespace pyspec {
namespace {

// An element as it lies in memory; many loads may be on their way before the first becomes a float.
__device__ inline uint32_t load_bits(const void* p, int64_t index, Element element) {
  if (element == Element::kFloat32) return static_cast<const uint32_t*>(p)[index];
  return static_cast<const uint16_t*>(p)[index];
}
__device__ inline float to_float(uint32_t bits, Element element) {
  if (element == Element::kFloat32) return __uint_as_float(bits);
  if (element == Element::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ inline void store_element(void* p, int64_t index, Element element, float value) {
  if (element == Element::kFloat32) {
    static_cast<float*>(p)[index] = value;
  } else if (element == Element::kFloat16) {
    static_cast<__half*>(p)[index] = __float2half_rn(value);
  } else {
    static_cast<__nv_bfloat16*>(p)[index] = __float2bfloat16_rn(value);
  }
}

constexpr float kLog2E = 1.44269504f;

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }
__device__ inline float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// tree_of, by every warp for itself; no load waits for another.
__device__ inline RoundTree tree_on_gpu(const Round& round, int64_t index) {
  int64_t lane = threadIdx.x % 32;
  const int32_t* path = round.paths + index * round.longest_path;
  RoundTree tree{};
  tree.sequence = round.sequences[index], tree.half = round.halves[index];
  tree.first_row = round.starts[index], tree.nodes = round.starts[index + 1] - tree.first_row;
  tree.parents = round.parents + tree.first_row, tree.path = path;
  tree.advance = round.advances[index];
  for (unsigned goes_on = 0xffffffffu; goes_on == 0xffffffffu && tree.accepted < round.longest_path;) {
    int64_t at = tree.accepted + lane;
    goes_on = __ballot_sync(0xffffffffu, at < round.longest_path && path[at] >= 0);
    tree.accepted += goes_on == 0xffffffffu ? 32 : __ffs(~goes_on) - 1;
  }
  return tree;
}

// What of a round decides where a kernel reads and writes: nobody looked at it on the host, which does not
// wait for the device. fits: what it may read. All threads of a warp ask, and those of a block hear the same.
__device__ inline bool fits(const RoundTree& tree, int64_t rows, int64_t sequences, int64_t record_nodes) {
  bool good = tree.sequence >= 0 && tree.sequence < sequences && tree.first_row >= 0 && tree.nodes >= 0 &&
              tree.first_row + tree.nodes <= rows && (tree.half == 0 || tree.half == 1) &&
              (tree.advance || tree.nodes <= record_nodes);
#pragma unroll 1
  for (int64_t i = threadIdx.x % 32; i < tree.accepted; i += 32) good &= tree.path[i] < record_nodes;
  return __all_sync(0xffffffffu, good);
}
// And whether it may write. All threads of a block ask, and wait for each other.
__device__ inline bool parents_fit(const RoundTree& tree) {
  bool good = true;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < tree.nodes; i += blockDim.x) {
    int64_t parent = tree.parents[i];
    good &= i == 0 ? parent == -1 : parent >= 0 && parent < i;
    good &= !tree.advance || parent == i - 1;
  }
  return __syncthreads_and(good);
}

}  // namespace
}  // namespace pyspec
