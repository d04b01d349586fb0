// Records of gear as attention reads them: the codes of some tokens become a tile of numbers, with the
// outliers in their places; scales, middles and low rank become floats.
#pragma once

#include "cpu/gear_codes.h"
#include "cpu/quantised_rows.h"
#include "params/gear.h"

namespace {

using pyspec::GearAttentionParams;
using pyspec::GearSide;
using pyspec::kBlock;
using pyspec::kGearRows;
using pyspec::kMostOutliers;
using pyspec::kMostRank;

constexpr int64_t kLeastGroup = 32;

struct Scratch {
  alignas(64) float tile[kHalf / 2 * kMostHeadDim];
  alignas(64) float factors[kGearRows * kMostHeadDim];                   // queries or weights times scales
  alignas(64) float weights[kGearRows][kBlock];                          // scores, then weights
  alignas(64) float sums[kGearRows][16];                                 // of the weights, by lane
  alignas(64) float middles[kGearRows][kMostHeadDim / kLeastGroup][16];  // weights times middles, by lane
  alignas(64) float scale[kBlock / kLeastGroup * kMostHeadDim], middle[kBlock / kLeastGroup * kMostHeadDim];
  alignas(64) float a[kMostRank][kBlock], b[kMostRank][kMostHeadDim];
  alignas(64) float low[kGearRows][kMostRank];               // queries times b, or weights times a
  alignas(64) float outliers[kMostOutliers * kMostHeadDim];  // floats, or bf16
  alignas(64) int32_t key_places[kMostHeadDim], value_places[kBlock];
  alignas(64) int32_t places[kMostOutliers * kMostHeadDim];  // of outliers in a tile
  alignas(64) float bias[kGearRows];                         // queries times middles
  alignas(64) float gathered[kGearRows * kMostHeadDim];      // queries in the channels that keys have
  alignas(64) float before[kGearRows], now[kGearRows], alpha[kGearRows];
  bool visible[kGearRows];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

// Scores to weights, and what sums so far are multiplied by.
inline void weigh(Scratch& s, int64_t count, float score_factor) {
  F16 factor = set1(score_factor);
  for (int64_t r = 0; r < count; ++r) {
    F16 largest = set1(-kInfinity);
    for (int64_t i = 0; i < kBlock; i += 16) largest = max(load(s.weights[r] + i), largest);
    float in_block = highest(largest) * score_factor;
    s.now[r] = s.visible[r] && in_block > s.before[r] ? in_block : s.before[r];
  }
  for (int64_t r = 0; r < count; r += 16) {
    F16 now = load(s.now + r), safe = where_less(set1(-kInfinity), now, now, set1(0.0f));
    store(s.alpha + r, exp2(sub(load(s.before + r), safe)));
    store(s.before + r, now);
    store(s.now + r, safe);
  }
  for (int64_t r = 0; r < count; ++r) {
    if (!s.visible[r]) {
      std::memset(s.weights[r], 0, sizeof s.weights[r]);
      s.alpha[r] = 1.0f;
      continue;
    }
    F16 minus_safe = set1(-s.now[r]), total = mul(load(s.sums[r]), set1(s.alpha[r]));
    for (int64_t i = 0; i < kBlock; i += 16) {
      F16 weight = exp2(fma(load(s.weights[r] + i), factor, minus_safe));
      total = add(total, weight);
      store(s.weights[r] + i, weight);
    }
    store(s.sums[r], total);
  }
}

// What a record has, and its reading into a thread's scratch.
template <class Storage, bool kPairs>
struct GearRecords : PackedRows<Storage, GearAttentionParams> {
  using Rows = PackedRows<Storage, GearAttentionParams>;
  using Rows::d, Rows::p;
  static constexpr int64_t kTokens = kPart<kPairs>;

  GearSide keys, values;
  int64_t key_dim, group, width, rank, outliers;
  float middle_code;

  explicit GearRecords(const GearAttentionParams& params)
      : Rows(params),
        keys(params.format, params.head_dim, false),
        values(params.format, params.head_dim, true),
        key_dim(pyspec::gear_key_dim(params.format, params.head_dim)),
        group(params.format.group),
        width(params.format.group < d ? params.format.group : d),
        rank(params.format.rank),
        outliers(params.format.outliers),
        middle_code(static_cast<float>((1 << params.format.bits) - 1) / 2) {}

  void read_scales(Scratch& s, const uint8_t* side, const GearSide& at, int64_t count) const {
    const Float16* scale = reinterpret_cast<const Float16*>(side + at.scale);
    const Float16* zero = reinterpret_cast<const Float16*>(side + at.zero);
    for (int64_t i = 0; i < count; i += 16) {
      F16 step = load_as_float(scale + i);
      store(s.scale + i, step);
      store(s.middle + i, fma(step, set1(middle_code), load_as_float(zero + i)));
    }
  }

  void read_low_rank(Scratch& s, const uint8_t* side, bool is_values) const {
    const GearSide& at = is_values ? values : keys;
    int64_t dim = is_values ? d : key_dim;
    for (int64_t k = 0; k < rank; ++k) {
      float factor;
      std::memcpy(&factor, side + at.factor + 4 * k, 4);
      const int8_t* a = reinterpret_cast<const int8_t*>(side + at.a) + k * kBlock;
      const int8_t* b = reinterpret_cast<const int8_t*>(side + at.b) + k * dim;
      for (int64_t i = 0; i < kBlock; i += 16) store(s.a[k] + i, load_as_float(a + i));
      for (int64_t i = 0; i < dim; i += 16) store(s.b[k] + i, mul(set1(factor), load_as_float(b + i)));
    }
  }

  // The numbers of part `part` of the block, kTokens tokens, with the outliers in their places.
  void unpack_part(Scratch& s, const uint8_t* side, bool is_values, int64_t part) const {
    const GearSide& at = is_values ? values : keys;
    constexpr int64_t kParts = kHalf / kTokens;
    int64_t dim = is_values ? d : key_dim;
    const uint8_t* codes = side + at.codes + part / kParts * at.half_codes;
    unpack<kPairs>(p.format.bits, codes, dim, is_values, part % kParts, s.tile);
    if (outliers) is_values ? place_values(s, part) : place_keys(s, side + at.outlier_indices, part);
  }

  using Number = std::conditional_t<kPairs, uint16_t, float>;  // what a tile holds

  // Where in the tile of its part a vector of keys or values begins.
  void lay_out(Scratch& s) const {
    constexpr int64_t kSecond = kPairs ? 1 : 16;  // from the first number of a pair to the second
    for (int64_t c = 0; c < key_dim; ++c)
      s.key_places[c] = static_cast<int32_t>(c / 2 * (kTokens / 16 * 32) + c % 2 * kSecond);
    for (int64_t token = 0; token < kBlock; ++token)
      s.value_places[token] = static_cast<int32_t>(token % kTokens / 2 * (d / 16 * 32) + token % 2 * kSecond);
  }

  // Outliers as numbers, and their places.
  void read_outliers(Scratch& s, const uint8_t* side, bool is_values) const {
    const GearSide& at = is_values ? values : keys;
    int64_t vectors = is_values ? kBlock : key_dim;
    const BFloat16* outlier = reinterpret_cast<const BFloat16*>(side + at.outlier_values);
    const uint8_t* indices = side + at.outlier_indices;
    if constexpr (kPairs) {
      std::memcpy(s.outliers, outlier, 2 * outliers * vectors);
    } else {
      convert_row(outlier, s.outliers, outliers * vectors);
    }
    const int32_t* begin = is_values ? s.value_places : s.key_places;
    int32_t mask = is_values ? 255 : kTokens - 1, lane = kPairs ? 0 : 15;
    for (int64_t o = 0; o < outliers; ++o) {
      int32_t* places = s.places + o * vectors;
      for (int64_t i = 0; i < vectors; ++i) {
        int32_t along = indices[o * vectors + i] & mask;
        places[i] = begin[i] + 2 * along - (along & lane);
      }
    }
  }

  void place_keys(Scratch& s, const uint8_t* indices, int64_t part) const {
    const Number* numbers = reinterpret_cast<const Number*>(s.outliers);
    Number* tile = reinterpret_cast<Number*>(s.tile);
    constexpr uint8_t kOtherParts = static_cast<uint8_t>(~(kTokens - 1));
    for (int64_t begin = 0; begin < outliers * key_dim; begin += 64) {
      uint64_t here = 0;  // outliers whose token is in this part
      for (int64_t i = begin; i < outliers * key_dim && i < begin + 64; i += 16)
        here |= uint64_t{equal_bytes(indices + i, kOtherParts, static_cast<uint8_t>(part * kTokens))}
                << (i - begin);
      for (; here; here &= here - 1) {
        int64_t i = begin + __builtin_ctzll(here);
        tile[s.places[i]] = numbers[i];
      }
    }
  }

  void place_values(Scratch& s, int64_t part) const {
    const Number* numbers = reinterpret_cast<const Number*>(s.outliers);
    Number* tile = reinterpret_cast<Number*>(s.tile);
    for (int64_t o = 0; o < outliers; ++o) {
      for (int64_t i = o * kBlock + part * kTokens, end = i + kTokens; i < end; ++i)
        tile[s.places[i]] = numbers[i];
    }
  }

  // What a row sees of a block: nothing behind its last, and nothing older than its oldest token.
  void hide(Scratch& s, int64_t b, int64_t set, int64_t count, int64_t block) const {
    for (int64_t r = 0; r < count; ++r) {
      int64_t row = set * kGearRows + r, hidden = this->oldest(b, row) - block * kBlock;
      s.visible[r] = block < this->seen(b, row) && hidden < kBlock;
      for (int64_t token = 0; s.visible[r] && token < hidden; ++token) s.weights[r][token] = -kInfinity;
    }
  }
};

}  // namespace
