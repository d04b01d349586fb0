// Sixteen floats as one value: an implementation for each kind of vectors, then what is made of them. See
// simd.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if PYSPEC_ISA_amx_bf16
#define PYSPEC_HAS_AMX 1
#endif
#if PYSPEC_ISA_avx512_bf16 || PYSPEC_HAS_AMX
#define PYSPEC_HAS_BF16_DOT 1
#endif
#if PYSPEC_ISA_avx512_vnni || PYSPEC_HAS_BF16_DOT  // every processor with bf16 products has the int8 ones
#define PYSPEC_HAS_INT8_DOT 1
#endif
#if PYSPEC_ISA_avx512 || PYSPEC_HAS_INT8_DOT
#define PYSPEC_HAS_AVX512 1
#endif
#if PYSPEC_ISA_avx_vnni
#define PYSPEC_HAS_INT8_DOT 1
#endif
#if PYSPEC_HAS_AVX512 || PYSPEC_ISA_avx2 || PYSPEC_ISA_avx_vnni
#include <immintrin.h>
#define PYSPEC_HAS_X86_VECTORS 1
#endif
#if PYSPEC_ISA_neon_bf16  // every processor with bf16 products has the int8 ones here too
#define PYSPEC_HAS_BF16_DOT 1
#define PYSPEC_HAS_INT8_DOT 1
#endif
#if PYSPEC_ISA_neon_dot || PYSPEC_ISA_neon_bf16
#define PYSPEC_HAS_NEON_DOT 1
#endif
#if PYSPEC_ISA_neon || PYSPEC_HAS_NEON_DOT
#define PYSPEC_HAS_NEON 1
#endif

#define PYSPEC_INLINE inline __attribute__((always_inline))
#define PYSPEC_INLINE_LAMBDA __attribute__((always_inline))
// Before a loop over vectors that are to stay in registers.
#define PYSPEC_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr float kInfinity = __builtin_inff();
// Half a vector of sixteen floats fits one of these; NEON has 32 of a quarter, which is as much as AVX2 has.
#if PYSPEC_HAS_AVX512
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

// exp2 on [-0.5, 0.5], degree 6 (coefficients of the Cephes library).
constexpr float kExp2[] = {1.535336188e-4f,
                           1.339887440e-3f,
                           9.618437357e-3f,
                           5.550332471e-2f,
                           2.402264791e-1f,
                           6.931472028e-1f,
                           1.0f};
// The same to 3e-6, for weights that are rounded to bf16.
constexpr float kExp2Short[] = {9.58285e-3f, 5.590643e-2f, 2.4024099e-1f, 6.9312419e-1f, 1.0f};

#if PYSPEC_HAS_AVX512

struct F16 {
  __m512 v;
};
PYSPEC_INLINE F16 load(const void* p) { return {_mm512_loadu_ps(p)}; }
PYSPEC_INLINE void store(void* p, F16 a) { _mm512_storeu_ps(p, a.v); }
PYSPEC_INLINE F16 set1(float a) { return {_mm512_set1_ps(a)}; }
PYSPEC_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max(a, b) and min(a, b) are b where either is NaN.
PYSPEC_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 bit_xor(F16 a, F16 b) { return {_mm512_xor_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
// Bit i is set where lane i of a is less than that of b; not where either is NaN.
PYSPEC_INLINE uint32_t less_mask(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
// Lanes of yes where the mask's bit is set.
PYSPEC_INLINE F16 select(uint32_t mask, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(static_cast<__mmask16>(mask), no.v, yes.v)};
}
PYSPEC_INLINE bool all_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) == 0xffff; }
template <int kTerms>
PYSPEC_INLINE F16 exp2(F16 x, const float (&series)[kTerms]) {
  // 0 where the result is not a normal number: scaling to one takes the processor a hundred cycles.
  __mmask16 is_normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  F16 n{_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  F16 r = sub(x, n), p = set1(series[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, r, set1(series[i]));
  return {_mm512_maskz_scalef_ps(is_normal, p.v, n.v)};
}

#elif PYSPEC_HAS_X86_VECTORS

struct F16 {
  __m256 lo, hi;
};
PYSPEC_INLINE F16 load(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {_mm256_loadu_ps(f), _mm256_loadu_ps(f + 8)};
}
PYSPEC_INLINE void store(void* p, F16 a) {
  float* f = static_cast<float*>(p);
  _mm256_storeu_ps(f, a.lo), _mm256_storeu_ps(f + 8, a.hi);
}
PYSPEC_INLINE F16 set1(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
PYSPEC_INLINE F16 add(F16 a, F16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 sub(F16 a, F16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 mul(F16 a, F16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 div(F16 a, F16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
PYSPEC_INLINE F16 max(F16 a, F16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 min(F16 a, F16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 bit_xor(F16 a, F16 b) { return {_mm256_xor_ps(a.lo, b.lo), _mm256_xor_ps(a.hi, b.hi)}; }
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
PYSPEC_INLINE uint32_t less_mask(F16 a, F16 b) {
  uint32_t lo = _mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ));
  uint32_t hi = _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ));
  return lo | hi << 8;
}
PYSPEC_INLINE __m256 select8(uint32_t mask, __m256 yes, __m256 no) {
  const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(mask)), bit);
  return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bit)));
}
PYSPEC_INLINE F16 select(uint32_t mask, F16 yes, F16 no) {
  return {select8(mask, yes.lo, no.lo), select8(mask >> 8, yes.hi, no.hi)};
}
PYSPEC_INLINE bool all_equal(F16 a, F16 b) {
  __m256 both = _mm256_and_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ));
  return _mm256_movemask_ps(both) == 0xff;
}
PYSPEC_INLINE __m256 power_of_two(__m256 n) {
  __m256i exponent = _mm256_max_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(-127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
}
template <int kTerms>
PYSPEC_INLINE F16 exp2(F16 x, const float (&series)[kTerms]) {
  x = max(set1(-200.0f), x);
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  F16 n{_mm256_round_ps(x.lo, kNearest), _mm256_round_ps(x.hi, kNearest)};
  F16 r = sub(x, n), p = set1(series[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, r, set1(series[i]));
  return mul(p, {power_of_two(n.lo), power_of_two(n.hi)});
}

#elif PYSPEC_HAS_NEON

}  // namespace
#include "cpu/simd_neon.h"
namespace {

#else  // portable: plain loops that any compiler vectorises

struct F16 {
  float v[16];
};
#define PYSPEC_EACH(expression)                            \
  F16 result;                                              \
  for (int i = 0; i < 16; ++i) result.v[i] = (expression); \
  return result
PYSPEC_INLINE F16 load(const void* p) {
  F16 a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
PYSPEC_INLINE void store(void* p, F16 a) { std::memcpy(p, a.v, sizeof a.v); }
PYSPEC_INLINE F16 set1(float a) { PYSPEC_EACH(a); }
PYSPEC_INLINE F16 add(F16 a, F16 b) { PYSPEC_EACH(a.v[i] + b.v[i]); }
PYSPEC_INLINE F16 sub(F16 a, F16 b) { PYSPEC_EACH(a.v[i] - b.v[i]); }
PYSPEC_INLINE F16 mul(F16 a, F16 b) { PYSPEC_EACH(a.v[i] * b.v[i]); }
PYSPEC_INLINE F16 div(F16 a, F16 b) { PYSPEC_EACH(a.v[i] / b.v[i]); }
PYSPEC_INLINE F16 fma(F16 a, F16 b, F16 c) { PYSPEC_EACH(a.v[i] * b.v[i] + c.v[i]); }
PYSPEC_INLINE F16 max(F16 a, F16 b) { PYSPEC_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
PYSPEC_INLINE F16 min(F16 a, F16 b) { PYSPEC_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
PYSPEC_INLINE F16 bit_xor(F16 a, F16 b) {
  uint32_t x[16], y[16];
  std::memcpy(x, a.v, sizeof x), std::memcpy(y, b.v, sizeof y);
  for (int i = 0; i < 16; ++i) x[i] ^= y[i];
  std::memcpy(a.v, x, sizeof x);
  return a;
}
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  PYSPEC_EACH(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
PYSPEC_INLINE uint32_t less_mask(F16 a, F16 b) {
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint32_t{a.v[i] < b.v[i]} << i;
  return mask;
}
PYSPEC_INLINE F16 select(uint32_t mask, F16 yes, F16 no) { PYSPEC_EACH(mask >> i & 1 ? yes.v[i] : no.v[i]); }
PYSPEC_INLINE bool all_equal(F16 a, F16 b) {
  int equal = 0;
  for (int i = 0; i < 16; ++i) equal += a.v[i] == b.v[i];
  return equal == 16;
}
template <int kTerms>
PYSPEC_INLINE float exp2_lane(float x, const float (&series)[kTerms]) {
  x = -200.0f > x ? -200.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float shifted = x + kRound, r = x - (shifted - kRound), p = series[0];
  for (int i = 1; i < kTerms; ++i) p = p * r + series[i];
  int32_t bits, offset = 0x4b400000;
  std::memcpy(&bits, &shifted, 4);
  int32_t n = bits - offset;
  n = n < -127 ? -127 : n > 127 ? 127 : n;
  int32_t power_bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &power_bits, 4);
  return p * power;
}
template <int kTerms>
PYSPEC_INLINE F16 exp2(F16 x, const float (&series)[kTerms]) {
  PYSPEC_EACH(exp2_lane(x.v[i], series));
}
#undef PYSPEC_EACH

#endif

PYSPEC_INLINE F16 exp2(F16 x) { return exp2(x, kExp2); }

constexpr float kLog2E = 1.44269504f;

// x / (1 + e^-t).
PYSPEC_INLINE F16 sigmoid_product(F16 x, F16 t) {
  // beyond 2^126 the quotient is zero anyway
  F16 e = exp2(sub(set1(0.0f), max(set1(-126.0f), mul(t, set1(kLog2E)))));
  return div(x, add(set1(1.0f), e));
}
PYSPEC_INLINE F16 silu(F16 x) { return sigmoid_product(x, x); }

// log(1 + e^x), for any x.
PYSPEC_INLINE F16 softplus(F16 x) {
  F16 size = max(x, sub(set1(0.0f), x)), u = exp2(mul(size, set1(-kLog2E)));
  // log(1 + u) = 2 atanh(u / (2 + u)): the argument is at most 1 / 3, so a short series does
  F16 s = div(u, add(set1(2.0f), u)), square = mul(s, s), series = set1(1.0f / 13);
  for (int odd = 11; odd > 0; odd -= 2) series = fma(series, square, set1(1.0f / static_cast<float>(odd)));
  return fma(add(s, s), series, max(set1(0.0f), x));
}

#if !PYSPEC_HAS_NEON
// Over the lanes, in an order that the instruction set decides.
PYSPEC_INLINE float sum(F16 a) {
#if PYSPEC_HAS_AVX512
  return _mm512_reduce_add_ps(a.v);
#else
  float lanes[16];
  store(lanes, a);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}
// Not NaN unless all lanes are.
PYSPEC_INLINE float highest(F16 a) {
#if PYSPEC_HAS_AVX512
  return _mm512_reduce_max_ps(a.v);
#else
  float lanes[16];
  store(lanes, a);
  for (int i = 1; i < 16; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
  return lanes[0];
#endif
}

#endif

#if PYSPEC_HAS_AVX512
// 16 x 16 dwords transposed in registers.
PYSPEC_INLINE void transpose16(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if PYSPEC_HAS_X86_VECTORS && !PYSPEC_HAS_AVX512
// 8 x 8 floats transposed in registers.
PYSPEC_INLINE void transpose8(__m256 r[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    __m256 a = _mm256_unpacklo_ps(r[i], r[i + 1]), b = _mm256_unpackhi_ps(r[i], r[i + 1]);
    __m256 c = _mm256_unpacklo_ps(r[i + 2], r[i + 3]), d = _mm256_unpackhi_ps(r[i + 2], r[i + 3]);
    t[i] = _mm256_shuffle_ps(a, c, 0x44), t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44), t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}
#endif

#if !PYSPEC_HAS_NEON
// 16 x 16 values: lane i of rows[j] becomes lane j of rows[i]. Bits pass unchanged, whatever they mean.
PYSPEC_INLINE void transpose(F16* rows) {
#if PYSPEC_HAS_AVX512
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i].v);
  transpose16(r);
  for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(r[i]);
#elif PYSPEC_HAS_X86_VECTORS
  __m256 a[8], b[8], c[8], d[8];  // a b above c d becomes a c above b d
  for (int i = 0; i < 8; ++i)
    a[i] = rows[i].lo, b[i] = rows[i].hi, c[i] = rows[i + 8].lo, d[i] = rows[i + 8].hi;
  transpose8(a), transpose8(b), transpose8(c), transpose8(d);
  for (int i = 0; i < 8; ++i) rows[i] = {a[i], c[i]}, rows[i + 8] = {b[i], d[i]};
#else
  uint32_t values[16][16], transposed[16][16];
  std::memcpy(values, rows, sizeof values);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) transposed[i][j] = values[j][i];
  std::memcpy(rows, transposed, sizeof values);
#endif
}
#endif

// The bits of an integer in every lane, for values that are only moved.
PYSPEC_INLINE F16 set1_bits(int32_t bits) {
  float a;
  std::memcpy(&a, &bits, 4);
  return set1(a);
}

PYSPEC_INLINE F16 broadcast(const char* p) {
  float a;
  std::memcpy(&a, p, 4);
  return set1(a);
}

#if PYSPEC_HAS_BF16_DOT && PYSPEC_HAS_AVX512
// Two bf16 products a lane, added to fp32.
PYSPEC_INLINE F16 pair_dot(F16 a, F16 b, F16 c) {
  return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)};
}
// Lanes of two fp32 vectors rounded to bf16 pairs: first in the low half.
PYSPEC_INLINE F16 pair(F16 first, F16 second) {
  __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first.v));
  __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second.v));
  return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
}
#endif

}  // namespace
