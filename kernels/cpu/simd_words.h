// Sixteen words of 32 bits: bit fields, and products of bytes, whose sums of four are exact. See simd.h.
#pragma once

#include "cpu/simd_floats.h"

namespace {

#if !PYSPEC_HAS_NEON  // which has all of it in simd_neon.h

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
PYSPEC_INLINE void store_words(void* p, I16 a) {
#if PYSPEC_HAS_AVX512
  _mm512_storeu_si512(p, a.v);
#elif PYSPEC_HAS_X86_VECTORS
  __m256i* halves = static_cast<__m256i*>(p);
  _mm256_storeu_si256(halves, a.lo), _mm256_storeu_si256(halves + 1, a.hi);
#else
  std::memcpy(p, a.v, sizeof a.v);
#endif
}
PYSPEC_INLINE I16 set1_words(int32_t a) {
#if PYSPEC_HAS_AVX512
  return {_mm512_set1_epi32(a)};
#elif PYSPEC_HAS_X86_VECTORS
  return {_mm256_set1_epi32(a), _mm256_set1_epi32(a)};
#else
  I16 result;
  for (int i = 0; i < 16; ++i) result.v[i] = a;
  return result;
#endif
}
PYSPEC_INLINE I16 add(I16 a, I16 b) {
#if PYSPEC_HAS_AVX512
  return {_mm512_add_epi32(a.v, b.v)};
#elif PYSPEC_HAS_X86_VECTORS
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
#else
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
#endif
}
PYSPEC_INLINE I16 mul(I16 a, I16 b) {
#if PYSPEC_HAS_AVX512
  return {_mm512_mullo_epi32(a.v, b.v)};
#elif PYSPEC_HAS_X86_VECTORS
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
#else
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
#endif
}
// 32 bytes, as 16 words of two numbers of 16 bits.
template <class Byte>  // int8_t or uint8_t
PYSPEC_INLINE I16 load_as_halves(const Byte* p) {
#if PYSPEC_HAS_AVX512
  __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {std::is_signed_v<Byte> ? _mm512_cvtepi8_epi16(bytes) : _mm512_cvtepu8_epi16(bytes)};
#elif PYSPEC_HAS_X86_VECTORS
  const __m128i* parts = reinterpret_cast<const __m128i*>(p);
  __m128i lo = _mm_loadu_si128(parts), hi = _mm_loadu_si128(parts + 1);
  if constexpr (std::is_signed_v<Byte>) return {_mm256_cvtepi8_epi16(lo), _mm256_cvtepi8_epi16(hi)};
  return {_mm256_cvtepu8_epi16(lo), _mm256_cvtepu8_epi16(hi)};
#else
  I16 result;
  int16_t halves[32];
  for (int i = 0; i < 32; ++i) halves[i] = p[i];
  std::memcpy(result.v, halves, sizeof halves);
  return result;
#endif
}
// sum + the products of the low halves, of 16 bits, and of the high ones.
PYSPEC_INLINE I16 dot2(I16 a, I16 b, I16 sum) {
#if PYSPEC_ISA_avx_vnni
  return {_mm256_dpwssd_avx_epi32(sum.lo, a.lo, b.lo), _mm256_dpwssd_avx_epi32(sum.hi, a.hi, b.hi)};
#elif PYSPEC_HAS_INT8_DOT
  return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)};
#elif PYSPEC_HAS_AVX512
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
#elif PYSPEC_HAS_X86_VECTORS
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(a.lo, b.lo)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(a.hi, b.hi))};
#else
  int16_t x[32], y[32];
  std::memcpy(x, a.v, sizeof x), std::memcpy(y, b.v, sizeof y);
  for (int i = 0; i < 16; ++i) sum.v[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return sum;
#endif
}
#if PYSPEC_HAS_X86_VECTORS
// 32 signed bytes as numbers of 16 bits: those of even places first, then the others.
PYSPEC_INLINE void split_signed_bytes(const int8_t* bytes, void* halves) {
  __m256i all = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  __m256i* to = static_cast<__m256i*>(halves);
  _mm256_storeu_si256(to, _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8));
  _mm256_storeu_si256(to + 1, _mm256_srai_epi16(all, 8));
}
#endif
// Bytes below 16 become those of a table.
PYSPEC_INLINE I16 look_up(I16 bytes, const uint8_t (&table)[16]) {
#if PYSPEC_HAS_X86_VECTORS
  __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
#endif
#if PYSPEC_HAS_AVX512
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(entries), bytes.v)};
#elif PYSPEC_HAS_X86_VECTORS
  __m256i twice = _mm256_broadcastsi128_si256(entries);
  return {_mm256_shuffle_epi8(twice, bytes.lo), _mm256_shuffle_epi8(twice, bytes.hi)};
#else
  uint8_t found[64];
  std::memcpy(found, bytes.v, sizeof found);
  for (uint8_t& byte : found) byte = table[byte];
  std::memcpy(bytes.v, found, sizeof found);
  return bytes;
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

// ==== products of bytes ====
//
// Weights are stored as unsigned bytes, weight + 128, because the instruction that sums four products wants
// one unsigned factor. start_dot takes away what the 128 adds; without that instruction weights are signed.

// x_sum: of the signed bytes that the dot products will take.
PYSPEC_INLINE I16 start_dot(int32_t x_sum) {
#if PYSPEC_HAS_INT8_DOT
  return set1_words(-128 * x_sum);
#else
  (void)x_sum;
  return I16();
#endif
}

// sum[lane] + sum over i < 4 of (weights[lane][i] - 128) * x[lane][i].
PYSPEC_INLINE I16 dot4(I16 weights, I16 x, I16 sum) {
#if PYSPEC_ISA_avx_vnni
  return {_mm256_dpbusd_avx_epi32(sum.lo, weights.lo, x.lo),
          _mm256_dpbusd_avx_epi32(sum.hi, weights.hi, x.hi)};
#elif PYSPEC_HAS_INT8_DOT
  return {_mm512_dpbusd_epi32(sum.v, weights.v, x.v)};
#elif PYSPEC_HAS_AVX512
  // |weight| * (x with weight's sign): at most 2 * 128 * 127 a pair, so 16 bits hold it
  __m512i w = _mm512_xor_si512(weights.v, _mm512_set1_epi8(-128));
  __m512i values = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(w), _mm512_setzero_si512(), x.v);
  __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(w), values);
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))};
#elif PYSPEC_HAS_X86_VECTORS
  __m256i flip = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  __m256i lo = _mm256_xor_si256(weights.lo, flip), hi = _mm256_xor_si256(weights.hi, flip);
  __m256i low_pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(lo), _mm256_sign_epi8(x.lo, lo));
  __m256i high_pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(hi), _mm256_sign_epi8(x.hi, hi));
  return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(low_pairs, ones)),
          _mm256_add_epi32(sum.hi, _mm256_madd_epi16(high_pairs, ones))};
#else
  uint8_t w[64];
  int8_t values[64];
  std::memcpy(w, weights.v, sizeof w), std::memcpy(values, x.v, sizeof values);
  for (int lane = 0; lane < 16; ++lane) {
    for (int i = 0; i < 4; ++i) sum.v[lane] += (w[lane * 4 + i] - 128) * values[lane * 4 + i];
  }
  return sum;
#endif
}

#endif  // !PYSPEC_HAS_NEON

// Four bytes, in every word.
PYSPEC_INLINE I16 words_at(const char* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return set1_words(four);
}

// dot4 for weights in memory, and x of four bytes.
PYSPEC_INLINE I16 dot4(const char* weights, const char* x, I16 sum) {
  return dot4(load_words(weights), words_at(x), sum);
}

// ==== products of small bytes ====
//
// Weights below 64 need no sign, and the sums of few of their products fit 16 bits: without an instruction
// for four products, a word holds two such sums until add_scaled widens them, with a multiplication that it
// would take anyway.

#if (PYSPEC_HAS_X86_VECTORS && !PYSPEC_HAS_INT8_DOT) || (PYSPEC_HAS_NEON && !PYSPEC_HAS_NEON_DOT)
enum : bool { kSumsOf16Bits = true };
#else
enum : bool { kSumsOf16Bits = false };
#endif

// Fours of inputs whose sums may be added up before they are widened, for weights of at most `most`.
constexpr int64_t small_dots(int64_t most) { return kSumsOf16Bits ? 32767 / (2 * 127 * most) : 1 << 20; }

#if !PYSPEC_HAS_NEON
using SmallSums = I16;
// sums + the products of 16 times four weights with four signed bytes, which are in every word of x.
PYSPEC_INLINE SmallSums add_small_dot(I16 weights, I16 x, SmallSums sums) {
#if PYSPEC_ISA_avx_vnni
  return {_mm256_dpbusd_avx_epi32(sums.lo, weights.lo, x.lo),
          _mm256_dpbusd_avx_epi32(sums.hi, weights.hi, x.hi)};
#elif PYSPEC_HAS_INT8_DOT
  return {_mm512_dpbusd_epi32(sums.v, weights.v, x.v)};
#elif PYSPEC_HAS_AVX512
  sums.v = _mm512_add_epi16(sums.v, _mm512_maddubs_epi16(weights.v, x.v));
  asm("" : "+v"(sums.v));  // or the compiler forms all products of a loop before it adds any, and spills them
  return sums;
#elif PYSPEC_HAS_X86_VECTORS
  sums.lo = _mm256_add_epi16(sums.lo, _mm256_maddubs_epi16(weights.lo, x.lo));
  sums.hi = _mm256_add_epi16(sums.hi, _mm256_maddubs_epi16(weights.hi, x.hi));
  asm("" : "+x"(sums.lo), "+x"(sums.hi));  // as above
  return sums;
#else
  uint8_t w[64];
  int8_t values[64];
  std::memcpy(w, weights.v, sizeof w), std::memcpy(values, x.v, sizeof values);
  for (int lane = 0; lane < 16; ++lane) {
    for (int i = 0; i < 4; ++i) sums.v[lane] += w[lane * 4 + i] * values[lane * 4 + i];
  }
  return sums;
#endif
}
#endif

// What add_scaled takes as its scale, of words that fit 16 bits.
PYSPEC_INLINE I16 small_scale(I16 a) {
#if PYSPEC_HAS_INT8_DOT || !PYSPEC_HAS_X86_VECTORS
  return a;
#else
  return join_bits(bit_field(a, 0, 0xffff), a, 16);
#endif
}

// total + scale * sums of add_small_dot.
PYSPEC_INLINE I16 add_scaled(SmallSums sums, I16 scale, I16 total) {
#if PYSPEC_HAS_NEON
  return add(total, mul(widen(sums), scale));
#elif PYSPEC_HAS_INT8_DOT || !PYSPEC_HAS_X86_VECTORS
  return add(total, mul(sums, scale));
#else
  return dot2(sums, scale, total);
#endif
}

}  // namespace
