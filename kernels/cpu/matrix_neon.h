// Products of Arm's matrix instructions, which multiply two rows of x with the weights of two lanes at a
// time: half the instructions of BFDOT, which multiplies one.
//
// A vector of sums is [lane][row], of two each, so 16 lanes of two rows take 8 vectors, and so do their
// weights of two steps, [lane][step], woven out of the two vectors that lie in memory. BFMMLA adds its first
// pair of products and then its second, rounding as BFDOT does twice: a row has the bits that it has alone.
#pragma once

#include "cpu/simd.h"

#if PYSPEC_HAS_NEON && PYSPEC_HAS_INT8_DOT && PYSPEC_HAS_BF16_DOT
#define PYSPEC_HAS_MATRIX 1

namespace {

template <class Vector>
struct Woven {
  Vector v[8];
};

// Lanes of two vectors side by side, and apart again.
PYSPEC_INLINE Woven<float32x4_t> weave(F16 x, F16 y) {
  return {vzip1q_f32(x.a, y.a), vzip2q_f32(x.a, y.a), vzip1q_f32(x.b, y.b), vzip2q_f32(x.b, y.b),
          vzip1q_f32(x.c, y.c), vzip2q_f32(x.c, y.c), vzip1q_f32(x.d, y.d), vzip2q_f32(x.d, y.d)};
}
PYSPEC_INLINE Woven<int32x4_t> weave(I16 x, I16 y) {
  return {vzip1q_s32(x.a, y.a), vzip2q_s32(x.a, y.a), vzip1q_s32(x.b, y.b), vzip2q_s32(x.b, y.b),
          vzip1q_s32(x.c, y.c), vzip2q_s32(x.c, y.c), vzip1q_s32(x.d, y.d), vzip2q_s32(x.d, y.d)};
}
PYSPEC_INLINE void unweave(const Woven<float32x4_t>& w, F16& x, F16& y) {
  x = {vuzp1q_f32(w.v[0], w.v[1]), vuzp1q_f32(w.v[2], w.v[3]), vuzp1q_f32(w.v[4], w.v[5]),
       vuzp1q_f32(w.v[6], w.v[7])};
  y = {vuzp2q_f32(w.v[0], w.v[1]), vuzp2q_f32(w.v[2], w.v[3]), vuzp2q_f32(w.v[4], w.v[5]),
       vuzp2q_f32(w.v[6], w.v[7])};
}

// Two steps, 8 bytes, of each of two rows.
PYSPEC_INLINE int32x4_t two_rows(const char* x, const char* y) {
  return vcombine_s32(vld1_s32(reinterpret_cast<const int32_t*>(x)),
                      vld1_s32(reinterpret_cast<const int32_t*>(y)));
}

// Steps of two bf16.
PYSPEC_INLINE void add_products(const Woven<int32x4_t>& lanes, int32x4_t rows, Woven<float32x4_t>& sums) {
  for (int i = 0; i < 8; ++i) {
    sums.v[i] = vbfmmlaq_f32(sums.v[i], vreinterpretq_bf16_s32(lanes.v[i]), vreinterpretq_bf16_s32(rows));
  }
}

// What panel.h's panel_rows does, for steps of two bf16: C[m][lane] = C[m][lane] * alpha[lane] + A . B.
template <int kRows>
PYSPEC_INLINE void matrix_panel_rows(const char* a, int64_t a_row, int64_t a_step, const float* b,
                                     int64_t steps, float* c, const F16* alpha) {
  static_assert(kRows == 4);
  F16 sums[4];
  for (int m = 0; m < 4; ++m) sums[m] = alpha ? mul(load(c + m * 16), *alpha) : set1(0.0f);
  Woven<float32x4_t> woven[2] = {weave(sums[0], sums[1]), weave(sums[2], sums[3])};
  int64_t i = 0;
  for (; i + 2 <= steps; i += 2, a += 2 * a_step, b += 32) {
    Woven<int32x4_t> lanes = weave(load_words(b), load_words(b + 16));
    int32x4_t rows[2];
    if (a_step == 4) {  // keys
      rows[0] = two_rows(a, a + a_row), rows[1] = two_rows(a + 2 * a_row, a + 3 * a_row);
    } else {  // values: rows lie side by side
      int32x4_t first = vld1q_s32(reinterpret_cast<const int32_t*>(a));
      int32x4_t second = vld1q_s32(reinterpret_cast<const int32_t*>(a + a_step));
      rows[0] = vzip1q_s32(first, second), rows[1] = vzip2q_s32(first, second);
    }
    add_products(lanes, rows[0], woven[0]), add_products(lanes, rows[1], woven[1]);
  }
  unweave(woven[0], sums[0], sums[1]), unweave(woven[1], sums[2], sums[3]);
  if (i < steps) {
    for (int m = 0; m < 4; ++m) sums[m] = pair_dot(broadcast(a + m * a_row), load(b), sums[m]);
  }
  for (int m = 0; m < 4; ++m) store(c + m * 16, sums[m]);
}

}  // namespace
#endif
