// A piece of a prompt as the mask of block_masked_attention: what BlockMask.from_window(rows, prefix + rows,
// window=window) holds, without torch; or the like of windows that do not slide but begin at their multiples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "params/block_masked_attention.h"

namespace pyspec {

struct PromptTiles {
  std::vector<int32_t> full_ranges, full_tiles, partial_ranges, partial_tiles;
  std::vector<uint64_t> bits;

  // Rows stand at positions prefix, prefix + 1, ... and see the keys up to their own, of them only the last
  // `window` if that is not 0, or chunked those from the last multiple of it on.
  PromptTiles(int64_t rows, int64_t prefix, int64_t window, bool chunked) {
    for (int64_t row = 0; row < rows; row += kTile) {
      full_ranges.push_back(static_cast<int32_t>(full_tiles.size()));
      partial_ranges.push_back(static_cast<int32_t>(partial_tiles.size() / 2));
      const int64_t first = prefix + row, last = prefix + std::min(row + kTile, rows) - 1;
      const int64_t reach = window ? window : prefix + rows;
      auto first_seen = [&](int64_t at) {  // by the row there
        return chunked ? at / reach * reach : std::max(at - reach + 1, int64_t{0});
      };
      for (int64_t key = first_seen(first) / kTile * kTile; key <= last; key += kTile) {
        const auto tile = static_cast<int32_t>(key / kTile);
        if (key + kTile - 1 <= first && key >= first_seen(last)) {
          full_tiles.push_back(tile);
          continue;
        }
        partial_tiles.push_back(tile);
        partial_tiles.push_back(static_cast<int32_t>(bits.size() / kTile));
        for (int64_t j = 0; j < kTile; ++j) {
          // Seen by the rows at key + j and the reach - 1 after it, or those of its chunk.
          const int64_t begin = key + j, end = (chunked ? begin / reach * reach : begin) + reach;
          bits.push_back(from_row(begin - first) & ~from_row(end - first));
        }
      }
      full_ranges.push_back(static_cast<int32_t>(full_tiles.size()));
      partial_ranges.push_back(static_cast<int32_t>(partial_tiles.size() / 2));
    }
  }

  void put(BlockMaskedAttentionParams& p) const {
    p.full_ranges = full_ranges.data(), p.full_tiles = full_tiles.data();
    p.partial_ranges = partial_ranges.data(), p.partial_tiles = partial_tiles.data(), p.bits = bits.data();
    p.mask_batch = p.mask_heads = p.words = 1;
    p.blocks = static_cast<int64_t>(full_ranges.size() / 2);
  }

 private:
  static uint64_t from_row(int64_t row) {
    return row <= 0 ? ~uint64_t{0} : row >= kTile ? 0 : ~uint64_t{0} << row;
  }
};

// Whether every node's ancestors, by bits [nodes, words], are all nodes before it.
inline bool is_chain(const int32_t* ancestor_bits, int64_t nodes, int64_t words) {
  for (int64_t node = 0; node < nodes; ++node) {
    for (int64_t word = 0; word < words; ++word) {
      const int64_t count = std::clamp<int64_t>(node + 1 - 32 * word, 0, 32);
      const auto expected = static_cast<uint32_t>((uint64_t{1} << count) - 1);
      if (static_cast<uint32_t>(ancestor_bits[node * words + word]) != expected) return false;
    }
  }
  return true;
}

}  // namespace pyspec
