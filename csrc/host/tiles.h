// Tiles of masks: of rows that see spans of keys, and, as in pyspec/masks/tiles.py, of a dense mask.
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

// The lists of a BlockMask (pyspec/masks/block_mask.py), filled row block by row block, tiles in order of
// keys.
struct BlockLists {
  int words;  // a row block has 64 * words rows
  std::vector<int32_t> full_ranges{}, full_tiles{}, partial_ranges{}, partial_tiles{};
  std::vector<uint64_t> bits{};

  int64_t height() const { return 64 * words; }
  void begin_or_end_block() {
    full_ranges.push_back(static_cast<int32_t>(full_tiles.size()));
    partial_ranges.push_back(static_cast<int32_t>(partial_tiles.size() / 2));
  }
  void add_full(int64_t tile) { full_tiles.push_back(static_cast<int32_t>(tile)); }

  // A tile of which row i sees the 64 keys seen(i), for i below count; the block's other rows are like the
  // last. Returns where its bits are, -1 if it is full or empty. They may be those at `like`, if not
  // negative.
  template <class Seen>
  int32_t add(int64_t tile, int64_t count, Seen seen, int32_t like = -1) {
    const size_t start = bits.size();
    bits.resize(start + height());
    uint64_t any = 0, all = ~uint64_t{0};
    for (int64_t i = 0; i < height(); ++i) {
      bits[start + i] = i < count ? seen(i) : bits[start + i - 1];
      any |= bits[start + i];
      all &= bits[start + i];
    }
    if (any == 0 || all == ~uint64_t{0}) {
      bits.resize(start);
      if (any) add_full(tile);
      return -1;
    }
    for (int word = 0; word < words; ++word) transpose64(bits.data() + start + 64 * word);
    auto index = static_cast<int32_t>(start / height());
    if (like >= 0 && std::equal(bits.begin() + start, bits.end(), bits.begin() + like * height())) {
      bits.resize(start);
      index = like;
    }
    partial_tiles.push_back(static_cast<int32_t>(tile));
    partial_tiles.push_back(index);
    return index;
  }
};

// Row i sees keys low[i], low[i] + step, ... below high[i].
struct Span {
  const int64_t *low, *high;
  int64_t step;
};

// What rows of which each sees a few spans of keys make of a mask.
inline BlockLists span_tiles(const std::vector<Span>& spans, int64_t rows, int64_t keys, int words) {
  BlockLists lists{words};
  const int64_t height = lists.height(), columns = (keys + 63) / 64;
  // Where the bits of the row block before are: patterns repeat along diagonals.
  std::vector<int32_t> before(columns, -1), here(columns);
  for (int64_t first = 0; first < rows; first += height) {
    const int64_t count = std::min(height, rows - first);
    struct Reach {
      int64_t low_first, low_last, high_first, high_last;
    };
    std::vector<Reach> reaches;
    for (const Span& span : spans) {
      Reach reach{keys, -1, keys, 0};
      for (int64_t row = first; row < first + count; ++row) {
        const int64_t low = std::max<int64_t>(span.low[row], 0), high = std::min(span.high[row], keys);
        reach.low_last = std::max(reach.low_last, low);
        reach.high_first = std::min(reach.high_first, high);
        if (low >= high) continue;
        reach.low_first = std::min(reach.low_first, low);
        reach.high_last = std::max(reach.high_last, high);
      }
      reaches.push_back(reach);
    }
    lists.begin_or_end_block();
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t begin = column * 64, end = begin + 64;
      bool is_empty = true, is_full = false;
      for (size_t i = 0; i < spans.size(); ++i) {
        is_empty &= reaches[i].high_last <= begin || reaches[i].low_first >= end;
        is_full |= spans[i].step == 1 && reaches[i].low_last <= begin && end <= reaches[i].high_first;
      }
      here[column] = -1;
      if (is_empty) continue;
      if (is_full) {
        lists.add_full(column);
        continue;
      }
      auto seen = [&](int64_t i) {
        uint64_t word = 0;
        for (const Span& span : spans) {
          const int64_t low = span.low[first + i], high = std::min({span.high[first + i], keys, end});
          int64_t key = std::max(low, begin);
          if (key >= high) continue;
          if (span.step == 1) {
            word |= ~uint64_t{0} >> (64 - (high - key)) << (key - begin);
            continue;
          }
          key += (span.step - (key - low) % span.step) % span.step;
          for (; key < high; key += span.step) word |= uint64_t{1} << (key - begin);
        }
        return word;
      };
      here[column] = lists.add(column, count, seen, column >= words ? before[column - words] : -1);
    }
    lists.begin_or_end_block();
    std::swap(before, here);
  }
  return lists;
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

  // One matrix [rows, keys]. Rows are joined, which reads memory in order; then the words
  // of each tile are looked at together.
  void add(const uint8_t* visible) {
    std::vector<uint64_t> joined(height() * columns()), any(columns()), all(columns());
    for (int64_t block = 0; block < blocks(); ++block) {
      std::fill(any.begin(), any.end(), 0);
      std::fill(all.begin(), all.end(), ~uint64_t{0});
      const int64_t first = block * height(), count = std::min(height(), rows - first);
      for (int64_t row = 0; row < count; ++row) {
        const uint8_t* bools = visible + (first + row) * keys;
        uint64_t* to = joined.data() + row * columns();
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
          bits[start + row] = joined[std::min(row, count - 1) * columns() + column];
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
