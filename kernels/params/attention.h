// What the attention ops share: the tile of keys, the order of tiles, the block of lanes, and the floats of
// both.
#pragma once

#include "params/common.h"

namespace pyspec {
namespace {  // compiled once per instruction set, so never shared between object files

constexpr int64_t kTile = 64;   // keys
constexpr int64_t kLanes = 16;  // query rows, worked on together
constexpr int64_t kMaxHeadDim = 512;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The row rule lives in these numbers: a key at position p is always in tile p / kTile, and tiles are
// folded in order within chunks, whose results are merged in order. A chunk is what one thread folds: the
// first ones are short, so that a short prefix is shared out too.
constexpr int64_t kChunkTiles = 16, kShortChunkTiles = 4, kShortChunks = 4;

inline int64_t first_tile(int64_t chunk) {
  return chunk < kShortChunks ? chunk * kShortChunkTiles
                              : kShortChunks * kShortChunkTiles + (chunk - kShortChunks) * kChunkTiles;
}
inline int64_t chunk_of(int64_t tile) {
  int64_t past_short = tile - kShortChunks * kShortChunkTiles;
  return past_short < 0 ? tile / kShortChunkTiles : kShortChunks + past_short / kChunkTiles;
}

// Online softmax of one block: largest score, sum of weights, weighted values, lanes innermost.
inline int64_t state_floats(int64_t head_dim) { return (head_dim + 2) * kLanes; }
inline int64_t query_floats(int64_t head_dim) { return head_dim * kLanes; }

}  // namespace
}  // namespace pyspec
