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

// The nodes of trees as rows of a BlockMask, one batch entry after another.
struct TreeTiles : BlockLists {
  // rows and keys are those of the mask, of which this tree may fill only a part.
  void add(const int32_t* parents, int nodes, int64_t prefix, int64_t rows) {
    const int node_words = (nodes + 63) / 64;
    // One word more, of zeros: any 64 bits from node 0 on are read from two words.
    std::vector<uint64_t> ancestors(static_cast<size_t>(nodes) * (node_words + 1));
    auto row_of = [&](int64_t node) {
      return ancestors.data() + static_cast<size_t>(node) * (node_words + 1);
    };
    for (int node = 0; node < nodes; ++node) {
      if (node > 0) {
        const uint64_t* above = row_of(parents[node]);
        for (int word = 0; word <= parents[node] / 64; ++word) row_of(node)[word] = above[word];
      }
      row_of(node)[node / 64] |= uint64_t{1} << node % 64;
    }
    // 64 keys from a tile's first one, of which `before` are of the prefix or, if negative, that many nodes
    // come first.
    auto seen = [&](int64_t row, int64_t before) -> uint64_t {
      if (row >= nodes) return 0;
      if (before >= 64) return ~uint64_t{0};
      if (before > 0) return row_of(row)[0] << before | ((uint64_t{1} << before) - 1);
      const int64_t first = -before, word = first / 64, shift = first % 64;
      if (word >= node_words) return 0;
      return row_of(row)[word] >> shift | (shift ? row_of(row)[word + 1] << (64 - shift) : 0);
    };
    for (int64_t first = 0; first < rows; first += height()) {
      const int64_t count = std::min(height(), rows - first),
                    end = prefix + std::min<int64_t>(first + count, nodes);
      begin_or_end_block();
      for (int64_t tile = 0; tile * 64 < end && first < nodes; ++tile) {
        const int64_t before = prefix - tile * 64;
        if (before >= 64 && first + count <= nodes) {
          add_full(tile);
        } else {
          BlockLists::add(tile, count, [&](int64_t i) { return seen(first + i, before); });
        }
      }
      begin_or_end_block();
    }
  }
};

}  // namespace pyspec
