// Tiles of linear on Arm: up to 8 rows times vectors of four outputs, their sums in 16 of 32 registers.
//
// Weights are streamed, once for all rows of a tile; x comes four words of a row at a time, and products take
// one of them out of its register, so that nothing is spread over lanes. What bounds a tile of many rows is
// its products: of four numbers of fp32 an instruction, of 8 by BFDOT, of 16 by SDOT, and twice as many by
// the matrix instructions BFMMLA and USMMLA, which multiply two rows with the weights of two lanes, woven out
// of two vectors. BFMMLA adds its first pair of products and then its second, rounding as BFDOT does twice,
// and sums of integers are exact: a row has the bits that it has alone.
#pragma once

#include "cpu/linear_blocks.h"
#include "cpu/linear_rows.h"

#if PYSPEC_HAS_NEON

namespace {

// Vectors of four outputs, of a panel's 8, beside so many rows: with `most` sums, which one row fills by half
// at least, so that no product waits for the one before it.
constexpr int tile_vectors(int rows, int most) {
  int vectors = 8;
  while (rows * vectors > most) vectors /= 2;
  return vectors;
}

// ==== sums, fp32 [rows][kPanel] ====

template <int kRows, int kVectors>
PYSPEC_INLINE void load_sums(const float* sums, float32x4_t (&sum)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vld1q_f32(sums + r * pyspec::kPanel + 4 * v);
}
template <int kRows, int kVectors>
PYSPEC_INLINE void store_sums(const float32x4_t (&sum)[kRows][kVectors], float* sums) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) vst1q_f32(sums + r * pyspec::kPanel + 4 * v, sum[r][v]);
}

// ==== fp32 and fp16, and bf16 without products of its own ====

// One input of the four that x has of each row.
template <int kInput, int kRows, int kVectors>
PYSPEC_INLINE void add_input(const float32x4_t (&weights)[kVectors], const float32x4_t (&x)[kRows],
                             float32x4_t (&sum)[kRows][kVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = vfmaq_laneq_f32(sum[r][v], weights[v], x[r], kInput);
}

PYSPEC_INLINE float32x4_t four_floats(const float* p) { return vld1q_f32(p); }

template <class Storage>
struct FloatTile {
  static constexpr int kSums = 16, kStreamRows = 2, kPassRows = 8;

  template <int kInput, int kRows, int kVectors>
  PYSPEC_INLINE static void add(const Storage* w, const float32x4_t (&x)[kRows],
                                float32x4_t (&sum)[kRows][kVectors]) {
    float32x4_t weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = four_floats(w + 4 * v);
    // One row has a load a product: loaded before the first is multiplied, two come by one instruction.
    if constexpr (kRows == 1) {
      for (int v = 0; v < kVectors; v += 2) asm("" : "+w"(weights[v]), "+w"(weights[v + 1]));
    }
    add_input<kInput>(weights, x, sum);
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, float* sums) {
    const Storage* w = reinterpret_cast<const Storage*>(block) + lane;
    float32x4_t sum[kRows][kVectors], values[kRows];
    load_sums(sums, sum);
    ahead.step *= 4;
    int64_t i = range.first;
    for (; i + 4 <= range.last; i += 4, w += 4 * pyspec::kPanel) {
      ahead.prefetch<kVectors* static_cast<int>(sizeof(Storage)) / 4>();
      for (int r = 0; r < kRows; ++r) {
        values[r] = vld1q_f32(reinterpret_cast<const float*>(x + r * x_bytes) + i);
      }
      add<0>(w, values, sum), add<1>(w + pyspec::kPanel, values, sum);
      add<2>(w + 2 * pyspec::kPanel, values, sum), add<3>(w + 3 * pyspec::kPanel, values, sum);
    }
    for (; i < range.last; ++i, w += pyspec::kPanel) {
      for (int r = 0; r < kRows; ++r) {
        values[r] = vld1q_dup_f32(reinterpret_cast<const float*>(x + r * x_bytes) + i);
      }
      add<0>(w, values, sum);
    }
    store_sums(sum, sums);
  }
};

#if !PYSPEC_HAS_BF16_DOT
struct BFloat16Tile {
  static constexpr int kSums = 16, kStreamRows = 2, kPassRows = 8;

  // Two inputs, the first of them kInput of x.
  template <int kInput, int kRows, int kVectors>
  PYSPEC_INLINE static void add(const uint32_t* w, const float32x4_t (&x)[kRows],
                                float32x4_t (&sum)[kRows][kVectors]) {
    float32x4_t even[kVectors], odd[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      uint32x4_t pairs = vld1q_u32(w + 4 * v);
      even[v] = vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16));
      odd[v] = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u)));
    }
    add_input<kInput>(even, x, sum), add_input<kInput + 1>(odd, x, sum);
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, float* sums) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(block) + lane;
    float32x4_t sum[kRows][kVectors], values[kRows];
    load_sums(sums, sum);
    ahead.step *= 2;
    int64_t i = range.first;
    for (; i + 4 <= range.last; i += 4, w += 2 * pyspec::kPanel) {
      ahead.prefetch<(kVectors + 1) / 2>();
      for (int r = 0; r < kRows; ++r) {
        values[r] = vld1q_f32(reinterpret_cast<const float*>(x + r * x_bytes) + i);
      }
      add<0>(w, values, sum), add<2>(w + pyspec::kPanel, values, sum);
    }
    for (; i < range.last; i += 2, w += pyspec::kPanel) {
      for (int r = 0; r < kRows; ++r) {
        float32x2_t two = vld1_f32(reinterpret_cast<const float*>(x + r * x_bytes) + i);
        values[r] = vcombine_f32(two, two);
      }
      add<0>(w, values, sum);
    }
    store_sums(sum, sums);
  }
};

#else

// ==== bf16, pairs of products ====

PYSPEC_INLINE bfloat16x8_t eight_bfloats(const char* p) {
  return vreinterpretq_bf16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(p)));
}

// Row r of the tile, in pairs of rows, of which the last may be one row twice.
template <int kRows>
constexpr int row_of(int pair, int second) {
  return 2 * pair + second < kRows ? 2 * pair + second : kRows - 1;
}

struct BFloat16Tile {
  static constexpr int kSums = 16, kStreamRows = 2, kPassRows = 8;
  static constexpr int64_t kStepBytes = pyspec::kPanel * 4;

  // One pair of the four that x has of each row.
  template <int kPair, int kRows, int kVectors>
  PYSPEC_INLINE static void add(const char* w, const bfloat16x8_t (&x)[kRows],
                                float32x4_t (&sum)[kRows][kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      bfloat16x8_t weights = eight_bfloats(w + 16 * v);
      for (int r = 0; r < kRows; ++r) sum[r][v] = vbfdotq_laneq_f32(sum[r][v], weights, x[r], kPair);
    }
  }

  // Goes on from range.first with what does not fill the registers of x.
  template <int kRows, int kVectors>
  PYSPEC_INLINE static void add_rest(const char* w, const char* x, int64_t x_bytes, Range range,
                                     float32x4_t (&sum)[kRows][kVectors]) {
    for (int64_t i = range.first; i < range.last; i += 2, w += kStepBytes) {
      bfloat16x8_t values[kRows];
      for (int r = 0; r < kRows; ++r) {
        const float* pair = reinterpret_cast<const float*>(x + r * x_bytes + i * 2);
        values[r] = vreinterpretq_bf16_f32(vld1q_dup_f32(pair));
      }
      add<0>(w, values, sum);
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, float* sums) {
    const char* w = block + lane * 4;
    float32x4_t sum[kRows][kVectors];
    load_sums(sums, sum);
    ahead.step *= 4;
    int64_t i = range.first;
    if constexpr (kRows <= 2) {
      for (; i + 8 <= range.last; i += 8, w += 4 * kStepBytes) {
        ahead.prefetch<kVectors>();
        bfloat16x8_t values[kRows];
        for (int r = 0; r < kRows; ++r) values[r] = eight_bfloats(x + r * x_bytes + i * 2);
        add<0>(w, values, sum), add<1>(w + kStepBytes, values, sum);
        add<2>(w + 2 * kStepBytes, values, sum), add<3>(w + 3 * kStepBytes, values, sum);
      }
    } else {
      constexpr int kPairs = (kRows + 1) / 2;
      float32x4_t woven[kPairs][2 * kVectors];  // sums [lane][row], of two each
      for (int p = 0; p < kPairs; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          float32x4_t first = sum[2 * p][v], second = sum[row_of<kRows>(p, 1)][v];
          woven[p][2 * v] = vzip1q_f32(first, second), woven[p][2 * v + 1] = vzip2q_f32(first, second);
        }
      }
      for (; i + 8 <= range.last; i += 8, w += 4 * kStepBytes) {
        ahead.prefetch<kVectors>();
        add_pairs<0, kRows>(w, x + i * 2, x_bytes, woven);
        add_pairs<1, kRows>(w + 2 * kStepBytes, x + i * 2, x_bytes, woven);
      }
      for (int p = 0; p < kPairs; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          sum[row_of<kRows>(p, 1)][v] = vuzp2q_f32(woven[p][2 * v], woven[p][2 * v + 1]);
          sum[2 * p][v] = vuzp1q_f32(woven[p][2 * v], woven[p][2 * v + 1]);
        }
      }
    }
    add_rest(w, x, x_bytes, {i, range.last, range.inputs}, sum);
    store_sums(sum, sums);
  }

  // Four inputs, of the first or the second half of eight.
  template <int kHalf, int kRows, int kPairs, int kLanes>
  PYSPEC_INLINE static void add_pairs(const char* w, const char* x, int64_t x_bytes,
                                      float32x4_t (&sum)[kPairs][kLanes]) {
    bfloat16x8_t lanes[kLanes];  // [lane][input], of two and four
    for (int v = 0; v < kLanes / 2; ++v) {
      uint32x4_t first = vld1q_u32(reinterpret_cast<const uint32_t*>(w) + 4 * v);
      uint32x4_t second = vld1q_u32(reinterpret_cast<const uint32_t*>(w + kStepBytes) + 4 * v);
      lanes[2 * v] = vreinterpretq_bf16_u32(vzip1q_u32(first, second));
      lanes[2 * v + 1] = vreinterpretq_bf16_u32(vzip2q_u32(first, second));
    }
    for (int p = 0; p < kPairs; ++p) {
      uint64x2_t first = vld1q_u64(reinterpret_cast<const uint64_t*>(x + 2 * p * x_bytes));
      uint64x2_t second = vld1q_u64(reinterpret_cast<const uint64_t*>(x + row_of<kRows>(p, 1) * x_bytes));
      uint64x2_t rows = kHalf ? vzip2q_u64(first, second) : vzip1q_u64(first, second);
      for (int i = 0; i < kLanes; ++i) {
        sum[p][i] = vbfmmlaq_f32(sum[p][i], lanes[i], vreinterpretq_bf16_u64(rows));
      }
    }
  }
};
#endif

// ==== the loops ====

// The rows of a pass and all lanes of a block; asks for a share, ahead_bytes, of what comes after it.
template <class Tile, int kMost>
PYSPEC_INLINE void add_tiles(int64_t rows, const char* block, const char* x, int64_t x_bytes, Range range,
                             Ahead ahead, int64_t ahead_bytes, float* sums) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      return add_tiles<Tile, kMost - 1>(rows, block, x, x_bytes, range, ahead, ahead_bytes, sums);
    }
  }
  constexpr int kVectors = tile_vectors(kMost, Tile::kSums);
  ahead.step = ahead.step * kVectors / 8;
  for (int64_t lane = 0; lane < pyspec::kPanel; lane += 4 * kVectors) {
    Tile::template multiply<kMost, kVectors>(block, lane, x, x_bytes, range, ahead, sums + lane);
    ahead.next += ahead_bytes * kVectors / 8;
  }
}

// A panel times up to kTileRows rows: few as one stream, more in passes over blocks that stay in the first
// cache, of which each asks for its share of the next block.
template <class Weight>
void multiply_tile(const pyspec::LinearParams& p, const char* panel, int64_t first_row, int64_t rows,
                   int64_t first_output) {
  using Tile = typename Weight::Tile;
  constexpr int64_t kInputs = 128;  // of a block
  alignas(64) float sums[kTileRows * pyspec::kPanel];
  std::memset(sums, 0, rows * pyspec::kPanel * sizeof(float));
  int64_t x_bytes = pyspec::prepared_row_bytes(p);
  const char* x = static_cast<const char*>(p.workspace) + first_row * x_bytes;
  if (rows <= Tile::kStreamRows) {
    Ahead ahead = {panel + kPrefetchBytes, Weight::kStepBytes};
    add_tiles<Tile, Tile::kStreamRows>(rows, panel, x, x_bytes, {0, p.inputs, p.inputs}, ahead, 0, sums);
    return store_rows(sums, p, first_row, rows, first_output);
  }
  int64_t passes = (rows + Tile::kPassRows - 1) / Tile::kPassRows;
  for (int64_t first = 0; first < p.inputs; first += kInputs) {
    Range range = {first, first + kInputs < p.inputs ? first + kInputs : p.inputs, p.inputs};
    const char *block = panel + Weight::offset(first), *end = panel + Weight::offset(range.last);
    int64_t share = (end - block) / passes;
    for (int64_t pass = 0; pass < passes; ++pass) {
      int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
      Ahead ahead = {end + pass * share, Weight::kStepBytes / passes};
      add_tiles<Tile, Tile::kPassRows>(count, block, x + row * x_bytes, x_bytes, range, ahead, share,
                                       sums + row * pyspec::kPanel);
    }
  }
  store_rows(sums, p, first_row, rows, first_output);
}

}  // namespace
#endif
