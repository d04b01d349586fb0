// How linear walks a panel: blocks of inputs, and what is asked for ahead of them.
#pragma once

#include "cpu/simd.h"
#include "params/linear.h"

namespace {

constexpr int64_t kTileRows = 64;

// How far ahead of its use one block of rows asks for the weights: far enough to cross the page that the
// processor's own prefetching stops at.
constexpr int64_t kPrefetchBytes = 4096;

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
