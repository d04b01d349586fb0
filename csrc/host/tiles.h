// The tiles of a dense mask: pyspec/masks/tiles.py in one pass over the mask.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace pyspec {

// A matrix of bits transposed in place: bit j of word i becomes bit i of word j.
inline void transpose64(uint64_t* words) {
  uint64_t mask = 0x00000000ffffffffULL;
  for (int width = 32; width; width /= 2, mask ^= mask << width) {
    for (int i = 0; i < 64; i = (i + width + 1) & ~width) {
      const uint64_t swapped = (words[i] >> width ^ words[i + width]) & mask;
      words[i] ^= swapped << width;
      words[i + width] ^= swapped;
    }
  }
}

// Bit i is bool i.
inline uint64_t pack64(const uint8_t* bools) {
  uint64_t word = 0;
#ifdef __SSE2__
  for (int i = 0; i < 4; ++i) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bools + 16 * i));
    word |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_slli_epi16(some, 7))) << 16 * i;
  }
  return word;
#endif
  // The product collects eight bools in its highest byte.
  for (int i = 0; i < 8; ++i) {
    uint64_t eight;
    std::memcpy(&eight, bools + 8 * i, 8);
    word |= eight * 0x0102040810204080ULL >> 56 << 8 * i;
  }
  return word;
}

// States of tiles, and the bits of the partial ones, as pyspec/masks/tiles.py has them.
struct DenseTiles {
  static constexpr int32_t kFull = -1, kEmpty = -2;

  int64_t rows, keys;
  int words;  // a row block has 64 * words rows
  std::vector<int32_t> tile_map;
  std::vector<uint64_t> bits;

  int64_t height() const { return 64 * words; }
  int64_t blocks() const { return (rows + height() - 1) / height(); }
  int64_t columns() const { return (keys + 63) / 64; }

  // One matrix [rows, keys]. Rows are packed one after another, which reads memory in order; then the words
  // of each tile are looked at together.
  void add(const uint8_t* visible) {
    std::vector<uint64_t> packed(height() * columns()), any(columns()), all(columns());
    for (int64_t block = 0; block < blocks(); ++block) {
      std::fill(any.begin(), any.end(), 0);
      std::fill(all.begin(), all.end(), ~uint64_t{0});
      const int64_t first = block * height(), count = std::min(height(), rows - first);
      for (int64_t row = 0; row < count; ++row) {
        const uint8_t* bools = visible + (first + row) * keys;
        uint64_t* to = packed.data() + row * columns();
        for (int64_t column = 0; column < columns(); ++column) {
          to[column] = word_at(bools, column * 64);
          any[column] |= to[column];
          all[column] &= to[column];
        }
      }
      for (int64_t column = 0; column < columns(); ++column) {
        if (any[column] == 0 || all[column] == ~uint64_t{0}) {
          tile_map.push_back(any[column] ? kFull : kEmpty);
          continue;
        }
        const size_t start = bits.size();
        tile_map.push_back(static_cast<int32_t>(start / height()));
        bits.resize(start + height());
        for (int64_t row = 0; row < height(); ++row) {  // what comes after the last row is like it
          bits[start + row] = packed[std::min(row, count - 1) * columns() + column];
        }
        for (int word = 0; word < words; ++word) transpose64(bits.data() + start + 64 * word);
      }
    }
  }

 private:
  uint64_t word_at(const uint8_t* bools, int64_t key) const {
    if (key + 64 <= keys) return pack64(bools + key);
    uint8_t last[64] = {};  // what comes after the last key is not seen
    std::memcpy(last, bools + key, keys - key);
    return pack64(last);
  }
};

}  // namespace pyspec
