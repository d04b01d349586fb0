// bf16 weights by the tile registers of AMX, for any number of rows. A panel is stored as a tile wants it,
// pairs of inputs of 16 outputs side by side, so nothing is converted: a step is 32 inputs of a panel, 2 KB,
// which two products of tiles multiply by up to 16 rows, four by up to 32, in the time that reading them from
// the second cache takes. Sums stay in tiles to the end. The instruction adds 16 products of first inputs of
// pairs and 16 of second ones, and their sum to a row's, whatever other rows there are: the row rule holds by
// construction.
#pragma once

#include <cstring>

#include "cpu/linear_blocks.h"
#include "cpu/tile_registers.h"

#if PYSPEC_HAS_AMX
namespace {

struct TiledPairs {
  static constexpr int64_t kInputs = 32, kStepBytes = kInputs * pyspec::kPanel * 2;
  static constexpr int64_t kRows = 32;  // of a pass at most

  // What a step multiplies: rows, the rows of the other tile, and weights.
  struct Step {
    const char *first, *second, *weights;
  };

  template <bool kTwo>
  PYSPEC_INLINE static void multiply_step(Step step, int64_t x_bytes) {
    _tile_loadd(4, step.first, x_bytes);
    _tile_loadd(6, step.weights, 4 * pyspec::kPanel);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, step.weights + 64, 4 * pyspec::kPanel);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, step.second, x_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  // Sums [rows of both tiles][kPanel] of a panel times rows of x. count: those of the first tile.
  template <bool kTwo>
  PYSPEC_INLINE static void multiply_rows(const char* panel, int64_t inputs, const char* x, int64_t x_bytes,
                                          int64_t count, float* sums) {
    asm volatile("" ::: "memory");  // tile loads, to the compiler, read nothing that it may have to store
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTwo) {
      _tile_zero(2);
      _tile_zero(3);
    }
    Step step = {x, x + count * x_bytes, panel};
    for (int64_t i = 0; i + kInputs <= inputs; i += kInputs) {
      for (int64_t line = 0; line < kStepBytes; line += 64)
        __builtin_prefetch(step.weights + kPrefetchBytes + line);
      multiply_step<kTwo>(step, x_bytes);
      step.first += 64, step.second += 64, step.weights += kStepBytes;
    }
    if (int64_t left = inputs % kInputs) {  // rows of x go on with zeros
      alignas(64) char weights[kStepBytes] = {};
      std::memcpy(weights, step.weights, (left + 1) / 2 * 4 * pyspec::kPanel);
      asm volatile("" ::: "memory");
      multiply_step<kTwo>({step.first, step.second, weights}, x_bytes);
    }
    constexpr int64_t row = 4 * pyspec::kPanel;
    _tile_stored(0, sums, row);
    _tile_stored(1, sums + 16, row);
    if constexpr (kTwo) {
      _tile_stored(2, sums + count * pyspec::kPanel, row);
      _tile_stored(3, sums + count * pyspec::kPanel + 16, row);
    }
    asm volatile("" ::: "memory");
  }

  // Sums [rows][kPanel] of a panel times prepared rows. With more than one pass the last begins early where
  // it would go beyond the rows: those of both have the same sums.
  static void multiply(const char* panel, int64_t inputs, const char* x, int64_t x_bytes, int64_t rows,
                       float* sums) {
    int64_t passes = (rows + kRows - 1) / kRows, size = (rows + passes - 1) / passes;
    int64_t first = size > kRows / 2 ? (size + 1) / 2 : size;
    TileConfig config(static_cast<int>(first), 64, static_cast<int>(size > first ? size - first : 1));
    for (int64_t row = 0; row < rows; row += size) {
      int64_t from = row + size < rows ? row : rows - size;
      const char* part = x + from * x_bytes;
      float* to = sums + from * pyspec::kPanel;
      if (size > first) {
        multiply_rows<true>(panel, inputs, part, x_bytes, first, to);
      } else {
        multiply_rows<false>(panel, inputs, part, x_bytes, first, to);
      }
    }
  }
};

}  // namespace
#endif
