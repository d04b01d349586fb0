// Rows of linear and linear_codes on their way in and out: x to fp32 and to 8 bits, sums to out.
#pragma once

#include "cpu/simd.h"
#include "params/linear.h"

namespace {

template <class Storage>
PYSPEC_INLINE void to_floats(const void* x, float* out, int64_t n) {
  convert_row(static_cast<const Storage*>(x), out, n);
}

PYSPEC_INLINE void to_floats(pyspec::Element element, const void* x, float* out, int64_t n) {
  if (element == pyspec::Element::kFloat32) return to_floats<float>(x, out, n);
  if (element == pyspec::Element::kFloat16) return to_floats<Float16>(x, out, n);
  to_floats<BFloat16>(x, out, n);
}

// The bits of the largest size among values: sizes are ordered as their bits are, with NaN above all.
template <int64_t kCount>
PYSPEC_INLINE uint32_t largest_size(const float* values) {
  uint32_t largest = 0;
#if PYSPEC_HAS_X86_VECTORS
  __m256i most = _mm256_setzero_si256(), without_sign = _mm256_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < kCount; i += 8) {
    __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i));
    most = _mm256_max_epu32(most, _mm256_and_si256(bits, without_sign));
  }
  __m128i four = _mm_max_epu32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, 0xb1));
  largest = static_cast<uint32_t>(_mm_cvtsi128_si32(four));
#elif PYSPEC_HAS_NEON
  uint32x4_t most = vdupq_n_u32(0);
  for (int64_t i = 0; i < kCount; i += 4) {
    most = vmaxq_u32(most, vreinterpretq_u32_f32(vabsq_f32(vld1q_f32(values + i))));
  }
  largest = vmaxvq_u32(most);
#else
  uint32_t bits[kCount];
  std::memcpy(bits, values, sizeof(bits));
  for (uint32_t signed_bits : bits) {
    uint32_t size = signed_bits & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
#endif
  return largest;
}

// 32 values times factor, rounded to the nearest integer, of which none is above 127.
PYSPEC_INLINE void round_32(const float* values, float factor, int8_t* integers) {
#if PYSPEC_HAS_X86_VECTORS
  auto round = [&](int64_t i) PYSPEC_INLINE_LAMBDA {
    return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), _mm256_set1_ps(factor)));
  };
  __m256i low = _mm256_packs_epi32(round(0), round(8)), high = _mm256_packs_epi32(round(16), round(24));
  // packing works within halves of 128 bits: fours of values 0, 2, 4, 6, 1, 3, 5, 7
  __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(integers), bytes);
#elif PYSPEC_HAS_NEON
  auto round = [&](int64_t i) PYSPEC_INLINE_LAMBDA {
    int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i), factor));
    int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(values + i + 4), factor));
    return vuzp1q_s16(vreinterpretq_s16_s32(low), vreinterpretq_s16_s32(high));
  };
  for (int64_t i = 0; i < 32; i += 16) {
    int8x16_t low = vreinterpretq_s8_s16(round(i)), high = vreinterpretq_s8_s16(round(i + 8));
    vst1q_s8(integers + i, vuzp1q_s8(low, high));
  }
#else
  for (int64_t i = 0; i < 32; ++i) {
    integers[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(values[i] * factor)));
  }
#endif
}

// Values as integers from -127 to 127 times a scale, which is returned. The scale of values that are not
// finite is NaN; values too small for a scale with a reciprocal count as 0.
template <int64_t kCount>
PYSPEC_INLINE float round_to_bytes(const float (&values)[kCount], int8_t* integers) {
  uint32_t largest_bits = largest_size<kCount>(values);
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  float factor = largest > 0 ? 127.0f / largest : 0.0f;
  if (largest < kInfinity && factor < kInfinity) {
    for (int64_t i = 0; i < kCount; i += 32) round_32(values + i, factor, integers + i);
  } else {
    std::memset(integers, 0, kCount);
  }
  return largest < kInfinity ? largest / 127.0f : __builtin_nanf("");
}

template <class Out, class Params>
PYSPEC_INLINE void store_row(const float* sums, const Params& p, int64_t row, int64_t first) {
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + first;
  int64_t count = p.outputs - first < pyspec::kPanel ? p.outputs - first : pyspec::kPanel;
  if (count == pyspec::kPanel) {
    for (int64_t i = 0; i < pyspec::kPanel; i += 16) {
      F16 sum = load(sums + i);
      store_as(out + i, p.bias ? add(sum, load(p.bias + first + i)) : sum);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) from_float(p.bias ? sums[i] + p.bias[first + i] : sums[i], out + i);
}

// Sums [rows][kPanel], with the bias, as out's rows from first_row on, or those that p.order names.
template <class Params>
PYSPEC_INLINE void store_rows(const float* sums, const Params& p, int64_t first_row, int64_t rows,
                              int64_t first_output) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = sums + r * pyspec::kPanel;
    int64_t place = p.order ? p.order[first_row + r] : first_row + r;
    if (p.out_element == pyspec::Element::kFloat32) store_row<float>(row, p, place, first_output);
    if (p.out_element == pyspec::Element::kFloat16) store_row<Float16>(row, p, place, first_output);
    if (p.out_element == pyspec::Element::kBFloat16) store_row<BFloat16>(row, p, place, first_output);
  }
}

}  // namespace
