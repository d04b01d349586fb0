// The tile registers of AMX: how they are divided while a kernel uses them. Eight of them: 0 to 3 are sums,
// 16 words wide; 4 and 5 take the rows of the left operand, 6 and 7 the right one's, 16 words wide again.
#pragma once

#include "cpu/simd.h"

#if PYSPEC_HAS_AMX
namespace {

struct TileConfig {
  // For so many rows of sums, and so many bytes that a product sums over.
  explicit TileConfig(int rows = 16, int bytes = 64) {
    alignas(64) uint8_t config[64] = {1};
    auto divide = [&](int tile, int tile_rows, int row_bytes) {
      config[16 + 2 * tile] = static_cast<uint8_t>(row_bytes);
      config[48 + tile] = static_cast<uint8_t>(tile_rows);
    };
    for (int tile = 0; tile < 4; ++tile) divide(tile, rows, 64);
    for (int tile = 4; tile < 6; ++tile) divide(tile, rows, bytes);
    for (int tile = 6; tile < 8; ++tile) divide(tile, bytes / 4, 64);
    _tile_loadconfig(config);
  }
  ~TileConfig() { _tile_release(); }
};

}  // namespace
#endif
