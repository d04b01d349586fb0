// int8 weights by the tile registers of AMX: products of many rows. See linear.cpp for what is computed, and
// in which order.
#pragma once

#include "cpu/linear_blocks.h"
#include "cpu/linear_products.h"
#include "cpu/linear_tiles.h"

#if PYSPEC_HAS_AMX
namespace {

struct TiledBytes {
  static constexpr int64_t kLeastRows =
      10;  // of a Xeon of 2023, in the first cache; fewer are faster without
  static constexpr int64_t kBlockGroups = 4;  // whose sums stay in the first cache, beside those of rows
  static constexpr int64_t kGroupBytes = pyspec::kPanel * (2 + pyspec::kGroup);

  // Goes on with the sums [kRows][kPanel] of rows over the groups of a block. x: where the scales of the
  // block begin in the first row; its starts lie `starts` behind them. row: the first of them, in the tiles'
  // sums.
  template <int kRows>
  PYSPEC_INLINE static void add_groups(const TileSums* tiles, int64_t row, const char* block, int64_t groups,
                                       const char* x, int64_t starts, int64_t x_bytes, float* sums) {
    F16 sum[kRows][2];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) sum[r][v] = load(sums + r * pyspec::kPanel + 16 * v);
    }
    for (int64_t g = 0; g < groups; ++g, block += kGroupBytes, x += 4) {
      const Float16* scales = reinterpret_cast<const Float16*>(block);
      F16 scale[2], start[2];
      for (int v = 0; v < 2; ++v) {
        scale[v] = load_as_float(scales + 16 * v), start[v] = float_start(scale[v]);
      }
      for (int r = 0; r < kRows; ++r) {
        I16 begin = words_at(x + r * x_bytes + starts);
        F16 x_scale = broadcast(x + r * x_bytes);
        for (int v = 0; v < 2; ++v) {
          I16 dots = add(load_words(tiles[g].of[v][row + r]), begin);
          sum[r][v] = fma(times(dots, scale[v], start[v]), x_scale, sum[r][v]);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < 2; ++v) store(sums + r * pyspec::kPanel + 16 * v, sum[r][v]);
    }
  }

  // Adds a panel times prepared rows to sums [rows][kPanel].
  static void multiply(const char* panel, int64_t inputs, const char* x, int64_t x_bytes, int64_t rows,
                       float* sums) {
    TileConfig config(tiled_rows(rows), pyspec::kGroup);
    TileSums tiles[kBlockGroups];
    int64_t groups = pyspec::groups(inputs), size = tiled_rows(rows), passes = tiled_passes(rows);
    for (int64_t first = 0; first < groups; first += kBlockGroups, panel += kBlockGroups * kGroupBytes) {
      int64_t count = groups - first < kBlockGroups ? groups - first : kBlockGroups;
      const char* ahead = panel + count * kGroupBytes;
      for_tiled_rows(rows, [&](int64_t from, int64_t row) PYSPEC_INLINE_LAMBDA {
        for (int64_t i = 0; i < count * kGroupBytes / passes; i += 64) __builtin_prefetch(ahead + i);
        ahead += count * kGroupBytes / passes;
        const char* integers = x + from * x_bytes + groups * 8 + first * pyspec::kGroup;
        auto factors = [&](int64_t g) PYSPEC_INLINE_LAMBDA {
          return TileFactors{integers + g * pyspec::kGroup, panel + g * kGroupBytes + pyspec::kPanel * 2};
        };
        multiply_tiles<1, false>(count, x_bytes, factors, tiles);
        for_few_rows<4>(row, from + size, [&](auto few, int64_t r) PYSPEC_INLINE_LAMBDA {
          add_groups<decltype(few)::value>(tiles, r - from, panel, count, x + r * x_bytes + first * 4,
                                           groups * 4, x_bytes, sums + r * pyspec::kPanel);
        });
      });
    }
  }
};

}  // namespace
#endif
