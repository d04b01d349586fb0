// Products of bytes for linear and linear_codes by the tile registers of AMX: up to 16 rows of x times the 32
// outputs of a panel, over the inputs that share a factor. The sums are integers, exactly those that products
// of four bytes give, so a row has the same bits whichever takes it.
//
// A product of tiles takes 16 cycles, and so does a store of 16 sums of 16 rows, which is the only way out of
// a tile. So one pair of sums is stored while the next is multiplied.
#pragma once

#include "cpu/tile_registers.h"
#include "params/linear.h"

#if PYSPEC_HAS_AMX
namespace {

constexpr int64_t kTiledRows = 16;  // of a pass at most

// Sums of both halves of a panel.
struct alignas(64) TileSums {
  int32_t of[2][kTiledRows][16];
};
// What tiles are multiplied: rows of signed bytes of x, and four inputs of 32 outputs after another.
struct TileFactors {
  const char *x, *bytes;
};

// The first pair of sums, or the second, of kSteps times the bytes that tiles are divided for.
template <bool kSecond, int kSteps, bool kIsSigned>
PYSPEC_INLINE void multiply_pair(TileFactors factors, int64_t x_bytes) {
#define PYSPEC_MULTIPLY(sum, left, right) \
  if constexpr (kIsSigned) {              \
    _tile_dpbssd(sum, left, right);       \
  } else {                                \
    _tile_dpbsud(sum, left, right);       \
  }
#define PYSPEC_MULTIPLY_STEP(first, second, left)                                      \
  _tile_loadd(left, factors.x + step * 64, x_bytes);                                   \
  _tile_loadd(6, factors.bytes + step * 64 * pyspec::kPanel, 4 * pyspec::kPanel);      \
  PYSPEC_MULTIPLY(first, left, 6)                                                      \
  _tile_loadd(7, factors.bytes + step * 64 * pyspec::kPanel + 64, 4 * pyspec::kPanel); \
  PYSPEC_MULTIPLY(second, left, 7)
  if constexpr (kSecond) {
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < kSteps; ++step) {
      PYSPEC_MULTIPLY_STEP(2, 3, 5)
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    for (int64_t step = 0; step < kSteps; ++step) {
      PYSPEC_MULTIPLY_STEP(0, 1, 4)
    }
  }
#undef PYSPEC_MULTIPLY
#undef PYSPEC_MULTIPLY_STEP
}

template <bool kSecond>
PYSPEC_INLINE void store_pair(TileSums& sums) {
  if constexpr (kSecond) {
    _tile_stored(2, sums.of[0], 64);
    _tile_stored(3, sums.of[1], 64);
  } else {
    _tile_stored(0, sums.of[0], 64);
    _tile_stored(1, sums.of[1], 64);
  }
}

// sums[i] = the products of factors(i), for i below count.
template <int kSteps, bool kIsSigned, class Factors>
PYSPEC_INLINE void multiply_tiles(int64_t count, int64_t x_bytes, const Factors& factors, TileSums* sums) {
  asm volatile("" ::: "memory");  // tile loads, to the compiler, read nothing that it may have to store
  for (int64_t i = 0; i < count; i += 2) {
    multiply_pair<false, kSteps, kIsSigned>(factors(i), x_bytes);
    if (i > 0) store_pair<true>(sums[i - 1]);
    if (i + 1 < count) multiply_pair<true, kSteps, kIsSigned>(factors(i + 1), x_bytes);
    store_pair<false>(sums[i]);
  }
  if (count % 2 == 0) store_pair<true>(sums[count - 1]);
}

// Rows are taken in passes of equal size, for which tiles are divided.
inline int64_t tiled_passes(int64_t rows) { return (rows + kTiledRows - 1) / kTiledRows; }
inline int64_t tiled_rows(int64_t rows) { return (rows + tiled_passes(rows) - 1) / tiled_passes(rows); }

// Calls pass(first row that the tiles take, first row that is new) for each: the last begins early where it
// would go beyond the rows.
template <class Pass>
PYSPEC_INLINE void for_tiled_rows(int64_t rows, const Pass& pass) {
  int64_t size = tiled_rows(rows);
  for (int64_t row = 0; row < rows; row += size) pass(row + size < rows ? row : rows - size, row);
}

// Calls add(how many, as a constant; the first) for rows first to last - 1, kMost at a time.
template <int kMost, class Add>
PYSPEC_INLINE void for_few_rows(int64_t first, int64_t last, const Add& add) {
  for (; first + kMost <= last; first += kMost) add(std::integral_constant<int, kMost>(), first);
  if constexpr (kMost > 1) for_few_rows<kMost / 2>(first, last, add);
}

}  // namespace
#endif
