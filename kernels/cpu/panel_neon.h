// A panel's product for a quarter or a half of its lanes, on Arm: where few rows are lanes, the others would
// be multiplied for nothing. Sums are those of panel(), bit for bit.
//
// Up to 16 sums take four elements of A at a time, in one register, of which an instruction multiplies one
// with the lanes of a step: four steps of a row of keys, or one step of four channels of values. See panel.h.
#pragma once

#if PYSPEC_HAS_NEON
#define PYSPEC_HAS_PART_PANELS 1

namespace {

template <bool kPairs, int kElement>
PYSPEC_INLINE float32x4_t add_element(float32x4_t sum, float32x4_t lanes, float32x4_t a) {
#if PYSPEC_HAS_BF16_DOT
  if constexpr (kPairs) {
    return vbfdotq_laneq_f32(sum, vreinterpretq_bf16_f32(lanes), vreinterpretq_bf16_f32(a), kElement);
  }
#endif
  return vfmaq_laneq_f32(sum, lanes, a, kElement);
}

// Step kStep of the four that a has of each of four rows.
template <bool kPairs, int kStep, int kQuarters>
PYSPEC_INLINE void add_keys(const float* b, const float32x4_t (&a)[4], float32x4_t (*sum)[kQuarters]) {
  for (int q = 0; q < kQuarters; ++q) {
    float32x4_t lanes = vld1q_f32(b + kStep * 16 + 4 * q);
    for (int r = 0; r < 4; ++r) sum[r][q] = add_element<kPairs, kStep>(sum[r][q], lanes, a[r]);
  }
}

// One step of the four rows that a has.
template <bool kPairs, int kQuarters>
PYSPEC_INLINE void add_values(const float32x4_t (&lanes)[kQuarters], float32x4_t a,
                              float32x4_t (*sum)[kQuarters]) {
  for (int q = 0; q < kQuarters; ++q) {
    sum[0][q] = add_element<kPairs, 0>(sum[0][q], lanes[q], a);
    sum[1][q] = add_element<kPairs, 1>(sum[1][q], lanes[q], a);
    sum[2][q] = add_element<kPairs, 2>(sum[2][q], lanes[q], a);
    sum[3][q] = add_element<kPairs, 3>(sum[3][q], lanes[q], a);
  }
}

// Four elements of A, from row m and a step on.
PYSPEC_INLINE float32x4_t four_of(PanelA a, int64_t m, int64_t step) {
  return vld1q_f32(reinterpret_cast<const float*>(a.data + m * a.row + step * a.step));
}

template <bool kPairs, int kRows, int kQuarters>
PYSPEC_INLINE void part_panel_rows(PanelA a, const float* b, int64_t steps, float* c, const float* alpha) {
  float32x4_t sum[kRows][kQuarters];
  for (int m = 0; m < kRows; ++m) {
    for (int q = 0; q < kQuarters; ++q) {
      float32x4_t before = alpha ? vld1q_f32(c + m * 16 + 4 * q) : vdupq_n_f32(0.0f);
      sum[m][q] = alpha ? vmulq_f32(before, vld1q_f32(alpha + 4 * q)) : before;
    }
  }
  if (a.step == 4) {  // keys, of whole fours of steps
    for (int64_t i = 0; i < steps; i += 4, b += 64) {
      for (int m = 0; m < kRows; m += 4) {
        float32x4_t rows[4];
        for (int r = 0; r < 4; ++r) rows[r] = four_of(a, m + r, i);
        add_keys<kPairs, 0>(b, rows, sum + m), add_keys<kPairs, 1>(b, rows, sum + m);
        add_keys<kPairs, 2>(b, rows, sum + m), add_keys<kPairs, 3>(b, rows, sum + m);
      }
    }
  } else {
    for (int64_t i = 0; i < steps; ++i, b += 16) {
      float32x4_t lanes[kQuarters];
      for (int q = 0; q < kQuarters; ++q) lanes[q] = vld1q_f32(b + 4 * q);
      for (int m = 0; m < kRows; m += 4) add_values<kPairs>(lanes, four_of(a, m, i), sum + m);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int q = 0; q < kQuarters; ++q) vst1q_f32(c + m * 16 + 4 * q, sum[m][q]);
}

// What panel() does, for the kWidth lanes at b, c and alpha alone. rows is rounded up to 4, and above 8 of
// four lanes to 16.
template <bool kPairs, int kWidth, class Between>
PYSPEC_INLINE void part_panel(PanelA a, int64_t rows, const float* b, int64_t steps, float* c,
                              const float* alpha, const Between& between) {
  auto take = [&](auto count) PYSPEC_INLINE_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    part_panel_rows<kPairs, kRows, kWidth / 4>(a, b, steps, c, alpha);
    a.data += kRows * a.row, c += kRows * 16, rows -= kRows;
    between();
    if (kRows > 8) between();
  };
  while (rows > 0) {
    if (kWidth == 4 && rows > 8) {
      take(std::integral_constant<int, 64 / kWidth>());
    } else if (rows > 4) {
      take(std::integral_constant<int, 8>());
    } else {
      take(std::integral_constant<int, 4>());
    }
  }
}

}  // namespace
#endif
