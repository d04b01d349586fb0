// Numbers as they are stored, bf16 and fp16: to fp32 and back, one by one, by rows and by sixteens. See
// simd.h.
#pragma once

#include "cpu/simd_floats.h"
#include "params/common.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Calls body with a number of an element type, of which the type alone counts.
template <class Body>
void with_element(pyspec::Element element, const Body& body) {
  switch (element) {
    case pyspec::Element::kFloat32:
      return body(float{});
    case pyspec::Element::kFloat16:
      return body(Float16{});
    case pyspec::Element::kBFloat16:
      return body(BFloat16{});
  }
}

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
#elif PYSPEC_HAS_NEON
  __fp16 half;
  std::memcpy(&half, &a, 2);
  return half;
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
#elif PYSPEC_HAS_NEON
  __fp16 half = static_cast<__fp16>(a);
  std::memcpy(out, &half, 2);
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

#if PYSPEC_HAS_NEON
// Four numbers of 16 bits.
template <class Storage>
PYSPEC_INLINE float32x4_t four_floats(const Storage* p) {
  uint16x4_t bits = vld1_u16(&p->bits);
  if constexpr (std::is_same_v<Storage, Float16>) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
}
#endif

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
#elif PYSPEC_HAS_NEON
  for (; i + 4 <= n; i += 4) vst1q_f32(to + i, four_floats(from + i));
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
#elif PYSPEC_HAS_X86_VECTORS
  const __m128i* halves = reinterpret_cast<const __m128i*>(p);
  __m128i lo = _mm_loadu_si128(halves), hi = _mm_loadu_si128(halves + 1);
  if constexpr (std::is_same_v<Storage, Float16>) return {_mm256_cvtph_ps(lo), _mm256_cvtph_ps(hi)};
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(hi), 16))};
#elif PYSPEC_HAS_NEON
  return {four_floats(p), four_floats(p + 4), four_floats(p + 8), four_floats(p + 12)};
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
#elif PYSPEC_HAS_NEON
PYSPEC_INLINE uint16x4_t round_to_bfloat16(float32x4_t values) {
  uint32x4_t bits = vreinterpretq_u32_f32(values);
  uint32x4_t is_odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(is_odd, vdupq_n_u32(0x7fff)));
  return vshrn_n_u32(vbslq_u32(vceqq_f32(values, values), rounded, vdupq_n_u32(0x7fc00000)), 16);
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
#elif PYSPEC_HAS_NEON
  auto round = [](float32x4_t q) PYSPEC_INLINE_LAMBDA {
    if constexpr (std::is_same_v<Storage, Float16>) return vreinterpret_u16_f16(vcvt_f16_f32(q));
    return round_to_bfloat16(q);
  };
  vst1_u16(&p[0].bits, round(a.a)), vst1_u16(&p[4].bits, round(a.b));
  vst1_u16(&p[8].bits, round(a.c)), vst1_u16(&p[12].bits, round(a.d));
#else
  float values[16];
  store(values, a);
  for (int i = 0; i < 16; ++i) from_float(values[i], p + i);
#endif
}

// 16 bytes, signed.
PYSPEC_INLINE F16 load_as_float(const int8_t* p) {
#if PYSPEC_HAS_AVX512
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif PYSPEC_HAS_X86_VECTORS
  __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(bytes, bytes)))};
#elif PYSPEC_HAS_NEON
  int16x8_t low = vmovl_s8(vld1_s8(p)), high = vmovl_s8(vld1_s8(p + 8));
  I16 words{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
            vmovl_high_s16(high)};
  return to_float(words);
#else
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(p[i]);
  return load(values);
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
#elif PYSPEC_HAS_NEON
  U16 pairs = bits_of(load(p));
  first =
      floats_of(quarters<U16>([](uint32x4_t q) PYSPEC_INLINE_LAMBDA { return vshlq_n_u32(q, 16); }, pairs));
  second = floats_of(quarters<U16>(
      [](uint32x4_t q) PYSPEC_INLINE_LAMBDA { return vandq_u32(q, vdupq_n_u32(0xffff0000u)); }, pairs));
#else
  for (int i = 0; i < 16; ++i) {
    uint32_t pair, low, high;
    std::memcpy(&pair, static_cast<const char*>(p) + 4 * i, 4);
    low = pair << 16, high = pair & 0xffff0000u;
    std::memcpy(&first.v[i], &low, 4), std::memcpy(&second.v[i], &high, 4);
  }
#endif
}

}  // namespace
