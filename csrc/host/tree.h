// Layout of a draft tree: depths and ancestor bits from parents.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pyspec {

inline int bit_words(int nodes) { return (nodes + 31) / 32; }

// parents [nodes]; depths [nodes]; bits [nodes, bit_words(nodes)], zeroed: bit j of row i is set iff j is i
// or an ancestor of i. One pass, because parents come before their children.
inline void tree_layout(const int32_t* parents, int nodes, int32_t* depths, uint32_t* bits) {
  if (parents[0] != -1) {
    throw std::invalid_argument("parents[0] must be -1 (the root), got " + std::to_string(parents[0]));
  }
  const int words = bit_words(nodes);
  for (int node = 0; node < nodes; ++node) {
    const int parent = parents[node];
    if (node > 0 && (parent < 0 || parent >= node)) {
      throw std::invalid_argument("parents[" + std::to_string(node) + "] must be in [0, " +
                                  std::to_string(node) + "), parents before children, got " +
                                  std::to_string(parent));
    }
    uint32_t* row = bits + static_cast<int64_t>(node) * words;
    depths[node] = node > 0 ? depths[parent] + 1 : 0;
    if (node > 0) {
      const uint32_t* above = bits + static_cast<int64_t>(parent) * words;
      for (int word = 0; word < words; ++word) row[word] = above[word];
    }
    row[node / 32] |= 1u << (node % 32);
  }
}

}  // namespace pyspec
