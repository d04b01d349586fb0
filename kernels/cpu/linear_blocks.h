// How linear walks a panel: blocks of inputs, and what is asked for ahead of them.
#pragma once

#include "cpu/simd.h"
#include "params/linear.h"

namespace {

// Inputs whose weights stay in the first cache while all rows pass over them. A multiple of kGroup.
constexpr int64_t kBlock = 128;

// Weights that will be wanted: every step of the inner loop asks for some lines and goes on by `step` bytes.
struct Ahead {
  const char* next;
  int64_t step;
  template <int kLines>
  PYSPEC_INLINE void prefetch() {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(next + 64 * line);
    next += step;
  }
};

// The inputs of one block, out of all of them.
struct Range {
  int64_t first, last, inputs;
};

}  // namespace
