// Quantised codes to numbers, code - middle, and what attention multiplies them by: fp32, or bf16 in pairs
// where the instruction set multiplies those. Both are exact. The order of codes is that of params/gear.h.
#pragma once

#include "cpu/simd.h"
#include "cpu/tile_registers.h"
#include "params/gear.h"

namespace {

using pyspec::kHalf;

// Tokens unpacked at a time: their numbers, of 2 bytes or 4, are 16 KiB for head_dim 128.
template <bool kPairs>
constexpr int64_t kPart = kPairs ? kHalf : kHalf / 2;

// What a tile holds for each vector of 32 codes: pairs of bf16, or the first of all pairs and then the
// second.
template <bool kPairs>
constexpr int64_t kVectorFloats = kPairs ? 16 : 32;

// Codes of vector first + i, first being a multiple of 16: the even (offset 0) or odd (16) of each lane's
// pair. high holds the third bits.
template <int kBits>
PYSPEC_INLINE I16 code(const uint8_t* codes, const uint8_t* high, int64_t first, int i, int offset) {
  constexpr int kLow = kBits == 3 ? 2 : kBits, kShare = 16 / kLow;
  I16 words = load_words(codes + (first + i) / kShare * 64);
  I16 field = bit_field(words, offset + kLow * (i % kShare), (1 << kLow) - 1);
  if constexpr (kBits == 3) {
    field = join_bits(field, bit_field(load_words(high + first / 16 * 64), offset + i, 1), 2);
  }
  return field;
}

// Writes the numbers of vector first + i.
template <int kBits, bool kPairs>
struct Numbers {
  static constexpr float kMiddle = ((1 << kBits) - 1) / 2.0f;
  PYSPEC_INLINE void operator()(const uint8_t* codes, const uint8_t* high, int64_t first, int i,
                                float* to) const {
    F16 even = sub(to_float(code<kBits>(codes, high, first, i, 0)), set1(kMiddle));
    F16 odd = sub(to_float(code<kBits>(codes, high, first, i, 16)), set1(kMiddle));
#if PYSPEC_HAS_BF16_DOT
    if constexpr (kPairs) return store(to, pair(even, odd));
#endif
    store(to, even);
    store(to + 16, odd);
  }
};

#if PYSPEC_HAS_AVX512
// Numbers looked up: the instruction reads only the low bits of an index.
template <int kBits>
struct LookedUp {
  __m512 table;
  LookedUp() {
    alignas(64) float numbers[16];
    for (int i = 0; i < 16; ++i)
      numbers[i] = static_cast<float>(i % (1 << kBits)) - Numbers<kBits, false>::kMiddle;
    table = _mm512_load_ps(numbers);
  }
  PYSPEC_INLINE void operator()(const uint8_t* codes, const uint8_t*, int64_t first, int i, float* to) const {
    constexpr int kShare = 16 / kBits;
    __m512i words = _mm512_loadu_si512(codes + (first + i) / kShare * 64);
    __m512i even = _mm512_srlv_epi32(words, _mm512_set1_epi32(kBits * (i % kShare)));
    __m512i odd = _mm512_srlv_epi32(words, _mm512_set1_epi32(kBits * (i % kShare) + 16));
    _mm512_store_ps(to, _mm512_permutexvar_ps(even, table));
    _mm512_store_ps(to + 16, _mm512_permutexvar_ps(odd, table));
  }
};
#endif

#if PYSPEC_HAS_BF16_DOT && PYSPEC_HAS_AVX512
template <int kBits>
struct LookedUpPairs {
  __m512i table;
  LookedUpPairs() {
    alignas(64) uint16_t numbers[32];
    for (int i = 0; i < 32; ++i) {
      float number = static_cast<float>(i % (1 << kBits)) - Numbers<kBits, true>::kMiddle;
      uint32_t bits;
      std::memcpy(&bits, &number, 4);
      numbers[i] = static_cast<uint16_t>(bits >> 16);  // exact: at most 8 bits
    }
    table = _mm512_load_si512(numbers);
  }
  PYSPEC_INLINE void operator()(const uint8_t* codes, const uint8_t* high, int64_t first, int i,
                                float* to) const {
    constexpr int kLow = kBits == 3 ? 2 : kBits, kShare = 16 / kLow;
    __m512i words = _mm512_loadu_si512(codes + (first + i) / kShare * 64);
    __m512i index = _mm512_srlv_epi16(words, _mm512_set1_epi16(kLow * (i % kShare)));
    if constexpr (kBits == 3) {
      __m512i top = _mm512_loadu_si512(high + first / 16 * 64);
      __m512i bit = _mm512_and_si512(_mm512_srlv_epi16(top, _mm512_set1_epi16(i)), _mm512_set1_epi16(1));
      index = _mm512_and_si512(index, _mm512_set1_epi16(3));
      index = _mm512_or_si512(index, _mm512_slli_epi16(bit, 2));
    }
    _mm512_store_si512(to, _mm512_permutexvar_epi16(index, table));
  }
};
#endif

// Vectors of codes to a tile: all (kTake -1), or of each four the first two (0) or the last two (1).
template <int kTake, bool kPairs, class Convert>
PYSPEC_INLINE void unpack_vectors(const Convert& convert, const uint8_t* codes, const uint8_t* high,
                                  int64_t vectors, float* tile) {
  for (int64_t first = 0; first < vectors; first += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      if (kTake >= 0 && i / 2 % 2 != kTake) continue;
      convert(codes, high, first, i, tile);
      tile += kVectorFloats<kPairs>;
    }
  }
}

// The numbers of kPart tokens of a half, of codes of kBits: keys as [pair of channels][16 tokens], values as
// [pair of tokens] [16 channels].
template <int kBits, bool kPairs>
PYSPEC_INLINE void unpack(const uint8_t* codes, int64_t d, bool values, int64_t part, float* tile) {
#if PYSPEC_HAS_BF16_DOT && PYSPEC_HAS_AVX512
  using Convert = std::conditional_t<!kPairs, LookedUp < kBits == 3 || kBits == 8 ? 2 : kBits>,
        LookedUpPairs < kBits >>
      ;
#elif PYSPEC_HAS_AVX512
  using Convert = LookedUp<kBits == 3 || kBits == 8 ? 2 : kBits>;
#else
  using Convert = Numbers<kBits, kPairs>;
#endif
  constexpr bool kIsLookedUp = kBits == 2 || kBits == 4 || (kPairs && kBits == 3);
  std::conditional_t<kIsLookedUp, Convert, Numbers<kBits, kPairs>> convert;
  const uint8_t* high = codes + kHalf * d * 2 / 8;
  constexpr int64_t kParts = kHalf / kPart<kPairs>;
  if (values) {
    int64_t vectors = 2 * d / kParts;
    codes += part * vectors * 4 * (kBits == 3 ? 2 : kBits), high += part * vectors * 4;
    unpack_vectors<-1, kPairs>(convert, codes, high, vectors, tile);
  } else if (kParts == 1) {
    unpack_vectors<-1, kPairs>(convert, codes, high, 2 * d, tile);
  } else if (part == 0) {
    unpack_vectors<0, kPairs>(convert, codes, high, 2 * d, tile);
  } else {
    unpack_vectors<1, kPairs>(convert, codes, high, 2 * d, tile);
  }
}

// The same for codes of 2, 3, 4 or 8 bits. Not inline: it is large, and the same for every type of queries.
template <bool kPairs>
__attribute__((noinline)) void unpack(int64_t bits, const uint8_t* codes, int64_t d, bool values,
                                      int64_t part, float* tile) {
  switch (bits) {
    case 2:
      return unpack<2, kPairs>(codes, d, values, part, tile);
    case 3:
      return unpack<3, kPairs>(codes, d, values, part, tile);
    case 4:
      return unpack<4, kPairs>(codes, d, values, part, tile);
    default:
      return unpack<8, kPairs>(codes, d, values, part, tile);
  }
}

// ==== products with numbers ====

// sums[r][v] += the two numbers of each lane times the row's two factors, which lie side by side.
template <bool kPairs, int kRows, int kVectors>
PYSPEC_INLINE void multiply(const float* tile, const char* factors, int64_t row_bytes,
                            F16 (&sums)[kRows][kVectors]) {
  constexpr int kParts = kPairs ? 1 : 2;
  for (int i = 0; i < kParts; ++i) {
    F16 numbers[kVectors];
    for (int v = 0; v < kVectors; ++v) numbers[v] = load(tile + v * kVectorFloats<kPairs> + 16 * i);
    for (int r = 0; r < kRows; ++r) {
      F16 factor = broadcast(factors + r * row_bytes + 4 * i);
      for (int v = 0; v < kVectors; ++v) {
#if PYSPEC_HAS_BF16_DOT
        if constexpr (kPairs) {
          sums[r][v] = pair_dot(numbers[v], factor, sums[r][v]);
          continue;
        }
#endif
        sums[r][v] = fma(numbers[v], factor, sums[r][v]);
      }
    }
  }
}

#if PYSPEC_HAS_AMX
constexpr int64_t kTiledRows = 16;  // that tiles take at most

// out[row][32] = numbers times factors, or (kContinued) goes on with it, for as many rows as tiles are
// divided for. A step is 16 pairs, which lie pair_floats apart in the tile of numbers.
template <bool kContinued>
PYSPEC_INLINE void multiply_in_tiles(const char* factors, int64_t factor_bytes, const float* numbers,
                                     int64_t pair_floats, int64_t steps, float* out, int64_t out_floats) {
  asm volatile("" ::: "memory");  // tile loads, to the compiler, read nothing that it may have to store
  if constexpr (kContinued) {
    _tile_loadd(0, out, out_floats * 4);
    _tile_loadd(1, out + 16, out_floats * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t i = 0; i < steps; ++i, factors += 64, numbers += 16 * pair_floats) {
    _tile_loadd(4, factors, factor_bytes);
    _tile_loadd(6, numbers, pair_floats * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, numbers + 16, pair_floats * 4);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, out, out_floats * 4);
  _tile_stored(1, out + 16, out_floats * 4);
}
#endif

template <bool kPairs>
PYSPEC_INLINE void store_factors(char* to, F16 values) {
#if PYSPEC_HAS_BF16_DOT
  if constexpr (kPairs) {
    return store_as(reinterpret_cast<BFloat16*>(to), values);
  }
#endif
  store(to, values);
}

}  // namespace
