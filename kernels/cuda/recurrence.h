// What the kernels of a recurrent state share on the GPU: elements as floats, and a round that can be
// trusted.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "params/round.h"

namespace pyspec {
namespace {

__device__ inline float load_element(const void* p, int64_t index, Element element) {
  if (element == Element::kFloat32) return static_cast<const float*>(p)[index];
  if (element == Element::kFloat16) return __half2float(static_cast<const __half*>(p)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(p)[index]);
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

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// What of a round decides where a kernel reads and writes: nobody looked at it on the host, which does not
// wait for the device. All threads of a block ask.
__device__ inline bool fits(const RoundTree& tree, const Round& round, int64_t rows, int64_t sequences,
                            int64_t record_nodes) {
  bool good = tree.sequence >= 0 && tree.sequence < sequences && tree.first_row >= 0 && tree.nodes >= 0 &&
              tree.first_row + tree.nodes <= rows && (tree.half == 0 || tree.half == 1) &&
              (tree.advance ? tree.fold : tree.first_node + tree.nodes <= record_nodes);
  if (good) {
    int64_t end = tree.fold ? record_nodes : tree.first_node;
    for (int64_t i = threadIdx.x; i < tree.accepted; i += blockDim.x) good &= tree.path[i] < end;
    for (int64_t i = threadIdx.x; i < tree.nodes; i += blockDim.x) {
      int64_t parent = tree.parents[i];
      good &= i == 0 ? parent == -1 : parent >= 0 && parent < i;
      good &= !tree.advance || parent == i - 1;
    }
  }
  return __syncthreads_and(good);
}

}  // namespace
}  // namespace pyspec
