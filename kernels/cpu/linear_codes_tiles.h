// linear_codes by the tile registers of AMX: products of many rows.
//
// What a code counts in its block, scale times level, is an integer: one signed byte where there is no scale,
// and otherwise two, high << kShift | low. So a chunk is unpacked to one or two planes of bytes, scales and
// all, once for all rows, and tiles multiply a whole block: no sum leaves them before its end.
#pragma once

#include "cpu/linear_codes_rows.h"
#include "cpu/linear_tiles.h"

#if PYSPEC_HAS_AMX
namespace {

template <CodeFormat kFormat>
struct TiledCodes {
  using F = Format<kFormat>;
  static constexpr int64_t kBytes = F::kBlock < 64 ? F::kBlock : 64, kBlocks = kChunk / F::kBlock;
  static constexpr int64_t kPlanes = F::kShape.has_scales ? 2 : 1;
  // Scales without a sign have at most 6 bits. Three of them times a code of at most 5 fit a byte without
  // one, so that a product of 16 bits takes two codes at once; others are multiplied one by one.
  static constexpr bool kIsSigned = !F::kShape.has_minimums || !F::kShape.has_scales;
  static constexpr int kShift = kIsSigned ? 7 : 3;
  // Rows from which tiles were faster on a Xeon of 2023, in the first cache. Two bytes with a sign take long
  // to unpack, and bytes that are bytes already take longer than without; with a floor or a minimum for every
  // 32 inputs tiles lost, or gained nothing, at any number.
  static constexpr bool kHasTiles = F::kBlock > 32 || F::kShape.floors == Floors::kNone;
  static constexpr int64_t kLeastRows = (kPlanes > 1 && kIsSigned) || F::kShape.bits == 8 ? 24 : 9;
  using Plane = uint8_t[kChunk / 4][kPanel][4];

  // Bytes of 16 outputs and four inputs, from their codes and scales.
  PYSPEC_INLINE static void unpack(I16 codes, __m512i low_scale, __m512i high_scale, void* low, void* high) {
    if constexpr (kPlanes == 1) {
      store_words(low, {_mm512_add_epi8(codes.v, _mm512_set1_epi8(F::kShape.lowest))});
    } else if constexpr (!kIsSigned) {
      store_words(low, {_mm512_mullo_epi16(codes.v, low_scale)});
      store_words(high, {_mm512_mullo_epi16(codes.v, high_scale)});
    } else {
      __m512i levels = _mm512_add_epi8(codes.v, _mm512_set1_epi8(F::kShape.lowest));
      __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(levels, 8), 8), odd = _mm512_srai_epi16(levels, 8);
      even = _mm512_mullo_epi16(even, low_scale), odd = _mm512_mullo_epi16(odd, low_scale);
      const __mmask64 odds = 0xaaaaaaaaaaaaaaaaull;
      __m512i lows = _mm512_mask_blend_epi8(odds, even, _mm512_slli_epi16(odd, 8));
      store_words(low, {_mm512_and_si512(lows, _mm512_set1_epi8(127))});
      store_words(high,
                  {_mm512_mask_blend_epi8(odds, _mm512_srai_epi16(even, 7), _mm512_slli_epi16(odd, 1))});
    }
  }

  static void unpack(const char* panel, int64_t blocks, const Chunk<F>& chunk, Plane* planes) {
    constexpr int64_t kFours = F::kGroup / 4;
    for (int64_t group = 0; group < blocks * F::kGroups; ++group) {
      const char* block = panel + group / F::kGroups * pyspec::block_bytes(F::kShape);
      for (int64_t lane = 0; lane < kPanel; lane += 16) {
        __m512i low_scale = _mm512_setzero_si512(), high_scale = low_scale;
        if constexpr (kPlanes > 1) {
          low_scale = load_words(chunk.scales[group] + lane).v;
          low_scale = _mm512_mask_blend_epi16(0xaaaaaaaa, low_scale, _mm512_slli_epi32(low_scale, 16));
          if constexpr (!kIsSigned) {
            high_scale = _mm512_srli_epi16(low_scale, kShift);
            low_scale = _mm512_and_si512(low_scale, _mm512_set1_epi16((1 << kShift) - 1));
          }
        }
        PYSPEC_UNROLL
        for (int64_t i = 0; i < kFours; ++i) {
          unpack(codes_of<F>(block, lane, group % F::kGroups, i), low_scale, high_scale,
                 planes[0][group * kFours + i][lane], planes[kPlanes - 1][group * kFours + i][lane]);
        }
      }
    }
  }

  // Goes on with the sums [kRows][kPanel] of rows over the blocks of a chunk. x: of the first row; row: the
  // first of them, in the tiles' sums.
  template <int kRows>
  PYSPEC_INLINE static void add_blocks(const TileSums* tiles, int64_t row, const Chunk<F>& chunk,
                                       int64_t blocks, const Rows& x, float* sums) {
    F16 sum[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) sum[r][v] = load(sums + r * kPanel + 16 * v);
    }
    for (int64_t b = 0; b < blocks; ++b, tiles += kPlanes) {
      I16 totals[kRows][2], minimums[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        for (int v = 0; v < 2; ++v) {
          totals[r][v] = load_words(tiles[0].of[v][row + r]), minimums[r][v] = set1_words(0);
          if constexpr (kPlanes > 1) {
            I16 high = load_words(tiles[1].of[v][row + r]);
            totals[r][v] = add(totals[r][v], {_mm512_slli_epi32(high.v, kShift)});
          }
        }
      }
      if constexpr (F::kShape.has_minimums) add_minimums<F>(chunk, b, 0, x, minimums);
      add_block<F, F::kShape.has_minimums>(chunk, b, 0, x, totals, minimums, sum);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) store(sums + r * kPanel + 16 * v, sum[r][v]);
    }
  }

  // Adds a panel of blocks times rows to sums [rows][kPanel].
  static void multiply(const char* panel, int64_t blocks, Rows x, int64_t rows, float* sums) {
    TileConfig config(tiled_rows(rows), kBytes);
    Chunk<F> chunk;
    alignas(64) Plane planes[kPlanes];
    TileSums tiles[kBlocks * kPlanes];
    int64_t size = tiled_rows(rows);
    for (int64_t first = 0; first < blocks; first += kBlocks) {
      int64_t count = blocks - first < kBlocks ? blocks - first : kBlocks;
      unpack_factors<kFormat>(panel, count, chunk);
      unpack(panel, count, chunk, planes);
      for_tiled_rows(rows, [&](int64_t from, int64_t row) PYSPEC_INLINE_LAMBDA {
        auto factors = [&](int64_t i) PYSPEC_INLINE_LAMBDA {
          int64_t input = i / kPlanes * F::kBlock;
          return TileFactors{x.integers + from * x.stride + input,
                             reinterpret_cast<const char*>(planes[i % kPlanes][input / 4])};
        };
        multiply_tiles<F::kBlock / kBytes, kIsSigned>(count * kPlanes, x.stride, factors, tiles);
        for_few_rows<4>(row, from + size, [&](auto few, int64_t r) PYSPEC_INLINE_LAMBDA {
          Rows part = {x.scales + r * x.stride, x.sums + r * x.stride, x.integers, x.stride};
          add_blocks<decltype(few)::value>(tiles, r - from, chunk, count, part, sums + r * kPanel);
        });
      });
      panel += count * pyspec::block_bytes(F::kShape);
      x.scales += count * 4, x.sums += count * F::kGroups * 2, x.integers += count * F::kBlock;
    }
  }
};

}  // namespace
#endif
