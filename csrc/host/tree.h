// Layout of a draft tree: depths, ancestor bits and mask tiles from parents.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "tiles.h"

namespace pyspec {

inline int bit_words(int nodes) { return (nodes + 31) / 32; }

// Parents come before their children: throws where they do not.
inline void check_parents(const int32_t* parents, int nodes) {
  if (parents[0] != -1) {
    throw std::invalid_argument("parents[0] must be -1 (the root), got " + std::to_string(parents[0]));
  }
  for (int node = 1; node < nodes; ++node) {
    if (parents[node] < 0 || parents[node] >= node) {
      throw std::invalid_argument("parents[" + std::to_string(node) + "] must be in [0, " +
                                  std::to_string(node) + "), parents before children, got " +
                                  std::to_string(parents[node]));
    }
  }
}

// parents [nodes]; depths [nodes]; bits [nodes, bit_words(nodes)], zeroed: bit j of row i is set iff j is i
// or an ancestor of i. One pass, because parents come before their children.
inline void tree_layout(const int32_t* parents, int nodes, int32_t* depths, uint32_t* bits) {
  check_parents(parents, nodes);
  const int words = bit_words(nodes);
  for (int node = 0; node < nodes; ++node) {
    const int parent = parents[node];
    uint32_t* row = bits + static_cast<int64_t>(node) * words;
    depths[node] = node > 0 ? depths[parent] + 1 : 0;
    if (node > 0) {
      const uint32_t* above = bits + static_cast<int64_t>(parent) * words;
      for (int word = 0; word < words; ++word) row[word] = above[word];
    }
    row[node / 32] |= 1u << (node % 32);
  }
}

// The lists of a BlockMask (pyspec/masks/block_mask.py), filled one batch entry after another.
struct TreeTiles {
  std::vector<int32_t> full_ranges, full_tiles, partial_ranges, partial_tiles;
  std::vector<uint64_t> bits;

  // rows and keys are those of the mask, of which this tree may fill only a part; a block has 64 * words
  // rows.
  void add(const int32_t* parents, int nodes, int64_t prefix, int rows, int64_t keys, int words) {
    const int node_words = (nodes + 63) / 64, height = 64 * words;
    // One word more, of zeros: any 64 bits from node 0 on are read from two words.
    std::vector<uint64_t> ancestors(static_cast<size_t>(nodes) * (node_words + 1));
    auto row_of = [&](int node) { return ancestors.data() + static_cast<size_t>(node) * (node_words + 1); };
    for (int node = 0; node < nodes; ++node) {
      if (node > 0) {
        const uint64_t* above = row_of(parents[node]);
        for (int word = 0; word <= parents[node] / 64; ++word) row_of(node)[word] = above[word];
      }
      row_of(node)[node / 64] |= uint64_t{1} << node % 64;
    }
    // 64 keys from a tile's first one, of which `before` are of the prefix or, if negative, that many nodes
    // come first.
    auto seen = [&](int row, int64_t before) -> uint64_t {
      if (row >= nodes) return 0;
      if (before >= 64) return ~uint64_t{0};
      if (before > 0) return row_of(row)[0] << before | ((uint64_t{1} << before) - 1);
      const int64_t first = -before, word = first / 64, shift = first % 64;
      if (word >= node_words) return 0;
      return row_of(row)[word] >> shift | (shift ? row_of(row)[word + 1] << (64 - shift) : 0);
    };
    for (int first_row = 0; first_row < rows; first_row += height) {
      const int last_row = first_row + height < rows ? first_row + height - 1 : rows - 1;
      full_ranges.push_back(static_cast<int32_t>(full_tiles.size()));
      partial_ranges.push_back(static_cast<int32_t>(partial_tiles.size() / 2));
      const int64_t end = prefix + (last_row < nodes ? last_row + 1 : nodes);
      for (int64_t tile = 0; tile * 64 < end && first_row < nodes; ++tile) {
        const int64_t before = prefix - tile * 64;
        if (before >= 64 && last_row < nodes) {
          full_tiles.push_back(static_cast<int32_t>(tile));
          continue;
        }
        const size_t start = bits.size();
        bits.resize(start + height);
        uint64_t any = 0, all = ~uint64_t{0};
        for (int i = 0; i < height; ++i) {  // what comes after the last row is like it
          const int row = first_row + i < last_row ? first_row + i : last_row;
          bits[start + i] = seen(row, before);
          any |= bits[start + i];
          all &= bits[start + i];
        }
        if (any == 0 || all == ~uint64_t{0}) {
          bits.resize(start);
          if (any) full_tiles.push_back(static_cast<int32_t>(tile));
          continue;
        }
        for (int word = 0; word < words; ++word) transpose64(bits.data() + start + 64 * word);
        partial_tiles.push_back(static_cast<int32_t>(tile));
        partial_tiles.push_back(static_cast<int32_t>(start / height));
      }
      full_ranges.push_back(static_cast<int32_t>(full_tiles.size()));
      partial_ranges.push_back(static_cast<int32_t>(partial_tiles.size() / 2));
    }
  }
};

}  // namespace pyspec
