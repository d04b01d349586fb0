// Scores of keys that were coded before rotary embedding. A table of q . codeword would be another for every
// position, so the keys of a block are rebuilt, in the second-level cache at most, and turned:
//
//   q . turn(first + place) key = turn(-first) q . turn(place) key
//
// A query is turned back once for a block, by the block's first position; a key by its place in the block,
// with the same few cosines for all blocks. Tokens are the lanes: no row's sum depends on the rows beside it.
#pragma once

#include "cpu/panel.h"
#include "cpu/quantised_rows.h"
#include "params/residual_vq.h"

namespace {

// Cosines and sines of 16 places with tokens as lanes: [head_dim / 2][cosine, sine][16] from `rotary`.
PYSPEC_INLINE void lay_out_places(const float* rotary, int64_t d, int64_t tile, float* to) {
  for (int64_t c = 0; c < d; c += 16) {  // cosines, then sines
    F16 rows[16];
    for (int i = 0; i < 16; ++i) rows[i] = load(rotary + (tile * 16 + i) * d + c);
    transpose(rows);
    for (int i = 0; i < 16; ++i) store(to + (c + i) % (d / 2) * 32 + (c < d / 2 ? 0 : 16), rows[i]);
  }
}

// The keys of one block, and the queries that meet them.
struct TurnedBlock {
  static constexpr int64_t kMostRows = 16, kTiles = pyspec::kVqBlock / 16;

  alignas(64) float group[pyspec::kVqBlock * pyspec::kVqWidth];  // [token][32]
  alignas(64) float keys[pyspec::kVqBlock * kMostHeadDim];       // [16 tokens][channel][token]
  alignas(64) float queries[kMostRows][kMostHeadDim];
  alignas(64) float products[kPanelBlocks][kMostRows][16];

  // Adds the codewords of kCount levels to a group of channels; words are [level][code][32].
  template <int kCount, class Code>
  PYSPEC_INLINE void add_codewords(const Code* const (&code)[kCount], const float* words, int64_t codes) {
    for (int64_t token = 0; token < pyspec::kVqBlock; ++token) {
      for (int64_t c = 0; c < pyspec::kVqWidth; c += 16) {
        float* to = group + token * pyspec::kVqWidth + c;
        F16 sum = load(to);
        for (int i = 0; i < kCount; ++i)
          sum = add(sum, load(words + (i * codes + code[i][token]) * pyspec::kVqWidth + c));
        store(to, sum);
      }
    }
  }

  // Puts a group among the keys, turned by their places; it has channels which, which + groups, ...
  void turn_group(int64_t which, int64_t groups, int64_t d, const float* places) {
    for (int64_t tile = 0; tile < kTiles; ++tile) {
      F16 first[16], second[16];
      for (int i = 0; i < 16; ++i) {
        const float* key = group + (tile * 16 + i) * pyspec::kVqWidth;
        first[i] = load(key), second[i] = load(key + 16);
      }
      transpose(first), transpose(second);
      float* to = keys + tile * 16 * d;
      for (int64_t c = 0; c < 16; ++c) {
        int64_t channel = c * groups + which;
        const float* place = places + (tile * (d / 2) + channel) * 32;
        F16 cosine = load(place), sine = load(place + 16);
        store(to + channel * 16, sub(mul(first[c], cosine), mul(second[c], sine)));
        store(to + (channel + d / 2) * 16, fma(first[c], sine, mul(second[c], cosine)));
      }
    }
  }

  // Rows of queries turned back by the cosines and sines of the block's first position.
  void turn_queries(const float (*from)[kMostHeadDim], int64_t rows, int64_t d, const float* start) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < d / 2; c += 16) {
        F16 cosine = load(start + c), sine = load(start + d / 2 + c);
        F16 first = load(from[r] + c), second = load(from[r] + d / 2 + c);
        store(queries[r] + c, fma(first, cosine, mul(second, sine)));
        store(queries[r] + d / 2 + c, sub(mul(second, cosine), mul(first, sine)));
      }
    }
  }

  // The block's scores [token][row].
  template <int kRows>
  void multiply(int64_t d, float* scores) {
    PanelA rows{reinterpret_cast<const char*>(queries), sizeof queries[0], sizeof(float)};
    for (int64_t tile = 0; tile < kTiles; tile += kPanelBlocks) {
      panel<false, kPanelBlocks>(rows, kRows, keys + tile * 16 * d, 16 * d, d, products[0][0], kMostRows * 16,
                                 nullptr);
      for (int64_t token = 0; token < kPanelBlocks * 16; ++token)
        for (int r = 0; r < kRows; ++r)
          scores[(tile * 16 + token) * kRows + r] = products[token / 16][r][token % 16];
    }
  }
};

}  // namespace
