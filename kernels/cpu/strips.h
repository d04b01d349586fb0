// A strip: 64 rows of a head, laid out twice as panel() reads them. With rows as lanes they are multiplied by
// keys; with channels as lanes they are what sums over rows are of. A dword holds one fp32, or two bf16.
#pragma once

#include "cpu/panel.h"
#include "params/attention.h"

namespace {

using pyspec::kLanes;
using pyspec::kTile;

PYSPEC_INLINE F16 finite_or_zero(F16 x) {
  F16 size = max(x, sub(set1(0.0f), x));  // NaN stays NaN, and is not less
  return where_less(size, set1(kInfinity), x, set1(0.0f));
}

template <class Compute>
bool is_row_finite(const Compute* row, int64_t d) {
  F16 zeros = set1(0.0f);
  for (int64_t c = 0; c < d; c += 16) zeros = fma(load_as_float(row + c), set1(0.0f), zeros);
  return all_equal(zeros, set1(0.0f));
}
template <class Compute>
void clear_not_finite(Compute* row, int64_t d) {
  for (int64_t c = 0; c < d; c += 16) store_as(row + c, finite_or_zero(load_as_float(row + c)));
}

// Rows [64][d] as lanes: [4][steps][16].
template <class Compute>
void pack_lanes(const Compute* rows, int64_t d, float* out) {
  const int64_t steps = d * sizeof(Compute) / 4;
  for (int64_t block = 0; block < kTile; block += kLanes) {
    for (int64_t step = 0; step < steps; step += kLanes) {
      int64_t width = steps - step < kLanes ? steps - step : kLanes;  // 8 of a head of 80 in pairs
      F16 values[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane)
        values[lane] = load(reinterpret_cast<const float*>(rows + (block + lane) * d) + step);
      transpose(values);
      for (int64_t i = 0; i < width; ++i) store(out + block * steps + (step + i) * kLanes, values[i]);
    }
  }
}

// Rows [64][d] with channels as lanes: [d / 16][64 or pairs of rows][16].
template <class Compute>
void pack_rows(const Compute* rows, int64_t d, float* out) {
  constexpr int64_t kPer = 4 / sizeof(Compute);
  for (int64_t c = 0; c < d; c += kLanes, out += kTile * kLanes / kPer) {
    for (int64_t i = 0; i < kTile / kPer; ++i) {
#if PYSPEC_HAS_BF16_DOT
      if constexpr (kPer == 2) {
        const char* pair = reinterpret_cast<const char*>(rows + 2 * i * d + c);
        interleave_pairs(pair, d * sizeof(Compute), 1, kLanes, reinterpret_cast<uint32_t*>(out + i * kLanes));
        continue;
      }
#endif
      store(out + i * kLanes, load_as_float(rows + i * d + c));
    }
  }
}

}  // namespace
