// panel: C[m][lane] = C[m][lane] * alpha[lane] + sum over steps of A[m][step] . B[step][lane].
//
// The one matrix product that attention on the CPU needs, twice: scores (m = key, step = channel) and values
// (m = channel, step = key). Query rows are the lanes, so keys and values are read where they lie, one
// broadcast at a time, and no lane's sum depends on how many lanes there are: the row rule holds by
// construction. A step is one fp32, or a pair of bf16 where the instruction set multiplies pairs.
//
// Registers: rows x blocks sums, the blocks' lanes and one broadcast. With 32 registers of 16 lanes, 8 x 2
// sums. With 16 of 8 lanes, 6 rows of two: 12 sums are more than the 8 to 10 products that two multipliers
// have on the way, 2 + 1 registers are left for lanes and broadcast, and 8 loads feed 12 products. Tails of 2
// rows would wait for their sums, so 7 and 8 rows are two fours. Of 8 lanes alone there are 12 rows.
#pragma once

#include "cpu/matrix_neon.h"
#include "cpu/simd.h"
#include "cpu/tile_registers.h"

namespace {

// A in memory: byte strides between rows m and between steps.
struct PanelA {
  const char* data;
  int64_t row, step;
};

}  // namespace

#include "cpu/panel_neon.h"

namespace {

#if PYSPEC_HAS_AVX512
constexpr int kPanelRows = 8, kPanelBlocks = 2;
#elif PYSPEC_HAS_X86_VECTORS
constexpr int kPanelRows = 6, kPanelBlocks = 1;
#elif PYSPEC_HAS_NEON
constexpr int kPanelRows = 4, kPanelBlocks = 1;
#else
constexpr int kPanelRows = 2, kPanelBlocks = 1;
#endif

template <bool kPairs>
PYSPEC_INLINE F16 dot_step(F16 a, F16 b, F16 c) {
#if PYSPEC_HAS_BF16_DOT
  if constexpr (kPairs) return pair_dot(a, b, c);
#endif
  return fma(a, b, c);
}

// kRows rows of C.
template <bool kPairs, int kRows, int kBlocks>
PYSPEC_INLINE void panel_rows(PanelA a, const float* b, int64_t b_block, int64_t steps, float* c,
                              int64_t c_block, const F16* alpha) {
#if PYSPEC_HAS_MATRIX
  if constexpr (kPairs) return matrix_panel_rows<kRows>(a.data, a.row, a.step, b, steps, c, alpha);
#endif
  F16 sum[kRows][kBlocks];
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kBlocks; ++j)
      sum[m][j] = alpha ? mul(load(c + j * c_block + m * 16), alpha[j]) : set1(0.0f);
  for (int64_t i = 0; i < steps; ++i) {
    F16 lanes[kBlocks];
    for (int j = 0; j < kBlocks; ++j) lanes[j] = load(b + j * b_block + i * 16);
    for (int m = 0; m < kRows; ++m) {
      F16 value = broadcast(a.data + m * a.row + i * a.step);
      for (int j = 0; j < kBlocks; ++j) sum[m][j] = dot_step<kPairs>(value, lanes[j], sum[m][j]);
    }
  }
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kBlocks; ++j) store(c + j * c_block + m * 16, sum[m][j]);
}

struct Nothing {
  void operator()() const {}
};

// rows is rounded up to kPanelRows, or to 4 where those are 6: C and A must reach that far. alpha null starts
// C at zero. between is called after every few rows.
template <bool kPairs, int kBlocks, class Between = Nothing>
PYSPEC_INLINE void panel(PanelA a, int64_t rows, const float* b, int64_t b_block, int64_t steps, float* c,
                         int64_t c_block, const F16* alpha, const Between& between = {}) {
  auto take = [&](auto count) PYSPEC_INLINE_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    panel_rows<kPairs, kRows, kBlocks>(a, b, b_block, steps, c, c_block, alpha);
    a.data += kRows * a.row, c += kRows * 16, rows -= kRows;
    between();
  };
  while (rows > 0) {
    if (kPanelRows == 6 && (rows < 5 || rows == 7 || rows == 8)) {
      take(std::integral_constant<int, 4>());
    } else {
      take(std::integral_constant<int, kPanelRows>());
    }
  }
}

#if PYSPEC_HAS_X86_VECTORS && !PYSPEC_HAS_AVX512
#define PYSPEC_HAS_PART_PANELS 1
template <int kRows>
PYSPEC_INLINE void half_panel_rows(PanelA a, const float* b, int64_t steps, float* c, const float* alpha) {
  __m256 sum[kRows];
  for (int m = 0; m < kRows; ++m)
    sum[m] = alpha ? _mm256_mul_ps(_mm256_loadu_ps(c + m * 16), _mm256_loadu_ps(alpha)) : _mm256_setzero_ps();
  for (int64_t i = 0; i < steps; ++i) {
    __m256 lanes = _mm256_loadu_ps(b + i * 16);
    for (int m = 0; m < kRows; ++m) {
      const char* value = a.data + m * a.row + i * a.step;
      sum[m] = _mm256_fmadd_ps(_mm256_broadcast_ss(reinterpret_cast<const float*>(value)), lanes, sum[m]);
    }
  }
  for (int m = 0; m < kRows; ++m) _mm256_storeu_ps(c + m * 16, sum[m]);
}

// The same as panel() for the 8 lanes at b, c and alpha alone, of steps of one fp32: half of the work where
// few rows are lanes. rows is rounded up to 4.
template <bool kPairs, int kWidth, class Between>
PYSPEC_INLINE void part_panel(PanelA a, int64_t rows, const float* b, int64_t steps, float* c,
                              const float* alpha, const Between& between) {
  static_assert(!kPairs && kWidth == 8);
  auto take = [&](auto count) PYSPEC_INLINE_LAMBDA {
    constexpr int kRows = decltype(count)::value;
    half_panel_rows<kRows>(a, b, steps, c, alpha);
    a.data += kRows * a.row, c += kRows * 16, rows -= kRows;
    between();
  };
  while (rows > 0) {
    if (rows >= 12 && rows != 16) {
      take(std::integral_constant<int, 12>());
    } else if (rows > 4) {
      take(std::integral_constant<int, 8>());
    } else {
      take(std::integral_constant<int, 4>());
    }
  }
}
#endif

#if PYSPEC_HAS_AMX
// The same product by tiles of 16 x 16 sums and 16 pairs a step.
//
// C (zeroed, or continued) is 16 * kTilesA rows by kBlocks blocks; steps counts groups of 16 pairs.
template <int kTilesA, int kBlocks>
PYSPEC_INLINE void tile_panel(PanelA a, const float* b, int64_t b_block, int64_t steps, float* c,
                              int64_t c_block, bool continued) {
#define PYSPEC_EACH_C(do)                      \
  do (0, 0, 0);                                \
  if constexpr (kBlocks > 1) do                \
      (1, 0, 1);                               \
  if constexpr (kTilesA > 1) do                \
      (2, 1, 0);                               \
  if constexpr (kTilesA > 1 && kBlocks > 1) do \
    (3, 1, 1)
#define PYSPEC_LOAD_C(tile, m, j) _tile_loadd(tile, c + j * c_block + m * 256, 64)
#define PYSPEC_ZERO_C(tile, m, j) _tile_zero(tile)
#define PYSPEC_STORE_C(tile, m, j) _tile_stored(tile, c + j * c_block + m * 256, 64)
  if (continued) {
    PYSPEC_EACH_C(PYSPEC_LOAD_C);
  } else {
    PYSPEC_EACH_C(PYSPEC_ZERO_C);
  }
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, a.data + i * 64, a.row);
    _tile_loadd(6, b + i * 256, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kBlocks > 1) {
      _tile_loadd(7, b + b_block + i * 256, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTilesA > 1) {
      _tile_loadd(5, a.data + 16 * a.row + i * 64, a.row);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kBlocks > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  PYSPEC_EACH_C(PYSPEC_STORE_C);
#undef PYSPEC_EACH_C
#undef PYSPEC_LOAD_C
#undef PYSPEC_ZERO_C
#undef PYSPEC_STORE_C
}

// rows is rounded up to 16.
template <int kBlocks>
PYSPEC_INLINE void tile_panel_rows(PanelA a, int64_t rows, const float* b, int64_t b_block, int64_t steps,
                                   float* c, int64_t c_block, bool continued) {
  int64_t first = 0;
  for (; first + 16 < rows; first += 32) {
    tile_panel<2, kBlocks>({a.data + first * a.row, a.row, 4}, b, b_block, steps, c + first * 16, c_block,
                           continued);
  }
  if (first < rows) {
    tile_panel<1, kBlocks>({a.data + first * a.row, a.row, 4}, b, b_block, steps, c + first * 16, c_block,
                           continued);
  }
}
#endif

#if PYSPEC_HAS_BF16_DOT
// Rows of keys, two at a time, woven into pairs: out[pair][d] = (row 2 * pair, row 2 * pair + 1)[d].
PYSPEC_INLINE void interleave_pairs(const char* rows, int64_t row_bytes, int64_t pairs, int64_t d,
                                    uint32_t* out) {
  for (int64_t i = 0; i < pairs; ++i) {
    const char *first = rows + 2 * i * row_bytes, *second = first + row_bytes;
    for (int64_t c = 0; c < d; c += 16) {
#if PYSPEC_HAS_NEON
      for (int64_t part = c; part < c + 16; part += 4) {
        uint16x4_t low = vld1_u16(reinterpret_cast<const uint16_t*>(first) + part);
        uint16x4_t high = vld1_u16(reinterpret_cast<const uint16_t*>(second) + part);
        vst1q_u32(out + i * d + part,
                  vreinterpretq_u32_u16(vcombine_u16(vzip1_u16(low, high), vzip2_u16(low, high))));
      }
#else
      __m512i low =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first + 2 * c)));
      __m512i high =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(second + 2 * c)));
      _mm512_storeu_si512(out + i * d + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#endif
    }
  }
}
#endif

#if PYSPEC_HAS_AMX
// The pairs of interleave_pairs with channels as rows: out[d][pair], 32 pairs a row. d is a multiple of 32
// and pairs of 16.
PYSPEC_INLINE void transpose_pairs(const char* rows, int64_t row_bytes, int64_t pairs, int64_t d,
                                   uint32_t* out) {
  for (int64_t p = 0; p < pairs; p += 16) {
    for (int64_t c = 0; c < d; c += 32) {
      // Within 128 bits, unpacklo takes channels 0..3 of 8 and unpackhi channels 4..7.
      for (int half = 0; half < 2; ++half) {
        __m512i woven[16];
        for (int i = 0; i < 16; ++i) {
          const char* first = rows + 2 * (p + i) * row_bytes + 2 * c;
          __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(first + row_bytes);
          woven[i] = half ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
        }
        transpose16(woven);
        for (int i = 0; i < 16; ++i) {
          int64_t channel = c + i / 4 * 8 + i % 4 + 4 * half;
          _mm512_storeu_si512(out + channel * 32 + p, woven[i]);
        }
      }
    }
  }
}
#endif

}  // namespace
