// What linear_codes multiplies: a chunk of a panel's codes as bytes, with their scales and factors. Formats
// differ here and nowhere else.
#pragma once

#include "cpu/simd.h"
#include "params/linear_codes.h"

namespace {

using pyspec::CodeFormat;
using pyspec::CodeShape;
using pyspec::Floors;
using pyspec::kPanel;
using pyspec::Levels;

constexpr int64_t kChunk = 256;  // inputs whose bytes, 8 kB of them, stay in the first cache

constexpr uint8_t kIq4Bytes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t kFp4Bytes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// What the loops need to know of a format: a byte of the chunk is a level - lowest.
template <CodeFormat kFormat>
struct Format {
  static constexpr CodeShape kShape = pyspec::shape_of(kFormat);
  static constexpr int64_t kBlock = kShape.block, kGroup = kShape.group;
  static constexpr int64_t kGroups = kBlock / kGroup, kPairs = (kGroups + 1) / 2;
  static constexpr int64_t kMost = kShape.levels == Levels::kIq4   ? 241
                                   : kShape.levels == Levels::kFp4 ? 24
                                                                   : (1 << kShape.bits) - 1;
  static constexpr bool kIsSmall = kMost < 64;
  static constexpr bool kHasSums = kShape.has_minimums || (kShape.has_scales && kShape.lowest && kIsSmall);
};

// A chunk of a panel as the products take it.
template <class F>
struct Chunk {
  alignas(64) uint8_t bytes[kChunk / 4][kPanel][4];
  alignas(64) int32_t scales[kChunk / F::kGroup][kPanel];
  // Of a block, for pairs of groups: numbers of 16 bits that the sums of x are multiplied with, minimums or
  // scales.
  alignas(64) int32_t pairs[kChunk / F::kBlock][F::kPairs][kPanel];
  alignas(64) float factors[kChunk / F::kBlock][kPanel], floors[kChunk / F::kBlock][kPanel];
};

// ==== from codes to a chunk ====

template <CodeFormat kFormat>
PYSPEC_INLINE F16 load_factors(const char* p) {
  if constexpr (kFormat == CodeFormat::kMxfp4) return load_as_float(reinterpret_cast<const BFloat16*>(p));
  return load_as_float(reinterpret_cast<const Float16*>(p));
}

// The codes of four inputs, number `four` of a group of a block, for 16 outputs: from a plane of the low bits
// and one of the others.
template <class F>
PYSPEC_INLINE I16 codes_of(const char* block, int64_t lane, int64_t group, int64_t four) {
  constexpr int kLow = static_cast<int>(pyspec::low_bits(F::kShape)), kHigh = F::kShape.bits - kLow;
  constexpr int64_t kFours = F::kGroup / 4, kInLow = 8 / kLow;  // fours of a byte
  constexpr int32_t kLowMask = static_cast<int32_t>(0x01010101u * ((1u << kLow) - 1));
  constexpr int32_t kHighMask = static_cast<int32_t>(0x01010101u * ((1u << kHigh) - 1));
  const char* low = block + pyspec::codes_at(F::kShape) + lane * 4;
  int64_t word = group * (kFours / kInLow) + four / kInLow;
  I16 codes =
      bit_field(load_words(low + word * kPanel * 4), static_cast<int>(four % kInLow) * kLow, kLowMask);
  if constexpr (kHigh > 0) {
    constexpr int64_t kInHigh = 8 / kHigh;
    const char* high = block + pyspec::high_bits_at(F::kShape) + lane * 4;
    int64_t place = four + (kFours % kInHigh ? group * kFours % kInHigh : 0);
    I16 tops = load_words(high + (group * kFours / kInHigh + place / kInHigh) * kPanel * 4);
    codes = join_bits(codes, bit_field(tops, static_cast<int>(place % kInHigh) * kHigh, kHighMask), kLow);
  }
  if constexpr (F::kShape.levels == Levels::kIq4) codes = look_up(codes, kIq4Bytes);
  if constexpr (F::kShape.levels == Levels::kFp4) codes = look_up(codes, kFp4Bytes);
  return codes;
}

// Scales and minimums of a block for 16 outputs.
template <class F>
PYSPEC_INLINE void unpack_scales(const char* block, int64_t lane, int32_t (*scales)[kPanel],
                                 int32_t (*pairs)[kPanel]) {
  const char* first = block + pyspec::scales_at(F::kShape) + lane * 2;
  const char* second = block + pyspec::minimums_at(F::kShape) + lane * 2;
  if constexpr (!F::kShape.has_scales) {  // int4: one minimum
    const uint8_t* minimums = reinterpret_cast<const uint8_t*>(block + pyspec::minimums_at(F::kShape)) + lane;
    for (int64_t i = 0; i < 16; ++i) pairs[0][lane + i] = minimums[i];
  } else {
    for (int64_t pair = 0; pair < F::kPairs; ++pair, first += kPanel * 2, second += kPanel * 2) {
      I16 both = load_as_halves(reinterpret_cast<const int8_t*>(first));
      if constexpr (F::kShape.bits == 2) {
        both = load_as_halves(reinterpret_cast<const uint8_t*>(first));
        store_words(pairs[pair] + lane, bit_field(both, 4, 0x000f000f));
        both = bit_field(both, 0, 0x000f000f);
      } else if constexpr (F::kShape.has_minimums) {
        store_words(pairs[pair] + lane, load_as_halves(reinterpret_cast<const uint8_t*>(second)));
      } else if constexpr (F::kHasSums) {
        store_words(pairs[pair] + lane, both);
      }
      I16 even = dot2(both, set1_words(1), set1_words(0)),
          odd = dot2(both, set1_words(1 << 16), set1_words(0));
      if constexpr (F::kIsSmall) even = small_scale(even), odd = small_scale(odd);
      store_words(scales[2 * pair] + lane, even);
      store_words(scales[2 * pair + 1] + lane, odd);
    }
  }
}

// All but the codes.
template <CodeFormat kFormat>
PYSPEC_INLINE void unpack_factors(const char* panel, int64_t blocks, Chunk<Format<kFormat>>& chunk) {
  using F = Format<kFormat>;
  for (int64_t b = 0; b < blocks; ++b, panel += pyspec::block_bytes(F::kShape)) {
    for (int64_t lane = 0; lane < kPanel; lane += 16) {
      store(chunk.factors[b] + lane, load_factors<kFormat>(panel + lane * 2));
      if constexpr (F::kShape.floors == Floors::kStored) {
        store(chunk.floors[b] + lane, load_factors<kFormat>(panel + (kPanel + lane) * 2));
      }
      if constexpr (F::kShape.has_scales || F::kShape.has_minimums) {
        unpack_scales<F>(panel, lane, chunk.scales + b * F::kGroups, chunk.pairs[b]);
      }
    }
  }
}

template <class F>
PYSPEC_INLINE void unpack_codes(const char* panel, int64_t blocks, Chunk<F>& chunk) {
  for (int64_t b = 0; b < blocks; ++b, panel += pyspec::block_bytes(F::kShape)) {
    for (int64_t g = 0; g < F::kGroups; ++g) {
      auto bytes = chunk.bytes + (b * F::kGroups + g) * (F::kGroup / 4);
      PYSPEC_UNROLL
      for (int64_t four = 0; four < F::kGroup / 4; ++four) {
        for (int64_t lane = 0; lane < kPanel; lane += 16) {
          store_words(bytes[four][lane], codes_of<F>(panel, lane, g, four));
        }
      }
    }
  }
}

}  // namespace
