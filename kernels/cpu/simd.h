// Sixteen floats as one value, on every instruction set. Everything is in an unnamed namespace: this header
// is compiled once per instruction set, and a shared inline function would be merged by the linker into one
// copy.
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
#if PYSPEC_ISA_avx512 || PYSPEC_HAS_BF16_DOT
#define PYSPEC_HAS_AVX512 1
#endif
#if PYSPEC_HAS_AVX512 || PYSPEC_ISA_avx2
#include <immintrin.h>
#define PYSPEC_HAS_X86_VECTORS 1
#endif

#define PYSPEC_INLINE inline __attribute__((always_inline))
#define PYSPEC_INLINE_LAMBDA __attribute__((always_inline))

namespace {

constexpr float kInfinity = __builtin_inff();

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
// max(a, b) is b where either is NaN.
PYSPEC_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
PYSPEC_INLINE bool all_equal(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ) == 0xffff; }
template <int kTerms>
PYSPEC_INLINE F16 exp2(F16 x, const float (&series)[kTerms]) {
  x = max(set1(-200.0f), x);
  F16 n{_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
  F16 r = sub(x, n), p = set1(series[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, r, set1(series[i]));
  return {_mm512_scalef_ps(p.v, n.v)};
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
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
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
PYSPEC_INLINE F16 where_less(F16 a, F16 b, F16 yes, F16 no) {
  PYSPEC_EACH(a.v[i] < b.v[i] ? yes.v[i] : no.v[i]);
}
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

PYSPEC_INLINE F16 broadcast(const char* p) {
  float a;
  std::memcpy(&a, p, 4);
  return set1(a);
}

#if PYSPEC_HAS_BF16_DOT
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

// ==== storage types ====

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

PYSPEC_INLINE float to_float(float a) { return a; }
PYSPEC_INLINE float to_float(BFloat16 a) {
  uint32_t bits = uint32_t{a.bits} << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
PYSPEC_INLINE float to_float(Float16 a) {
#if PYSPEC_HAS_X86_VECTORS
  return _cvtsh_ss(a.bits);
#else
  uint32_t sign = uint32_t{a.bits & 0x8000u} << 16, rest = a.bits & 0x7fffu, bits;
  if (rest >= 0x7c00u) {
    bits = sign | 0x7f800000u | (rest & 0x3ffu) << 13;
  } else if (rest >= 0x400u) {
    bits = sign | ((rest << 13) + (112u << 23));
  } else {
    float small = static_cast<float>(rest) * 0x1p-24f;
    std::memcpy(&bits, &small, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

PYSPEC_INLINE void from_float(float a, float* out) { *out = a; }
PYSPEC_INLINE void from_float(float a, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  out->bits = a != a ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
PYSPEC_INLINE void from_float(float a, Float16* out) {
#if PYSPEC_HAS_X86_VECTORS
  out->bits = _cvtss_sh(a, _MM_FROUND_TO_NEAREST_INT);
#else
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  uint32_t sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) {
    out->bits = static_cast<uint16_t>(sign | 0x7e00u);
  } else if (rest >= 0x477ff000u) {  // rounds to infinity
    out->bits = static_cast<uint16_t>(sign | 0x7c00u);
  } else if (rest >= 0x38800000u) {
    out->bits = static_cast<uint16_t>(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
  } else {  // subnormal: let the adder round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &rest, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    out->bits = static_cast<uint16_t>(sign | (bits - 0x3f000000u));
  }
#endif
}

// A row of n values as fp32.
template <class Storage>
PYSPEC_INLINE void convert_row(const Storage* from, float* to, int64_t n) {
  int64_t i = 0;
#if PYSPEC_HAS_AVX512
  for (; i + 16 <= n; i += 16) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      store(to + i, {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))});
    } else {
      store(to + i, {_mm512_cvtph_ps(bits)});
    }
  }
#elif PYSPEC_HAS_X86_VECTORS
  for (; i + 8 <= n; i += 8) {
    __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    if constexpr (std::is_same_v<Storage, Float16>) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(bits));
    } else {
      _mm256_storeu_ps(to + i, _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
    }
  }
#endif
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
template <>
PYSPEC_INLINE void convert_row<float>(const float* from, float* to, int64_t n) {
  std::memcpy(to, from, n * sizeof(float));
}

}  // namespace
