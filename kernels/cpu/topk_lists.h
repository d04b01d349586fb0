// Lists of topk's candidates, and how one is cut down to its k best.
//
// Keys are numbers as integers in the order of what is best. The k-th of n keys is found by halving the range
// of keys: counting is as fast as reading them. What is taken of a vector moves together by one instruction,
// or by a table of how lanes move.
#pragma once

#include <new>

#include "cpu/simd.h"

namespace {

constexpr int kVectors = 4;
constexpr int64_t kBlock = 16 * kVectors;
constexpr int32_t kInfinityBits = 0x7f800000, kHighest = 0x7fffffff;

// Integers ordered as numbers are, -0 as 0 and NaN as nan_key, from the bits of a float.
PYSPEC_INLINE int32_t order_key(int32_t bits, int32_t nan_key) {
  int32_t sign = bits >> 31, size = bits & kHighest;
  return size > kInfinityBits ? nan_key : (size ^ sign) - sign;
}

// Back; NaN becomes the infinity next to it.
PYSPEC_INLINE float number_of(int64_t key) {
  int64_t size = key < 0 ? -key : key;
  int32_t bits = size < kInfinityBits ? static_cast<int32_t>(size) : kInfinityBits;
  float number;
  std::memcpy(&number, &bits, 4);
  return key < 0 ? -number : number;
}

// Keys and indices of a part of a row. Both have room for kBlock more than they are said to.
struct List {
  int32_t* keys;
  int32_t* index;
  int64_t count;
};

// What belongs to the k best: keys above `above`, and those that equal it up to index `last`.
struct Cut {
  int32_t above, last;
  PYSPEC_INLINE bool takes(int32_t key, int32_t index) const {
    return key > above || (key == above && index <= last);
  }
};

int64_t count_above(const int32_t* keys, int64_t count, int32_t bound) {
  int32_t found = 0;
  for (int64_t i = 0; i < count; ++i) found += keys[i] > bound;
  return found;
}

// The cut that k of the count keys pass, or the k-th key and how many equal ones of it: above and equals.
void halve(const int32_t* keys, int64_t count, int64_t k, int32_t* above, int64_t* equals) {
  int32_t least = kHighest, most = -kHighest;
  for (int64_t i = 0; i < count; ++i) {
    least = keys[i] < least ? keys[i] : least;
    most = keys[i] > most ? keys[i] : most;
  }
  int64_t low = least, high = most;  // the k-th key is one of these or between
  while (low < high) {
    int64_t middle = low + (high - low) / 2, found = count_above(keys, count, static_cast<int32_t>(middle));
    if (found == k) {
      *above = static_cast<int32_t>(middle), *equals = 0;
      return;
    }
    (found > k ? low : high) = found > k ? middle + 1 : middle;
  }
  *above = static_cast<int32_t>(low), *equals = k - count_above(keys, count, *above);
}

// k < count. spare: room for as many integers.
Cut cut_of(const List& list, int64_t k, int32_t* spare) {
  Cut cut = {0, -1};
  int64_t equals, found = 0;
  halve(list.keys, list.count, k, &cut.above, &equals);
  if (equals == 0) return cut;
  for (int64_t i = 0; i < list.count; ++i) {
    spare[found] = -list.index[i];
    found += list.keys[i] == cut.above;
  }
  cut.last = kHighest;
  if (found == equals) return cut;
  int32_t above;
  halve(spare, found, equals, &above, &equals);  // indices differ, so at most one equals the bound
  cut.last = -above - (equals == 0);
  return cut;
}

#if PYSPEC_HAS_AVX512
PYSPEC_INLINE void append(List& list, uint32_t lanes, __m512i keys, __m512i index) {
  __mmask16 mask = static_cast<__mmask16>(lanes);
  _mm512_storeu_si512(list.keys + list.count, _mm512_maskz_compress_epi32(mask, keys));
  _mm512_storeu_si512(list.index + list.count, _mm512_maskz_compress_epi32(mask, index));
  list.count += __builtin_popcount(lanes);
}
#elif PYSPEC_HAS_X86_VECTORS
// For every set of 8 lanes: its lanes one after another, then any.
struct LaneOrders {
  uint8_t lanes[256][8];

  constexpr LaneOrders() : lanes() {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][count++] = static_cast<uint8_t>(lane);
    }
  }
};
constexpr LaneOrders kLaneOrders;

PYSPEC_INLINE void append(List& list, uint32_t lanes, __m256i keys, __m256i index) {
  __m256i order = _mm256_cvtepu8_epi32(_mm_loadu_si64(kLaneOrders.lanes[lanes]));
  __m256i* to_keys = reinterpret_cast<__m256i*>(list.keys + list.count);
  __m256i* to_index = reinterpret_cast<__m256i*>(list.index + list.count);
  _mm256_storeu_si256(to_keys, _mm256_permutevar8x32_epi32(keys, order));
  _mm256_storeu_si256(to_index, _mm256_permutevar8x32_epi32(index, order));
  list.count += __builtin_popcount(lanes);
}
#endif

// Leaves what passes the cut, in its order.
void keep(List& list, Cut cut) {
  List kept = {list.keys, list.index, 0};
#if PYSPEC_HAS_AVX512
  __m512i above = _mm512_set1_epi32(cut.above), last = _mm512_set1_epi32(cut.last);
  for (int64_t i = 0; i < list.count; i += 16) {
    __m512i keys = _mm512_loadu_si512(list.keys + i), index = _mm512_loadu_si512(list.index + i);
    uint32_t lanes = _mm512_cmpgt_epi32_mask(keys, above) |
                     (_mm512_cmpeq_epi32_mask(keys, above) & _mm512_cmple_epi32_mask(index, last));
    if (list.count - i < 16) lanes &= (1u << (list.count - i)) - 1;
    append(kept, lanes, keys, index);
  }
#elif PYSPEC_HAS_X86_VECTORS
  __m256i above = _mm256_set1_epi32(cut.above), last = _mm256_set1_epi32(cut.last);
  for (int64_t i = 0; i < list.count; i += 8) {
    __m256i keys = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(list.keys + i));
    __m256i index = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(list.index + i));
    __m256i equal = _mm256_andnot_si256(_mm256_cmpgt_epi32(index, last), _mm256_cmpeq_epi32(keys, above));
    __m256i taken = _mm256_or_si256(_mm256_cmpgt_epi32(keys, above), equal);
    uint32_t lanes = static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(taken)));
    if (list.count - i < 8) lanes &= (1u << (list.count - i)) - 1;
    append(kept, lanes, keys, index);
  }
#else
  for (int64_t i = 0; i < list.count; ++i) {
    int32_t key = list.keys[i], index = list.index[i];
    kept.keys[kept.count] = key, kept.index[kept.count] = index;
    kept.count += cut.takes(key, index);
  }
#endif
  list.count = kept.count;
}

// ==== memory of a thread ====

struct Scratch {
  char* data = nullptr;
  int64_t bytes = 0;

  char* of(int64_t wanted) {
    if (wanted > bytes) {
      delete[] data;
      data = nullptr, bytes = 0;
      data = new char[wanted];
      bytes = wanted;
    }
    return data;
  }
};

// Room for a list, as many integers beside it, and k items to sort.
struct Room {
  List list;
  int32_t* spare;
  uint64_t* items;
};

Room room_of(int64_t listed, int64_t k) {
  static thread_local Scratch* scratch = new Scratch();
  int64_t each = (listed + 2 * kBlock) / 16 * 16;
  int32_t* data = reinterpret_cast<int32_t*>(scratch->of(12 * each + 16 * k));
  return {{data, data + each, 0}, data + 2 * each, reinterpret_cast<uint64_t*>(data + 3 * each)};
}

}  // namespace
