// The tile registers of AMX: how they are divided while a kernel uses them. Eight of them: 0 to 3 are sums,
// 16 words wide; 4 and 5 take the rows of the left operand, 6 and 7 the right one's, 16 words wide again.
// A thread is given back divided as it was: llama.cpp divides its threads' tiles once and counts on that for
// good.
#pragma once

#include "cpu/simd.h"

#if PYSPEC_HAS_AMX
namespace {

// As the intrinsics, but for one thing: those of gcc 12 tell the compiler of 8 of the 64 bytes, and it may
// leave out what was stored to the rest.
using TileDivision = uint8_t[64];
inline void load_division(const TileDivision& division) { asm volatile("ldtilecfg %0" ::"m"(division)); }
inline void store_division(TileDivision& division) { asm volatile("sttilecfg %0" : "=m"(division)); }

struct TileConfig {
  // For so many rows of sums, and so many bytes that a product sums over. Tiles 2, 3 and 5 may have other
  // rows.
  explicit TileConfig(int rows = 16, int bytes = 64, int others = 0) {
    others = others ? others : rows;
    store_division(before_);
    alignas(64) TileDivision config = {1};
    auto divide = [&](int tile, int tile_rows, int row_bytes) {
      config[16 + 2 * tile] = static_cast<uint8_t>(row_bytes);
      config[48 + tile] = static_cast<uint8_t>(tile_rows);
    };
    for (int tile = 0; tile < 4; ++tile) divide(tile, tile < 2 ? rows : others, 64);
    for (int tile = 4; tile < 6; ++tile) divide(tile, tile < 5 ? rows : others, bytes);
    for (int tile = 6; tile < 8; ++tile) divide(tile, bytes / 4, 64);
    load_division(config);
  }
  ~TileConfig() { load_division(before_); }
  TileConfig(const TileConfig&) = delete;

 private:
  alignas(64) TileDivision before_;
};

}  // namespace
#endif
