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
#if PYSPEC_ISA_avx512_vnni || PYSPEC_HAS_BF16_DOT  // every processor with bf16 products has the int8 ones
#define PYSPEC_HAS_INT8_DOT 1
#endif
#if PYSPEC_ISA_avx512 || PYSPEC_HAS_INT8_DOT
#define PYSPEC_HAS_AVX512 1
#endif
#if PYSPEC_HAS_AVX512 || PYSPEC_ISA_avx2
#include <immintrin.h>
#define PYSPEC_HAS_X86_VECTORS 1
#endif

#define PYSPEC_INLINE inline __attribute__((always_inline))
#define PYSPEC_INLINE_LAMBDA __attribute__((always_inline))
// Before a loop over vectors that are to stay in registers.
#define PYSPEC_UNROLL _Pragma("GCC unroll 16")

namespace {

constexpr float kInfinity = __builtin_inff();
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

PYSPEC_INLINE F16 silu(F16 x) {
  // beyond 2^126 the quotient is zero anyway
  F16 e = exp2(sub(set1(0.0f), max(set1(-126.0f), mul(x, set1(kLog2E)))));
  return div(x, add(set1(1.0f), e));
}

// log(1 + e^x), for any x.
PYSPEC_INLINE F16 softplus(F16 x) {
  F16 size = max(x, sub(set1(0.0f), x)), u = exp2(mul(size, set1(-kLog2E)));
  // log(1 + u) = 2 atanh(u / (2 + u)): the argument is at most 1 / 3, so a short series does
  F16 s = div(u, add(set1(2.0f), u)), square = mul(s, s), series = set1(1.0f / 13);
  for (int odd = 11; odd > 0; odd -= 2) series = fma(series, square, set1(1.0f / static_cast<float>(odd)));
  return fma(add(s, s), series, max(set1(0.0f), x));
}

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

// 16 x 16 values: lane i of rows[j] becomes lane j of rows[i]. Bits pass unchanged, whatever they mean.
PYSPEC_INLINE void transpose(F16* rows) {
#if PYSPEC_HAS_AVX512
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(rows[i].v);
  transpose16(r);
  for (int i = 0; i < 16; ++i) rows[i].v = _mm512_castsi512_ps(r[i]);
#else
  uint32_t values[16][16], transposed[16][16];
  std::memcpy(values, rows, sizeof values);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) transposed[i][j] = values[j][i];
  std::memcpy(rows, transposed, sizeof values);
#endif
}

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

// ==== sixteen values of storage at a time ====

PYSPEC_INLINE F16 load_as_float(const float* p) { return load(p); }
PYSPEC_INLINE void store_as(float* p, F16 a) { store(p, a); }

template <class Storage>
PYSPEC_INLINE F16 load_as_float(const Storage* p) {
#if PYSPEC_HAS_AVX512
  __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (std::is_same_v<Storage, Float16>) return {_mm512_cvtph_ps(bits)};
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
#else
  float values[16];
  convert_row(p, values, 16);
  return load(values);
#endif
}

#if PYSPEC_HAS_AVX512
// Rounds to nearest even, as from_float does; the instruction for it would flush subnormal numbers to zero.
PYSPEC_INLINE __m256i round_to_bfloat16(__m512 values) {
  __m512i bits = _mm512_castps_si512(values);
  __m512i is_odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(is_odd, _mm512_set1_epi32(0x7fff)));
  __mmask16 is_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#elif PYSPEC_HAS_X86_VECTORS
PYSPEC_INLINE __m256i round_to_bfloat16(__m256 values) {  // in the low halves of 32 bits
  __m256i bits = _mm256_castps_si256(values);
  __m256i is_odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(is_odd, _mm256_set1_epi32(0x7fff)));
  __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), is_nan);
  return _mm256_srli_epi32(rounded, 16);
}
#endif

template <class Storage>
PYSPEC_INLINE void store_as(Storage* p, F16 a) {
#if PYSPEC_HAS_AVX512
  __m256i halves;
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    halves = round_to_bfloat16(a.v);
  } else {
    halves = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#elif PYSPEC_HAS_X86_VECTORS
  __m256i halves;
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    __m256i packed = _mm256_packus_epi32(round_to_bfloat16(a.lo), round_to_bfloat16(a.hi));
    halves = _mm256_permute4x64_epi64(packed, 0xd8);  // packing works within halves of 128 bits
  } else {
    halves = _mm256_set_m128i(_mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT),
                              _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#else
  float values[16];
  store(values, a);
  for (int i = 0; i < 16; ++i) from_float(values[i], p + i);
#endif
}

// 16 pairs of bf16: the first of each, and the second.
PYSPEC_INLINE void load_pairs(const void* p, F16& first, F16& second) {
#if PYSPEC_HAS_AVX512
  __m512i pairs = _mm512_loadu_si512(p);
  first = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
  second = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
#elif PYSPEC_HAS_X86_VECTORS
  const __m256i* halves = static_cast<const __m256i*>(p);
  __m256i lo = _mm256_loadu_si256(halves), hi = _mm256_loadu_si256(halves + 1);
  __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(lo, high_half)),
            _mm256_castsi256_ps(_mm256_and_si256(hi, high_half))};
#else
  for (int i = 0; i < 16; ++i) {
    uint32_t pair, low, high;
    std::memcpy(&pair, static_cast<const char*>(p) + 4 * i, 4);
    low = pair << 16, high = pair & 0xffff0000u;
    std::memcpy(&first.v[i], &low, 4), std::memcpy(&second.v[i], &high, 4);
  }
#endif
}

// ==== products of bytes: sixteen sums of four, exact in 32 bits ====
//
// Weights are stored as unsigned bytes, weight + 128, because the instruction that sums four products wants
// one unsigned factor. start_dot takes away what the 128 adds; without that instruction weights are signed.

#if PYSPEC_HAS_AVX512
struct I16 {
  __m512i v;
};
PYSPEC_INLINE F16 to_float(I16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
#elif PYSPEC_HAS_X86_VECTORS
struct I16 {
  __m256i lo, hi;
};
PYSPEC_INLINE F16 to_float(I16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
#else
struct I16 {
  int32_t v[16];
};
PYSPEC_INLINE F16 to_float(I16 a) {
  F16 result;
  for (int i = 0; i < 16; ++i) result.v[i] = static_cast<float>(a.v[i]);
  return result;
}
#endif

// ==== sixteen words of 32 bits ====

PYSPEC_INLINE I16 load_words(const void* p) {
#if PYSPEC_HAS_AVX512
  return {_mm512_loadu_si512(p)};
#elif PYSPEC_HAS_X86_VECTORS
  const __m256i* halves = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
#else
  I16 a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
#endif
}
// (a >> shift) & mask, the sign bit being a bit like others.
PYSPEC_INLINE I16 bit_field(I16 a, int shift, int32_t mask) {
#if PYSPEC_HAS_AVX512
  return {_mm512_and_si512(_mm512_srlv_epi32(a.v, _mm512_set1_epi32(shift)), _mm512_set1_epi32(mask))};
#elif PYSPEC_HAS_X86_VECTORS
  __m256i count = _mm256_set1_epi32(shift), bits = _mm256_set1_epi32(mask);
  return {_mm256_and_si256(_mm256_srlv_epi32(a.lo, count), bits),
          _mm256_and_si256(_mm256_srlv_epi32(a.hi, count), bits)};
#else
  for (int i = 0; i < 16; ++i) a.v[i] = static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> shift) & mask;
  return a;
#endif
}
// high << shift | low.
PYSPEC_INLINE I16 join_bits(I16 low, I16 high, int shift) {
#if PYSPEC_HAS_AVX512
  return {_mm512_or_si512(low.v, _mm512_sllv_epi32(high.v, _mm512_set1_epi32(shift)))};
#elif PYSPEC_HAS_X86_VECTORS
  __m256i count = _mm256_set1_epi32(shift);
  return {_mm256_or_si256(low.lo, _mm256_sllv_epi32(high.lo, count)),
          _mm256_or_si256(low.hi, _mm256_sllv_epi32(high.hi, count))};
#else
  for (int i = 0; i < 16; ++i) low.v[i] |= high.v[i] << shift;
  return low;
#endif
}
// Bit i is set where byte i of 16, under a mask, is value.
PYSPEC_INLINE uint32_t equal_bytes(const uint8_t* p, uint8_t mask, uint8_t value) {
#if PYSPEC_HAS_X86_VECTORS
  __m128i bytes = _mm_and_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                                _mm_set1_epi8(static_cast<char>(mask)));
  return static_cast<uint32_t>(
      _mm_movemask_epi8(_mm_cmpeq_epi8(bytes, _mm_set1_epi8(static_cast<char>(value)))));
#else
  uint32_t equal = 0;
  for (int i = 0; i < 16; ++i) equal |= uint32_t{(p[i] & mask) == value} << i;
  return equal;
#endif
}
// 16 bytes, signed.
PYSPEC_INLINE F16 load_as_float(const int8_t* p) {
#if PYSPEC_HAS_AVX512
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#else
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(p[i]);
  return load(values);
#endif
}

// x_sum: of the signed bytes that the dot products will take.
PYSPEC_INLINE I16 start_dot(int32_t x_sum) {
#if PYSPEC_HAS_INT8_DOT
  return {_mm512_set1_epi32(-128 * x_sum)};
#else
  (void)x_sum;
  return I16();
#endif
}

// sum[lane] + sum over i < 4 of (weights[lane][i] - 128) * x[i].
PYSPEC_INLINE I16 dot4(const char* weights, const char* x, I16 sum) {
  int32_t four;
  std::memcpy(&four, x, 4);
#if PYSPEC_HAS_INT8_DOT
  return {_mm512_dpbusd_epi32(sum.v, _mm512_loadu_si512(weights), _mm512_set1_epi32(four))};
#elif PYSPEC_HAS_AVX512
  // |weight| * (x with weight's sign): at most 2 * 128 * 127 a pair, so 16 bits hold it
  __m512i w = _mm512_xor_si512(_mm512_loadu_si512(weights), _mm512_set1_epi8(-128));
  __m512i values = _mm512_set1_epi32(four);
  values = _mm512_mask_sub_epi8(values, _mm512_movepi8_mask(w), _mm512_setzero_si512(), values);
  __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), values);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif PYSPEC_HAS_X86_VECTORS
  const __m256i* halves = reinterpret_cast<const __m256i*>(weights);
  __m256i values = _mm256_set1_epi32(four), flip = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  __m256i lo = _mm256_xor_si256(_mm256_loadu_si256(halves), flip);
  __m256i hi = _mm256_xor_si256(_mm256_loadu_si256(halves + 1), flip);
  __m256i low_pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(values, lo));
  __m256i high_pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(hi), _mm256_sign_epi8(values, hi));
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(low_pairs, ones)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(high_pairs, ones))};
#else
  for (int lane = 0; lane < 16; ++lane) {
    for (int i = 0; i < 4; ++i) {
      int32_t weight = static_cast<uint8_t>(weights[lane * 4 + i]) - 128;
      sum.v[lane] += weight * static_cast<int8_t>(x[i]);
    }
  }
  return sum;
#endif
}

}  // namespace
