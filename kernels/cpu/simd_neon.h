// Sixteen floats as four vectors of Arm's NEON, and sixteen words of 32 bits. See simd.h.
#pragma once

#include <arm_neon.h>

namespace {

struct F16 {
  float32x4_t a, b, c, d;
};
struct I16 {
  int32x4_t a, b, c, d;
};

// An instruction on each quarter of its operands.
#define PYSPEC_QUARTERS(Result, operation, ...) \
  quarters<Result>([](auto... q) PYSPEC_INLINE_LAMBDA { return operation(q...); }, __VA_ARGS__)
template <class Result, class Operation, class... Operands>
PYSPEC_INLINE Result quarters(Operation operation, Operands... x) {
  return {operation(x.a...), operation(x.b...), operation(x.c...), operation(x.d...)};
}

// Four words a quarter, for comparisons and bits.
struct U16 {
  uint32x4_t a, b, c, d;
};
PYSPEC_INLINE U16 bits_of(F16 x) { return PYSPEC_QUARTERS(U16, vreinterpretq_u32_f32, x); }
PYSPEC_INLINE F16 floats_of(U16 x) { return PYSPEC_QUARTERS(F16, vreinterpretq_f32_u32, x); }

PYSPEC_INLINE F16 load(const void* p) {
  const float* f = static_cast<const float*>(p);
  return {vld1q_f32(f), vld1q_f32(f + 4), vld1q_f32(f + 8), vld1q_f32(f + 12)};
}
PYSPEC_INLINE void store(void* p, F16 x) {
  float* f = static_cast<float*>(p);
  vst1q_f32(f, x.a), vst1q_f32(f + 4, x.b), vst1q_f32(f + 8, x.c), vst1q_f32(f + 12, x.d);
}
PYSPEC_INLINE F16 set1(float x) {
  float32x4_t q = vdupq_n_f32(x);
  return {q, q, q, q};
}
PYSPEC_INLINE F16 add(F16 x, F16 y) { return PYSPEC_QUARTERS(F16, vaddq_f32, x, y); }
PYSPEC_INLINE F16 sub(F16 x, F16 y) { return PYSPEC_QUARTERS(F16, vsubq_f32, x, y); }
PYSPEC_INLINE F16 mul(F16 x, F16 y) { return PYSPEC_QUARTERS(F16, vmulq_f32, x, y); }
PYSPEC_INLINE F16 div(F16 x, F16 y) { return PYSPEC_QUARTERS(F16, vdivq_f32, x, y); }
PYSPEC_INLINE F16 fma(F16 x, F16 y, F16 z) { return PYSPEC_QUARTERS(F16, vfmaq_f32, z, x, y); }
PYSPEC_INLINE U16 less(F16 x, F16 y) { return PYSPEC_QUARTERS(U16, vcltq_f32, x, y); }
PYSPEC_INLINE F16 where(U16 is, F16 yes, F16 no) { return PYSPEC_QUARTERS(F16, vbslq_f32, is, yes, no); }
// max(x, y) and min(x, y) are y where either is NaN, which vmaxq_f32 would hand on.
PYSPEC_INLINE F16 max(F16 x, F16 y) { return where(less(y, x), x, y); }
PYSPEC_INLINE F16 min(F16 x, F16 y) { return where(less(x, y), x, y); }
PYSPEC_INLINE F16 bit_xor(F16 x, F16 y) {
  return floats_of(PYSPEC_QUARTERS(U16, veorq_u32, bits_of(x), bits_of(y)));
}
PYSPEC_INLINE F16 where_less(F16 x, F16 y, F16 yes, F16 no) { return where(less(x, y), yes, no); }

// A bit for each lane.
PYSPEC_INLINE U16 lane_bits() {
  const uint32_t first[4] = {1, 2, 4, 8};
  uint32x4_t q = vld1q_u32(first);
  return {q, vshlq_n_u32(q, 4), vshlq_n_u32(q, 8), vshlq_n_u32(q, 12)};
}
// Bit i is set where lane i of x is less than that of y; not where either is NaN.
PYSPEC_INLINE uint32_t less_mask(F16 x, F16 y) {
  U16 bits = PYSPEC_QUARTERS(U16, vandq_u32, less(x, y), lane_bits());
  return vaddvq_u32(vorrq_u32(vorrq_u32(bits.a, bits.b), vorrq_u32(bits.c, bits.d)));
}
// Lanes of yes where the mask's bit is set.
PYSPEC_INLINE F16 select(uint32_t mask, F16 yes, F16 no) {
  uint32x4_t q = vdupq_n_u32(mask);
  return where(PYSPEC_QUARTERS(U16, vtstq_u32, (U16{q, q, q, q}), lane_bits()), yes, no);
}
PYSPEC_INLINE bool all_equal(F16 x, F16 y) {
  U16 equal = PYSPEC_QUARTERS(U16, vceqq_f32, x, y);
  return vminvq_u32(vandq_u32(vandq_u32(equal.a, equal.b), vandq_u32(equal.c, equal.d))) != 0;
}
PYSPEC_INLINE float32x4_t power_of_two(float32x4_t n) {
  int32x4_t exponent = vmaxq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(-127));
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(exponent, vdupq_n_s32(127)), 23));
}
template <int kTerms>
PYSPEC_INLINE F16 exp2(F16 x, const float (&series)[kTerms]) {
  x = max(set1(-200.0f), x);
  F16 n = PYSPEC_QUARTERS(F16, vrndnq_f32, x);
  F16 r = sub(x, n), p = set1(series[0]);
  for (int i = 1; i < kTerms; ++i) p = fma(p, r, set1(series[i]));
  return mul(p, PYSPEC_QUARTERS(F16, power_of_two, n));
}

// Four rows of four lanes, transposed.
PYSPEC_INLINE void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  auto pairs = [](float32x4_t x) PYSPEC_INLINE_LAMBDA { return vreinterpretq_f64_f32(x); };
  auto words = [](float64x2_t x) PYSPEC_INLINE_LAMBDA { return vreinterpretq_f32_f64(x); };
  float64x2_t low = pairs(vtrn1q_f32(a, b)), high = pairs(vtrn2q_f32(a, b));
  float64x2_t low_of = pairs(vtrn1q_f32(c, d)), high_of = pairs(vtrn2q_f32(c, d));
  a = words(vtrn1q_f64(low, low_of)), b = words(vtrn1q_f64(high, high_of));
  c = words(vtrn2q_f64(low, low_of)), d = words(vtrn2q_f64(high, high_of));
}
// 16 x 16 values: lane i of rows[j] becomes lane j of rows[i]. Bits pass unchanged, whatever they mean.
PYSPEC_INLINE void transpose(F16* rows) {
  float32x4_t blocks[4][16];  // [quarter][row]
  for (int j = 0; j < 16; ++j)
    blocks[0][j] = rows[j].a, blocks[1][j] = rows[j].b, blocks[2][j] = rows[j].c, blocks[3][j] = rows[j].d;
  for (int quarter = 0; quarter < 4; ++quarter) {
    for (int j = 0; j < 16; j += 4) {
      float32x4_t* block = blocks[quarter] + j;
      transpose4(block[0], block[1], block[2], block[3]);
    }
  }
  for (int i = 0; i < 16; ++i) {
    float32x4_t* lanes = blocks[i / 4] + i % 4;
    rows[i] = {lanes[0], lanes[4], lanes[8], lanes[12]};
  }
}

// Over the lanes: quarters first.
PYSPEC_INLINE float sum(F16 x) { return vaddvq_f32(vaddq_f32(vaddq_f32(x.a, x.b), vaddq_f32(x.c, x.d))); }
// Not NaN unless all lanes are.
PYSPEC_INLINE float highest(F16 x) {
  return vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(x.a, x.b), vmaxnmq_f32(x.c, x.d)));
}

#if PYSPEC_HAS_BF16_DOT
// Two bf16 products a lane, added to fp32.
PYSPEC_INLINE F16 pair_dot(F16 x, F16 y, F16 sums) {
  auto dot = [](float32x4_t total, float32x4_t p, float32x4_t q) PYSPEC_INLINE_LAMBDA {
    return vbfdotq_f32(total, vreinterpretq_bf16_f32(p), vreinterpretq_bf16_f32(q));
  };
  return quarters<F16>(dot, sums, x, y);
}
// Lanes of two fp32 vectors rounded to bf16 pairs: first in the low half.
PYSPEC_INLINE F16 pair(F16 first, F16 second) {
  auto round = [](float32x4_t low, float32x4_t high) PYSPEC_INLINE_LAMBDA {
    bfloat16x4_t lows = vcvt_bf16_f32(low), highs = vcvt_bf16_f32(high);
    return vreinterpretq_f32_u16(
        vcombine_u16(vzip1_u16(vreinterpret_u16_bf16(lows), vreinterpret_u16_bf16(highs)),
                     vzip2_u16(vreinterpret_u16_bf16(lows), vreinterpret_u16_bf16(highs))));
  };
  return quarters<F16>(round, first, second);
}
#endif

// ==== words ====

PYSPEC_INLINE F16 to_float(I16 x) { return PYSPEC_QUARTERS(F16, vcvtq_f32_s32, x); }
PYSPEC_INLINE I16 load_words(const void* p) {
  const int32_t* w = static_cast<const int32_t*>(p);
  return {vld1q_s32(w), vld1q_s32(w + 4), vld1q_s32(w + 8), vld1q_s32(w + 12)};
}
PYSPEC_INLINE void store_words(void* p, I16 x) {
  int32_t* w = static_cast<int32_t*>(p);
  vst1q_s32(w, x.a), vst1q_s32(w + 4, x.b), vst1q_s32(w + 8, x.c), vst1q_s32(w + 12, x.d);
}
PYSPEC_INLINE I16 set1_words(int32_t x) {
  int32x4_t q = vdupq_n_s32(x);
  return {q, q, q, q};
}
PYSPEC_INLINE I16 add(I16 x, I16 y) { return PYSPEC_QUARTERS(I16, vaddq_s32, x, y); }
PYSPEC_INLINE I16 mul(I16 x, I16 y) { return PYSPEC_QUARTERS(I16, vmulq_s32, x, y); }
// 32 bytes, as 16 words of two numbers of 16 bits.
template <class Byte>  // int8_t or uint8_t
PYSPEC_INLINE I16 load_as_halves(const Byte* p) {
  auto wide = [](const Byte* bytes) PYSPEC_INLINE_LAMBDA {
    if constexpr (std::is_signed_v<Byte>)
      return vreinterpretq_s32_s16(vmovl_s8(vld1_s8(bytes)));
    else
      return vreinterpretq_s32_u16(vmovl_u8(vld1_u8(bytes)));
  };
  return {wide(p), wide(p + 8), wide(p + 16), wide(p + 24)};
}
// sum + the products of the low halves, of 16 bits, and of the high ones.
PYSPEC_INLINE I16 dot2(I16 x, I16 y, I16 sums) {
  auto dot = [](int32x4_t total, int32x4_t p, int32x4_t q) PYSPEC_INLINE_LAMBDA {
    int16x8_t u = vreinterpretq_s16_s32(p), v = vreinterpretq_s16_s32(q);
    int32x4_t low = vmull_s16(vget_low_s16(u), vget_low_s16(v)), high = vmull_high_s16(u, v);
    return vaddq_s32(total, vpaddq_s32(low, high));
  };
  return quarters<I16>(dot, sums, x, y);
}
// Bytes below 16 become those of a table.
PYSPEC_INLINE I16 look_up(I16 bytes, const uint8_t (&table)[16]) {
  uint8x16_t entries = vld1q_u8(table);
  auto find = [&](int32x4_t q) PYSPEC_INLINE_LAMBDA {
    return vreinterpretq_s32_u8(vqtbl1q_u8(entries, vreinterpretq_u8_s32(q)));
  };
  return quarters<I16>(find, bytes);
}
// (x >> shift) & mask, the sign bit being a bit like others.
PYSPEC_INLINE I16 bit_field(I16 x, int shift, int32_t mask) {
  int32x4_t count = vdupq_n_s32(-shift), bits = vdupq_n_s32(mask);
  auto field = [&](int32x4_t q) PYSPEC_INLINE_LAMBDA {
    return vandq_s32(vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(q), count)), bits);
  };
  return quarters<I16>(field, x);
}
// high << shift | low.
PYSPEC_INLINE I16 join_bits(I16 low, I16 high, int shift) {
  int32x4_t count = vdupq_n_s32(shift);
  auto join = [&](int32x4_t p, int32x4_t q)
                  PYSPEC_INLINE_LAMBDA { return vorrq_s32(p, vshlq_s32(q, count)); };
  return quarters<I16>(join, low, high);
}
// Bit i is set where byte i of 16, under a mask, is value.
PYSPEC_INLINE uint32_t equal_bytes(const uint8_t* p, uint8_t mask, uint8_t value) {
  const uint8_t each[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  uint8x16_t equal = vceqq_u8(vandq_u8(vld1q_u8(p), vdupq_n_u8(mask)), vdupq_n_u8(value));
  uint8x16_t bits = vandq_u8(equal, vld1q_u8(each));
  return vaddv_u8(vget_low_u8(bits)) | static_cast<uint32_t>(vaddv_u8(vget_high_u8(bits))) << 8;
}

// Sums of four products of bytes. Unsigned weights need the instruction of i8mm; as signed ones they need
// that of dotprod, or two steps of every processor's.
PYSPEC_INLINE int32x4_t dot_bytes(int32x4_t total, int8x16_t weights, int8x16_t x) {
#if PYSPEC_HAS_NEON_DOT
  return vdotq_s32(total, weights, x);
#else
  int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x)), high = vmull_high_s8(weights, x);
  return vpadalq_s16(total, vpaddq_s16(low, high));  // two products are at most 2 * 128 * 127: they fit
#endif
}

// x_sum: of the signed bytes that the dot products will take. See simd_words.h.
PYSPEC_INLINE I16 start_dot(int32_t x_sum) {
#if PYSPEC_HAS_INT8_DOT
  return set1_words(-128 * x_sum);
#else
  (void)x_sum;
  return set1_words(0);
#endif
}
// sum[lane] + sum over i < 4 of (weights[lane][i] - 128) * x[lane][i].
PYSPEC_INLINE I16 dot4(I16 weights, I16 x, I16 sums) {
  auto dot = [](int32x4_t total, int32x4_t bytes, int32x4_t values) PYSPEC_INLINE_LAMBDA {
    uint8x16_t w = vreinterpretq_u8_s32(bytes);
    int8x16_t signed_values = vreinterpretq_s8_s32(values);
#if PYSPEC_HAS_INT8_DOT
    return vusdotq_s32(total, w, signed_values);
#else
    return dot_bytes(total, vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(128))), signed_values);
#endif
  };
  return quarters<I16>(dot, sums, weights, x);
}

// Sums of products of 16 times four weights, below 64, with four signed bytes, which are in every word of x.
#if PYSPEC_HAS_NEON_DOT
using SmallSums = I16;
PYSPEC_INLINE SmallSums add_small_dot(I16 weights, I16 x, SmallSums sums) {
  auto dot = [](int32x4_t total, int32x4_t w, int32x4_t values) PYSPEC_INLINE_LAMBDA {
    return dot_bytes(total, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(values));
  };
  return quarters<I16>(dot, sums, weights, x);
}
PYSPEC_INLINE I16 widen(SmallSums sums) { return sums; }
#else
// A product has 16 bits of its own, of two words a vector.
struct SmallSums {
  int16x8_t a[2], b[2], c[2], d[2];
};
PYSPEC_INLINE SmallSums add_small_dot(I16 weights, I16 x, SmallSums sums) {
  auto dot = [](int16x8_t(&total)[2], int32x4_t w, int32x4_t values) PYSPEC_INLINE_LAMBDA {
    int8x16_t u = vreinterpretq_s8_s32(w), v = vreinterpretq_s8_s32(values);
    total[0] = vmlal_s8(total[0], vget_low_s8(u), vget_low_s8(v));
    total[1] = vmlal_high_s8(total[1], u, v);
  };
  dot(sums.a, weights.a, x.a), dot(sums.b, weights.b, x.b);
  dot(sums.c, weights.c, x.c), dot(sums.d, weights.d, x.d);
  return sums;
}
PYSPEC_INLINE I16 widen(SmallSums sums) {
  auto add = [](const int16x8_t(&total)[2])
                 PYSPEC_INLINE_LAMBDA { return vpaddlq_s16(vpaddq_s16(total[0], total[1])); };
  return {add(sums.a), add(sums.b), add(sums.c), add(sums.d)};
}
#endif

}  // namespace
