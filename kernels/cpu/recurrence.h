// What the kernels of a recurrent state share on the CPU: memory of a thread, and elements as vectors of
// floats.
#pragma once

#include <cstdlib>

#include "cpu/simd.h"
#include "params/common.h"

namespace {

// Buffers of the calling thread that only grow.
template <int which>
float* scratch(int64_t floats) {
  static thread_local float* buffer = nullptr;
  static thread_local int64_t capacity = 0;
  if (floats > capacity) {
    std::free(buffer);
    capacity = (floats + 15) / 16 * 16;
    buffer = static_cast<float*>(std::aligned_alloc(64, capacity * sizeof(float)));
  }
  return buffer;
}

PYSPEC_INLINE F16 load_element(const void* p, int64_t index, pyspec::Element element) {
  if (element == pyspec::Element::kFloat32) return load(static_cast<const float*>(p) + index);
  if (element == pyspec::Element::kFloat16) return load_as_float(static_cast<const Float16*>(p) + index);
  return load_as_float(static_cast<const BFloat16*>(p) + index);
}
PYSPEC_INLINE void store_element(void* p, int64_t index, pyspec::Element element, F16 value) {
  if (element == pyspec::Element::kFloat32) return store(static_cast<float*>(p) + index, value);
  if (element == pyspec::Element::kFloat16) return store_as(static_cast<Float16*>(p) + index, value);
  return store_as(static_cast<BFloat16*>(p) + index, value);
}

}  // namespace
