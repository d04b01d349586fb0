// x times the Hadamard matrix / sqrt(size), in the order of Sylvester, in place: log2(size) rounds of sums
// and differences. It is its own inverse.
#pragma once

#include <cstdint>

namespace {

inline void rotate(float* x, int64_t size) {
  for (int64_t step = 1; step < size; step *= 2) {
    for (int64_t first = 0; first < size; first += 2 * step) {
      for (int64_t i = first; i < first + step; ++i) {
        float a = x[i], b = x[i + step];
        x[i] = a + b, x[i + step] = a - b;
      }
    }
  }
  float factor = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(size)));
  for (int64_t i = 0; i < size; ++i) x[i] *= factor;
}

}  // namespace
