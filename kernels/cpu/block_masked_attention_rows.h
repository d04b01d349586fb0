// Rows and keys as the backward of block_masked_attention reads them: strips of 64 rows laid out twice, and
// tiles of 64 keys where they lie.
#pragma once

#include <new>

#include "cpu/strips.h"
#include "params/block_masked_attention.h"

namespace {

using pyspec::BlockMaskedAttentionBackwardParams;
using pyspec::ceil_div;
using pyspec::kMaxHeadDim;

constexpr int64_t kStrips = 8;
constexpr int64_t kBlockFloats = kTile * kLanes;  // 64 rows or keys of 16 lanes

// 64 rows of a head.
struct Strip {
  const int32_t *full, *full_end, *partial, *partial_end;  // of the mask's lists, what is still to come
  int64_t place, rows, word;                               // its first place in order, and word of bits
  float *q_lanes, *d_out_lanes;                            // [4][steps][16], lanes are rows
  float *q_rows,
      *d_out_rows;  // [head_dim / 16][64 rows, or pairs][16], lanes are channels; zeros if not finite
  float* dq;        // [4][head_dim][16], lanes are rows
  alignas(64) float lse[kTile], constant[kTile];  // lse in units of log2

  int64_t next_tile() const {
    int64_t tile = INT64_MAX;
    if (full < full_end) tile = *full;
    if (partial < partial_end && *partial < tile) tile = *partial;
    return tile;
  }
};

// Keys and values of a tile as panel() reads them: rows are keys, but channels of k_across, where what is not
// finite is 0.
struct Tile {
  PanelA k, v, k_across;
  int64_t place, count;
};

struct Scratch {
  Strip strips[kStrips];
  alignas(64) float laid_out[kStrips][5 * kTile * kMaxHeadDim];
  alignas(64) float k[kTile][kMaxHeadDim], v[kTile][kMaxHeadDim], k_across[kTile][kMaxHeadDim];  // staged
  alignas(64) float scores[4][kTile][kLanes];  // lanes are rows; then their gradients
  alignas(64) float d_weights[4][kTile][kLanes];
  alignas(64) float weights[kTile * kTile], d_scores[kTile * kTile];  // [key][row] as multiplied
  alignas(64) float pairs[4][kTile / 2][kLanes];                      // of gradients of scores, two keys each
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

// Compute is what multiplies: float, or BFloat16 in pairs.
template <class Storage, class Compute>
struct BackwardRows {
  static constexpr bool kPairs = std::is_same_v<Compute, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<Storage, Compute>;
  static constexpr int64_t kPer = kPairs ? 2 : 1;  // of what is multiplied, in a dword

  const BlockMaskedAttentionBackwardParams& p;
  int64_t d, steps, group, tiles;

  explicit BackwardRows(const BlockMaskedAttentionBackwardParams& params)
      : p(params),
        d(params.head_dim),
        steps(params.head_dim / kPer),
        group(params.heads / params.kv_heads),
        tiles(ceil_div(params.keys, kTile)) {}

  struct Item {
    int64_t b, kv_head, head, mask_b;
    float* sums;       // of its segment: [tiles, 2, kTile * d]
    uint8_t* visited;  // [tiles]
  };

  // ==== rows and keys where they lie ====

  int64_t row_at(const Item& item, int64_t place) const {
    return p.row_order ? p.row_order[item.mask_b * p.rows + place] : place;
  }
  int64_t slot_at(const Item& item, int64_t place) const {
    return p.key_order ? p.key_order[item.mask_b * p.keys + place] : place;
  }
  template <class T>
  static T* at(T* base, const int64_t* strides, int64_t b, int64_t head, int64_t row) {
    return base + b * strides[0] + head * strides[1] + row * strides[2];
  }
  const Storage* query_at(const Item& item, int64_t row) const {
    return at(static_cast<const Storage*>(p.q), p.q_strides, item.b, item.head, row);
  }
  const Storage* key_at(const Item& item, int64_t place) const {
    return at(static_cast<const Storage*>(p.k), p.k_strides, item.b, item.kv_head, slot_at(item, place));
  }
  const Storage* value_at(const Item& item, int64_t place) const {
    return at(static_cast<const Storage*>(p.v), p.v_strides, item.b, item.kv_head, slot_at(item, place));
  }

  void copy_row(const Storage* from, Compute* to) const {
    if constexpr (kDirect) {
      std::memcpy(static_cast<void*>(to), from, d * sizeof(Compute));
    } else {
      convert_row(from, to, d);
    }
  }

  // ==== strips ====

  // The strip with `word` of a block; false if it has no rows.
  bool open(Strip& strip, const Item& item, int64_t block, int64_t word, float* laid_out, Scratch& s) const {
    strip.place = (block * p.words + word) * kTile, strip.word = word;
    strip.rows = p.rows - strip.place < kTile ? p.rows - strip.place : kTile;
    if (strip.rows <= 0) return false;
    int64_t mask_head = p.mask_heads > 1 ? item.head : 0;
    int64_t lists = ((item.mask_b * p.mask_heads + mask_head) * p.blocks + block) * 2;
    strip.full = p.full_tiles + p.full_ranges[lists];
    strip.full_end = p.full_tiles + p.full_ranges[lists + 1];
    strip.partial = p.partial_tiles + 2 * p.partial_ranges[lists];
    strip.partial_end = p.partial_tiles + 2 * p.partial_ranges[lists + 1];
    float** parts[] = {&strip.dq, &strip.q_lanes, &strip.d_out_lanes, &strip.q_rows, &strip.d_out_rows};
    for (float** part : parts) *part = laid_out, laid_out += part == parts[0] ? kTile * d : kTile * steps;

    Compute *q = reinterpret_cast<Compute*>(s.k), *d_out = reinterpret_cast<Compute*>(s.v);
    for (int64_t i = 0; i < kTile; ++i) {
      if (i >= strip.rows) {
        std::memset(static_cast<void*>(q + i * d), 0, d * sizeof(Compute));
        std::memset(static_cast<void*>(d_out + i * d), 0, d * sizeof(Compute));
        strip.lse[i] = kInfinity, strip.constant[i] = 0.0f;
        continue;
      }
      int64_t row = row_at(item, strip.place + i), of_row = (item.b * p.heads + item.head) * p.rows + row;
      const Storage* gradient =
          at(static_cast<const Storage*>(p.d_out), p.d_out_strides, item.b, item.head, row);
      const Storage* out = at(static_cast<const Storage*>(p.out), p.out_strides, item.b, item.head, row);
      copy_row(query_at(item, row), q + i * d), copy_row(gradient, d_out + i * d);
      F16 products = set1(0.0f);
      for (int64_t c = 0; c < d; c += 16)
        products = fma(load_as_float(out + c), load_as_float(gradient + c), products);
      strip.constant[i] = sum(products) - (p.d_lse ? p.d_lse[of_row] : 0.0f);
      // of a row that sees nothing no weight is to be infinite
      strip.lse[i] = p.lse[of_row] == -kInfinity ? kInfinity : p.lse[of_row] * kLog2E;
      if (!is_row_finite(q + i * d, d) || !is_row_finite(d_out + i * d, d)) {
        strip.lse[i] = __builtin_nanf("");
        clear_not_finite(q + i * d, d), clear_not_finite(d_out + i * d, d);
      }
    }
    pack_lanes(q, d, strip.q_lanes), pack_lanes(d_out, d, strip.d_out_lanes);
    pack_rows(q, d, strip.q_rows), pack_rows(d_out, d, strip.d_out_rows);
    std::memset(strip.dq, 0, kTile * d * sizeof(float));
    return true;
  }

  void write_dq(const Strip& strip, const Item& item) const {
    for (int64_t first = 0; first < strip.rows; first += kLanes) {
      for (int64_t c = 0; c < d; c += kLanes) {
        F16 values[kLanes];
        for (int64_t i = 0; i < kLanes; ++i)
          values[i] = mul(load(strip.dq + first * d + (c + i) * kLanes), set1(p.scale));
        transpose(values);
        for (int64_t lane = 0; lane < kLanes && first + lane < strip.rows; ++lane) {
          int64_t row = row_at(item, strip.place + first + lane);
          store_as(at(static_cast<Storage*>(p.dq), p.dq_strides, item.b, item.head, row) + c, values[lane]);
        }
      }
    }
  }

  // ==== tiles ====

  bool is_one_run(const Item& item, int64_t place) const {
    if (!p.key_order) return true;
    for (int64_t i = 1; i < kTile; ++i)
      if (slot_at(item, place + i) != slot_at(item, place) + i) return false;
    return true;
  }

  Tile read_tile(const Item& item, int64_t index, Scratch& s) const {
    Tile tile{};
    tile.place = index * kTile, tile.count = p.keys - tile.place < kTile ? p.keys - tile.place : kTile;
    Compute *k = reinterpret_cast<Compute*>(s.k), *v = reinterpret_cast<Compute*>(s.v);
    if (kDirect && tile.count == kTile && is_one_run(item, tile.place)) {
      const int64_t size = sizeof(Storage);
      tile.k = {reinterpret_cast<const char*>(key_at(item, tile.place)), p.k_strides[2] * size, 4};
      tile.v = {reinterpret_cast<const char*>(value_at(item, tile.place)), p.v_strides[2] * size, 4};
    } else {
      for (int64_t i = 0; i < tile.count; ++i) {
        copy_row(key_at(item, tile.place + i), k + i * d);
        copy_row(value_at(item, tile.place + i), v + i * d);
      }
      const int64_t row = d * sizeof(Compute);
      tile.k = {reinterpret_cast<const char*>(k), row, 4};
      tile.v = {reinterpret_cast<const char*>(v), row, 4};
    }
    auto key = [&](int64_t i) { return reinterpret_cast<const Compute*>(tile.k.data + i * tile.k.row); };
    bool is_finite = true;
    for (int64_t i = 0; i < tile.count; ++i) is_finite = is_row_finite(key(i), d) && is_finite;

    // Zeros behind the last key, for the pair that it is in.
    PanelA finite = tile.k;
    if (!is_finite || (kPairs && tile.count % 2)) {
      Compute* copy = reinterpret_cast<Compute*>(s.k_across);
      std::memset(static_cast<void*>(copy), 0, kTile * d * sizeof(Compute));
      for (int64_t i = 0; i < tile.count; ++i) {
        std::memcpy(static_cast<void*>(copy + i * d), key(i), d * sizeof(Compute));
        clear_not_finite(copy + i * d, d);
      }
      finite = {reinterpret_cast<const char*>(copy), static_cast<int64_t>(d * sizeof(Compute)), 4};
    }
    tile.k_across = {finite.data, 4, finite.row};
#if PYSPEC_HAS_BF16_DOT
    if constexpr (kPairs) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(s.k_across) + kTile / 2 * kMaxHeadDim;
      interleave_pairs(finite.data, finite.row, ceil_div(tile.count, 2), d, pairs);
      tile.k_across = {reinterpret_cast<const char*>(pairs), 4, d * 4};
    }
#endif
    return tile;
  }
};

}  // namespace
