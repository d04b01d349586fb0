// Products of linear: a few weights of many outputs times a value of x, added to sums in registers.
//
// With 16 registers of eight floats, 6 rows of two take 12 for sums, 2 for weights, 1 for a value of x and 1
// for a product or a mask, which is all. A compiler left to itself saves another register than the sum that
// it adds to, so that a sum goes to memory and back in every step, and every step waits for it. So a sum is
// the register that its instruction writes, and masks are read from memory each time.
#pragma once

#include "cpu/simd.h"

namespace {

// Whether vectors are few, and halves of what F16 and I16 are.
#if PYSPEC_HAS_X86_VECTORS && !PYSPEC_HAS_AVX512
#define PYSPEC_FEW_REGISTERS 1
PYSPEC_INLINE __m256i read_again(const uint32_t& word) {
  __m256i words;
  asm volatile("vpbroadcastd %1, %0" : "=x"(words) : "m"(word));
  return words;
}
#endif

// sum + a * b.
PYSPEC_INLINE void add_product(F16 a, F16 b, F16& sum) {
#if PYSPEC_FEW_REGISTERS
  asm("vfmadd231ps %1, %2, %0" : "+x"(sum.lo) : "x"(a.lo), "x"(b.lo));
  asm("vfmadd231ps %1, %2, %0" : "+x"(sum.hi) : "x"(a.hi), "x"(b.hi));
#else
  sum = fma(a, b, sum);
#endif
}

// Of 16 pairs of bf16 the first of each, or the second.
template <bool kSecond>
PYSPEC_INLINE F16 load_of_pairs(const void* p) {
#if PYSPEC_FEW_REGISTERS
  static constexpr uint32_t kHighHalf = 0xffff0000u;
  const __m256i* halves = static_cast<const __m256i*>(p);
  __m256i lo = _mm256_loadu_si256(halves), hi = _mm256_loadu_si256(halves + 1);
  if constexpr (kSecond) {
    __m256i mask = read_again(kHighHalf);
    return {_mm256_castsi256_ps(_mm256_and_si256(lo, mask)), _mm256_castsi256_ps(_mm256_and_si256(hi, mask))};
  }
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
#else
  F16 first, second;
  load_pairs(p, first, second);
  return kSecond ? second : first;
#endif
}

// ==== bytes ====

// Without an instruction for four products of bytes they are multiplied as pairs of 16 bits, which cannot
// overflow: bytes 0 and 2 of each four, and 1 and 3, as a mask and a shift take the weights' apart.
#if PYSPEC_FEW_REGISTERS && !PYSPEC_HAS_INT8_DOT
#define PYSPEC_HALVES 1
constexpr bool kHalves = true;

// 64 unsigned bytes as words of two numbers of 16 bits: those of even places, or the others.
template <bool kOdd>
PYSPEC_INLINE I16 load_bytes_of(const char* p) {
  static constexpr uint32_t kEven = 0x00ff00ffu;
  I16 bytes = load_words(p);
  if constexpr (kOdd) return {_mm256_srli_epi16(bytes.lo, 8), _mm256_srli_epi16(bytes.hi, 8)};
  __m256i mask = read_again(kEven);
  return {_mm256_and_si256(bytes.lo, mask), _mm256_and_si256(bytes.hi, mask)};
}

// sum + the products of the low halves, of 16 bits, and of the high ones.
PYSPEC_INLINE void add_dot2(I16 a, I16 b, I16& sum) {
  __m256i product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.lo), "=x"(product) : "x"(a.lo), "x"(b.lo));
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum.hi), "=x"(product) : "x"(a.hi), "x"(b.hi));
}
#else
constexpr bool kHalves = false;
#endif

// What a sum of products begins with, as often as the sum of the bytes of x that it takes: weights are stored
// as weight + 128. dot4 makes them signed where it has no instruction that takes one factor without a sign.
#if PYSPEC_HALVES || PYSPEC_HAS_INT8_DOT
constexpr int32_t kProductStart = -128;
#else
constexpr int32_t kProductStart = 0;
#endif

// Integers below 2^22 in size times a scale of fp16, rounded once, as to_float(sum) times it is, in one
// instruction where it is fused. Added to the bits of the float 3 * 2^22 such an integer is added to that
// float; its product with the scale is exact, and is taken away before the only rounding. kFloatStart are the
// bits, which sums begin with, and float_start what takes them away.
#if PYSPEC_HAS_X86_VECTORS
constexpr int32_t kFloatStart = 0x4b400000;
PYSPEC_INLINE F16 float_start(F16 scale) { return mul(scale, set1(-0x1.8p23f)); }
PYSPEC_INLINE F16 times(I16 sum, F16 scale, F16 start) {
#if PYSPEC_HAS_AVX512
  return fma({_mm512_castsi512_ps(sum.v)}, scale, start);
#else
  return fma({_mm256_castsi256_ps(sum.lo), _mm256_castsi256_ps(sum.hi)}, scale, start);
#endif
}
#else
constexpr int32_t kFloatStart = 0;
PYSPEC_INLINE F16 float_start(F16) { return set1(0.0f); }
PYSPEC_INLINE F16 times(I16 sum, F16 scale, F16) { return mul(to_float(sum), scale); }
#endif

}  // namespace
