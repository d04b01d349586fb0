// What a pass over a chunk has of x, and how a block ends: in linear_codes, whoever formed its products.
#pragma once

#include "cpu/linear_codes_chunk.h"

namespace {

// kRows prepared rows, and where the chunk's part of each begins.
struct Rows {
  const char *scales, *sums, *integers;
  int64_t stride;
};

PYSPEC_INLINE int32_t four_bytes(const char* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return four;
}
PYSPEC_INLINE int32_t sum_of(const char* sums) {
  int16_t sum;
  std::memcpy(&sum, sums, 2);
  return sum;
}

// minimums += the minimums of a block, or the scales that stand for them, times the sums of x over its
// groups: of kVectors times 16 outputs from lane on.
template <class F, int kRows, size_t kVectors>
PYSPEC_INLINE void add_minimums(const Chunk<F>& chunk, int64_t b, int64_t lane, const Rows& x,
                                I16 (&minimums)[kRows][kVectors]) {
  for (int64_t pair = 0; pair < F::kPairs; ++pair) {
    for (int r = 0; r < kRows; ++r) {
      const char* sums = x.sums + r * x.stride + (b * F::kGroups + pair * 2) * 2;
      for (size_t v = 0; v < kVectors; ++v) {
        I16 pairs = load_words(chunk.pairs[b][pair] + lane + v * 16);
        minimums[r][v] = dot2(pairs, set1_words(four_bytes(sums)), minimums[r][v]);
      }
    }
  }
}

// Adds a block to sums, in fp32: its totals of products, and where they count its minimums.
template <class F, bool kHasSums, int kRows, size_t kVectors>
PYSPEC_INLINE void add_block(const Chunk<F>& chunk, int64_t b, int64_t lane, const Rows& x,
                             const I16 (&totals)[kRows][kVectors], const I16 (&minimums)[kRows][kVectors],
                             F16 (&sum)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r) {
    float x_scale = 0;
    std::memcpy(&x_scale, x.scales + r * x.stride + b * 4, 4);
    for (size_t v = 0; v < kVectors; ++v) {
      I16 total = totals[r][v];
      if constexpr (kHasSums && F::kShape.floors != Floors::kStored) {
        constexpr int32_t kTimes = F::kShape.has_minimums ? -1 : F::kShape.lowest;
        total = add(total, mul(minimums[r][v], set1_words(kTimes)));
      }
      F16 factor = load(chunk.factors[b] + lane + v * 16);
      sum[r][v] = fma(mul(to_float(total), factor), set1(x_scale), sum[r][v]);
      if constexpr (F::kShape.floors == Floors::kStored) {
        I16 times = minimums[r][v];
        if constexpr (!F::kHasSums) times = set1_words(sum_of(x.sums + r * x.stride + b * 2));
        F16 floor = load(chunk.floors[b] + lane + v * 16);
        sum[r][v] = fma(mul(to_float(times), floor), set1(-x_scale), sum[r][v]);
      }
    }
  }
}

}  // namespace
