// Tiles of linear's int8 on Arm. See linear_neon.h.
//
// The products of a group are summed as integers in 16 registers, and added to sums in memory: 8 rows by
// USMMLA, or by SDOT, which is USDOT where that is. Without either, products of two inputs are summed in 16
// bits, which hold them, before they are widened; widened sums stay apart until the group ends, so that there
// are twice as many, for half the rows.
#pragma once

#include "cpu/linear_neon.h"

#if PYSPEC_HAS_NEON

namespace {

struct Int8Tile {
#if PYSPEC_HAS_NEON_DOT
  static constexpr int kSums = 16, kStreamRows = 2, kPassRows = 8;
#else
  static constexpr int kSums = 8, kStreamRows = 1, kPassRows = 4;
#endif
  static constexpr int64_t kStepBytes = pyspec::kPanel * 4;
  static constexpr int64_t kGroup = pyspec::kGroup, kGroupBytes = pyspec::kPanel * (2 + kGroup);

  template <int kRows, int kVectors>
  using Dots = int32x4_t[kRows][kVectors];

  PYSPEC_INLINE static uint8x16_t bytes(const char* p) {
    return vld1q_u8(reinterpret_cast<const uint8_t*>(p));
  }
  PYSPEC_INLINE static int8x16_t signed_bytes(const char* p) {
    return vreinterpretq_s8_u8(veorq_u8(bytes(p), vdupq_n_u8(128)));
  }
  PYSPEC_INLINE static int8x16_t values(const char* p) { return vreinterpretq_s8_u8(bytes(p)); }

  PYSPEC_INLINE static int32_t word(const char* p) {
    int32_t word;
    std::memcpy(&word, p, 4);
    return word;
  }

#if PYSPEC_HAS_NEON_DOT
  // Four inputs, number kFour of the four fours that x has of each row.
  template <int kFour, int kRows, int kVectors>
  PYSPEC_INLINE static void add(const char* w, const int8x16_t (&x)[kRows], Dots<kRows, kVectors>& dots) {
    for (int v = 0; v < kVectors; ++v) {
#if PYSPEC_HAS_INT8_DOT
      uint8x16_t weights = bytes(w + 16 * v);
      for (int r = 0; r < kRows; ++r) dots[r][v] = vusdotq_laneq_s32(dots[r][v], weights, x[r], kFour);
#else
      int8x16_t weights = signed_bytes(w + 16 * v);
      for (int r = 0; r < kRows; ++r) dots[r][v] = vdotq_laneq_s32(dots[r][v], weights, x[r], kFour);
#endif
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void add_group(const char* w, const char* x, const char* starts, int64_t x_bytes,
                                      Ahead& ahead, Dots<kRows, kVectors>& dots) {
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) dots[r][v] = vdupq_n_s32(word(starts + r * x_bytes));
    }
    for (int half = 0; half < 2; ++half, w += 4 * kStepBytes) {
      ahead.prefetch<kVectors>();
      int8x16_t x_values[kRows];
      for (int r = 0; r < kRows; ++r) x_values[r] = values(x + r * x_bytes + 16 * half);
      add<0>(w, x_values, dots), add<1>(w + kStepBytes, x_values, dots);
      add<2>(w + 2 * kStepBytes, x_values, dots), add<3>(w + 3 * kStepBytes, x_values, dots);
    }
  }
#else
  // Eight inputs, of the first or the second half of 16 of a row; totals are [lane][two], of two lanes each.
  template <int kHalf, int kVectors>
  PYSPEC_INLINE static void add(const int8x16_t (&first)[kVectors], const int8x16_t (&second)[kVectors],
                                int32x4_t x, int32x4_t (&totals)[kVectors][2]) {
    int8x16_t x_first = vreinterpretq_s8_s32(vdupq_laneq_s32(x, 2 * kHalf));
    int8x16_t x_second = vreinterpretq_s8_s32(vdupq_laneq_s32(x, 2 * kHalf + 1));
    for (int v = 0; v < kVectors; ++v) {  // two products are at most 2 * 128 * 127: they fit
      int16x8_t low = vmull_s8(vget_low_s8(first[v]), vget_low_s8(x_first));
      int16x8_t high = vmull_high_s8(first[v], x_first);
      low = vmlal_s8(low, vget_low_s8(second[v]), vget_low_s8(x_second));
      high = vmlal_high_s8(high, second[v], x_second);
      totals[v][0] = vpadalq_s16(totals[v][0], low), totals[v][1] = vpadalq_s16(totals[v][1], high);
    }
  }

  template <int kHalf, int kRows, int kVectors>
  PYSPEC_INLINE static void add_rows(const char* w, const char* x, int64_t x_bytes,
                                     int32x4_t (&totals)[kRows][kVectors][2]) {
    int8x16_t first[kVectors], second[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      first[v] = signed_bytes(w + 16 * v), second[v] = signed_bytes(w + kStepBytes + 16 * v);
    }
    for (int r = 0; r < kRows; ++r) {
      add<kHalf>(first, second, vreinterpretq_s32_s8(values(x + r * x_bytes)), totals[r]);
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void add_group(const char* w, const char* x, const char*, int64_t x_bytes,
                                      Ahead& ahead, Dots<kRows, kVectors>& dots) {
    int32x4_t totals[kRows][kVectors][2];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) totals[r][v][0] = totals[r][v][1] = vdupq_n_s32(0);
    for (int half = 0; half < 2; ++half, w += 4 * kStepBytes, x += 16) {
      ahead.prefetch<kVectors>();
      add_rows<0>(w, x, x_bytes, totals), add_rows<1>(w + 2 * kStepBytes, x, x_bytes, totals);
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) dots[r][v] = vpaddq_s32(totals[r][v][0], totals[r][v][1]);
  }
#endif

#if PYSPEC_HAS_INT8_DOT
  // Eight inputs, of the first or the second half of 16.
  template <int kHalf, int kRows, int kPairs, int kLanes>
  PYSPEC_INLINE static void add_pairs(const char* w, const char* x, int64_t x_bytes,
                                      int32x4_t (&dots)[kPairs][kLanes]) {
    uint8x16_t lanes[kLanes];  // [lane][input], of two and eight
    for (int v = 0; v < kLanes / 2; ++v) {
      uint32x4_t first = vreinterpretq_u32_u8(bytes(w + 16 * v));
      uint32x4_t second = vreinterpretq_u32_u8(bytes(w + kStepBytes + 16 * v));
      lanes[2 * v] = vreinterpretq_u8_u32(vzip1q_u32(first, second));
      lanes[2 * v + 1] = vreinterpretq_u8_u32(vzip2q_u32(first, second));
    }
    for (int p = 0; p < kPairs; ++p) {
      int64x2_t first = vreinterpretq_s64_s8(values(x + 2 * p * x_bytes));
      int64x2_t second = vreinterpretq_s64_s8(values(x + row_of<kRows>(p, 1) * x_bytes));
      int64x2_t rows = kHalf ? vzip2q_s64(first, second) : vzip1q_s64(first, second);
      for (int i = 0; i < kLanes; ++i) {
        dots[p][i] = vusmmlaq_s32(dots[p][i], lanes[i], vreinterpretq_s8_s64(rows));
      }
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void add_woven_group(const char* w, const char* x, const char* starts, int64_t x_bytes,
                                            Ahead& ahead, Dots<kRows, kVectors>& dots) {
    constexpr int kPairs = (kRows + 1) / 2;
    int32x4_t woven[kPairs][2 * kVectors];  // [lane][row], of two each
    for (int p = 0; p < kPairs; ++p) {
      int32_t second = word(starts + row_of<kRows>(p, 1) * x_bytes);
      int32x4_t both = vsetq_lane_s32(second, vdupq_n_s32(word(starts + 2 * p * x_bytes)), 1);
      both = vreinterpretq_s32_s64(vdupq_laneq_s64(vreinterpretq_s64_s32(both), 0));
      for (int i = 0; i < 2 * kVectors; ++i) woven[p][i] = both;
    }
    for (int half = 0; half < 2; ++half, w += 4 * kStepBytes, x += 16) {
      ahead.prefetch<kVectors>();
      add_pairs<0, kRows>(w, x, x_bytes, woven);
      add_pairs<1, kRows>(w + 2 * kStepBytes, x, x_bytes, woven);
    }
    for (int p = 0; p < kPairs; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        dots[row_of<kRows>(p, 1)][v] = vuzp2q_s32(woven[p][2 * v], woven[p][2 * v + 1]);
        dots[2 * p][v] = vuzp1q_s32(woven[p][2 * v], woven[p][2 * v + 1]);
      }
    }
  }
#endif

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, float* sums) {
    const int64_t groups = pyspec::groups(range.inputs);
    ahead.step *= 4;
    for (int64_t g = range.first / kGroup; g * kGroup < range.last; ++g, block += kGroupBytes) {
      Dots<kRows, kVectors> dots;
      const char* w = block + pyspec::kPanel * 2 + lane * 4;
      const char *integers = x + groups * 8 + g * kGroup, *starts = x + (groups + g) * 4;
#if PYSPEC_HAS_INT8_DOT
      if constexpr (kRows > 2) {
        add_woven_group(w, integers, starts, x_bytes, ahead, dots);
      } else {
        add_group(w, integers, starts, x_bytes, ahead, dots);
      }
#else
      add_group(w, integers, starts, x_bytes, ahead, dots);
#endif
      const Float16* scales = reinterpret_cast<const Float16*>(block) + lane;
      float32x4_t scale[kVectors];
      for (int v = 0; v < kVectors; ++v) scale[v] = four_floats(scales + 4 * v);
      for (int r = 0; r < kRows; ++r) {
        float32x4_t x_scale = vld1q_dup_f32(reinterpret_cast<const float*>(x + r * x_bytes) + g);
        for (int v = 0; v < kVectors; ++v) {
          float* sum = sums + r * pyspec::kPanel + 4 * v;
          float32x4_t product = vmulq_f32(vcvtq_f32_s32(dots[r][v]), scale[v]);
          vst1q_f32(sum, vfmaq_f32(vld1q_f32(sum), product, x_scale));
        }
      }
    }
  }
};

}  // namespace
#endif
