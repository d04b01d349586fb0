// The backward of block_masked_attention on the CPU: five products for each tile that a mask has something
// in.
//
// Of 64 rows by 64 keys, with the forward's lse: scores and their weights p again, what the weights'
// gradients are, then those of the scores, ds = p (d_out . v - constant of the row). These add to dv (p,
// d_out), dk (ds, q) and dq (ds, k). All five go through panel.h. Queries and d_out are packed twice, rows as
// lanes for the first two products, channels as lanes for the sums over rows; keys and values are read where
// they lie.
//
// One item per (sequence, KV head, segment of row blocks). It takes some strips of 64 rows at a time, whose
// packed rows and dq stay in the second-level cache, and walks through the key tiles once for them all: dk
// and dv of a tile stay in the first. Segments add to sums of their own, which a second loop adds in order,
// so that no bit depends on threads. Bound by multiply-adds.
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
  alignas(64) float packed[kStrips][5 * kTile * kMaxHeadDim];
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
struct Kernel {
  static constexpr bool kPairs = std::is_same_v<Compute, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<Storage, Compute>;
  static constexpr int64_t kPer = kPairs ? 2 : 1;  // of what is multiplied, in a dword
  static constexpr int64_t kCut = 8;               // what panel() rounds keys up to

  const BlockMaskedAttentionBackwardParams& p;
  int64_t d, steps, group, tiles;

  explicit Kernel(const BlockMaskedAttentionBackwardParams& params)
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
  bool open(Strip& strip, const Item& item, int64_t block, int64_t word, float* packed, Scratch& s) const {
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
    for (float** part : parts) *part = packed, packed += part == parts[0] ? kTile * d : kTile * steps;

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

  // ==== a tile of a strip ====

  // What is computed of it: lanes of blocks [block, end), and keys [key, key + count) as the lanes see them.
  struct Part {
    int64_t block, end, key, count;
    const uint16_t* visible;  // bit i of [4 j + block]: lane i sees key j of the tile; null: all do
  };

  // Scores and gradients of weights to weights and gradients of scores, of 16 rows.
  PYSPEC_INLINE void weigh(const Strip& strip, const Part& part, int64_t block, Scratch& s) const {
    const F16 minus_lse = sub(set1(0.0f), load(strip.lse + block * kLanes));
    const F16 constant = load(strip.constant + block * kLanes);
    const F16 factor = set1(p.softcap > 0 ? p.softcap * kLog2E : p.scale * kLog2E);
    const F16 to_minus_2y = set1(p.softcap > 0 ? -2 * kLog2E * p.scale / p.softcap : 0.0f);
    float (*scores)[kLanes] = s.scores[block], (*d_weights)[kLanes] = s.d_weights[block];
    Compute* weights = reinterpret_cast<Compute*>(s.weights) + block * kLanes;
    Compute* d_scores = reinterpret_cast<Compute*>(s.d_scores) + block * kLanes;
    auto weigh_key = [&](int64_t j) PYSPEC_INLINE_LAMBDA {
      F16 score = load(scores[j]), slope = set1(1.0f);
      if (p.softcap > 0) {  // tanh(y) = 1 - 2 r with r = 1 / (1 + e^2y), and its slope 4 r (1 - r)
        F16 e = exp2(sub(set1(0.0f), max(set1(-126.0f), mul(score, to_minus_2y))));
        F16 r = div(set1(1.0f), add(set1(1.0f), e));
        score = sub(set1(1.0f), add(r, r));
        slope = mul(mul(set1(4.0f), r), sub(set1(1.0f), r));
      }
      F16 exponent = fma(score, factor, minus_lse);
      F16 weight = kPairs ? exp2(exponent, kExp2Short) : exp2(exponent);
      F16 d_score = mul(weight, sub(load(d_weights[j]), constant));
      if (p.softcap > 0) d_score = mul(d_score, slope);
      if (part.visible) {
        uint32_t visible = part.visible[4 * (part.key + j) + block];
        weight = select(visible, weight, set1(0.0f)), d_score = select(visible, d_score, set1(0.0f));
      }
      store_as(weights + j * kTile, weight), store_as(d_scores + j * kTile, d_score);
      if constexpr (!kPairs) store(scores[j], d_score);
      return d_score;
    };
    for (int64_t j = 0; j < part.count; j += 2) {
      F16 first = weigh_key(j), second = j + 1 < part.count ? weigh_key(j + 1) : set1(0.0f);
#if PYSPEC_HAS_BF16_DOT
      if constexpr (kPairs) store(s.pairs[block][j / 2], pair(first, second));
#endif
    }
  }

  // sums [d / 16][64 keys][16] += weights [key][row] . rows.
  void add_rows(const float* weights, const float* rows, const Part& part, float* sums) const {
    const F16 ones[2] = {set1(1.0f), set1(1.0f)};
    const char* data = reinterpret_cast<const char*>(weights) + part.block * kLanes * sizeof(Compute);
    const PanelA a{data, kTile * sizeof(Compute), 4};
    const int64_t count = (part.end - part.block) * kLanes / kPer, block = kBlockFloats / kPer;
    rows += part.block * kLanes / kPer * kLanes, sums += part.key * kLanes;
    int64_t c = 0, end = d / kLanes;
    for (; c + kPanelBlocks <= end; c += kPanelBlocks) {
      panel<kPairs, kPanelBlocks>(a, part.count, rows + c * block, block, count, sums + c * kBlockFloats,
                                  kBlockFloats, ones);
    }
    for (; c < end; ++c) {
      panel<kPairs, 1>(a, part.count, rows + c * block, block, count, sums + c * kBlockFloats, kBlockFloats,
                       ones);
    }
  }

  void add_part(Strip& strip, const Tile& tile, const Part& part, float* dk, float* dv, Scratch& s) const {
    const F16 ones[2] = {set1(1.0f), set1(1.0f)};
    const PanelA k{tile.k.data + part.key * tile.k.row, tile.k.row, 4};
    const PanelA v{tile.v.data + part.key * tile.v.row, tile.v.row, 4};
    for (int64_t block = part.block; block < part.end; block += kPanelBlocks) {
      panel<kPairs, kPanelBlocks>(k, part.count, strip.q_lanes + block * steps * kLanes, steps * kLanes,
                                  steps, s.scores[block][0], kBlockFloats, nullptr);
      panel<kPairs, kPanelBlocks>(v, part.count, strip.d_out_lanes + block * steps * kLanes, steps * kLanes,
                                  steps, s.d_weights[block][0], kBlockFloats, nullptr);
      for (int64_t i = block; i < block + kPanelBlocks; ++i) weigh(strip, part, i, s);
    }
    add_rows(s.weights, strip.d_out_rows, part, dv);
    add_rows(s.d_scores, strip.q_rows, part, dk);
    const PanelA across{tile.k_across.data + part.key / kPer * tile.k_across.step, 4, tile.k_across.step};
    const float* d_scores = kPairs ? s.pairs[0][0] : s.scores[0][0];
    for (int64_t block = part.block; block < part.end; block += kPanelBlocks) {
      panel<kPairs, kPanelBlocks>(across, d, d_scores + block * (kBlockFloats / kPer), kBlockFloats / kPer,
                                  ceil_div(part.count, kPer), strip.dq + block * d * kLanes, d * kLanes,
                                  ones);
    }
  }

  void add_partial(Strip& strip, const Tile& tile, const uint64_t* bits, float* dk, float* dv,
                   Scratch& s) const {
    // Of 32 rows, the keys from the first to the last that any of them sees.
    Part parts[2];
    const uint16_t* visible = reinterpret_cast<const uint16_t*>(bits);
    int64_t count = 0;
    for (int64_t block = 0; block * kLanes < strip.rows; block += 2) {
      uint64_t seen = 0;
      for (int64_t j = 0; j < tile.count; ++j)
        seen |= uint64_t{(visible[4 * j + block] | visible[4 * j + block + 1]) != 0} << j;
      if (!seen) continue;
      int64_t first = __builtin_ctzll(seen) / kCut * kCut,
              end = ceil_div(64 - __builtin_clzll(seen), kCut) * kCut;
      if (end > tile.count) end = tile.count;
      parts[count++] = {block, block + 2, first, end - first, visible};
    }
    if (count == 2 && parts[0].key == parts[1].key && parts[0].count == parts[1].count) {
      parts[0].end = parts[1].end, count = 1;
    }
    for (int64_t i = 0; i < count; ++i) add_part(strip, tile, parts[i], dk, dv, s);
  }

  // Some strips, through all tiles that any of them has something in.
  void run_strips(const Item& item, int64_t count, Scratch& s) const {
    for (;;) {
      int64_t index = INT64_MAX;
      for (int64_t i = 0; i < count; ++i) {
        int64_t next = s.strips[i].next_tile();
        if (next < index) index = next;
      }
      if (index == INT64_MAX) break;
      Tile tile = read_tile(item, index, s);
      float *dk = item.sums + index * 2 * kTile * d, *dv = dk + kTile * d;
      if (!item.visited[index]) std::memset(dk, 0, 2 * kTile * d * sizeof(float));
      item.visited[index] = 1;
      for (int64_t i = 0; i < count; ++i) {
        Strip& strip = s.strips[i];
        if (strip.full < strip.full_end && *strip.full == index) {
          ++strip.full;
          add_part(strip, tile, {0, ceil_div(strip.rows, 32) * 2, 0, tile.count, nullptr}, dk, dv, s);
        } else if (strip.partial < strip.partial_end && *strip.partial == index) {
          const uint64_t* bits = p.bits + (strip.partial[1] * p.words + strip.word) * kTile;
          strip.partial += 2;
          add_partial(strip, tile, bits, dk, dv, s);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) write_dq(s.strips[i], item);
  }

  // ==== the two loops ====

  void run_segment(int64_t index) const {
    Scratch& s = scratch();
    Item item{};
    item.sums = p.sums + index * tiles * 2 * kTile * d, item.visited = p.visited + index * tiles;
    std::memset(item.visited, 0, tiles);
    int64_t segment = index % p.segments;
    item.kv_head = index / p.segments % p.kv_heads, item.b = index / p.segments / p.kv_heads;
    item.mask_b = p.mask_batch > 1 ? item.b : 0;
    int64_t first = p.blocks * segment / p.segments, end = p.blocks * (segment + 1) / p.segments;
    for (int64_t i = 0; i < group; ++i) {
      item.head = item.kv_head * group + i;
      int64_t count = 0;
      for (int64_t block = first; block < end; ++block) {
        for (int64_t word = 0; word < p.words; ++word)
          count += open(s.strips[count], item, block, word, s.packed[count], s);
        if (block + 1 == end || count + p.words > kStrips) run_strips(item, count, s), count = 0;
      }
    }
  }

  // What all segments have added to a tile's keys.
  void write_tile(int64_t index) const {
    Item item{};
    int64_t tile = index % tiles, sequence_head = index / tiles;
    item.kv_head = sequence_head % p.kv_heads, item.b = sequence_head / p.kv_heads;
    item.mask_b = p.mask_batch > 1 ? item.b : 0;
    for (int64_t i = 0; i < kTile && tile * kTile + i < p.keys; ++i) {
      int64_t slot = slot_at(item, tile * kTile + i);
      Storage* dk = at(static_cast<Storage*>(p.dk), p.dk_strides, item.b, item.kv_head, slot);
      Storage* dv = at(static_cast<Storage*>(p.dv), p.dv_strides, item.b, item.kv_head, slot);
      for (int64_t c = 0; c < d; c += kLanes) {
        F16 of_k = set1(0.0f), of_v = set1(0.0f);
        for (int64_t segment = 0; segment < p.segments; ++segment) {
          int64_t part = (sequence_head * p.segments + segment) * tiles + tile;
          if (!p.visited[part]) continue;
          const float* sums = p.sums + part * 2 * kTile * d + c * kTile + i * kLanes;
          of_k = add(of_k, load(sums)), of_v = add(of_v, load(sums + kTile * d));
        }
        store_as(dk + c, mul(of_k, set1(p.scale))), store_as(dv + c, of_v);
      }
    }
  }

  void run() const {
    auto segment = [&](int64_t index) { run_segment(index); };
    auto tile = [&](int64_t index) { write_tile(index); };
    pyspec::parallel(p.parallel_for, p.batch * p.kv_heads * p.segments, segment);
    pyspec::parallel(p.parallel_for, p.batch * p.kv_heads * tiles, tile);
  }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_block_masked_attention_backward)(
    const BlockMaskedAttentionBackwardParams& p) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return Kernel<float, float>(p).run();
    case pyspec::Element::kFloat16:
      return Kernel<Float16, float>(p).run();
    case pyspec::Element::kBFloat16:
#if PYSPEC_HAS_BF16_DOT
      return Kernel<BFloat16, BFloat16>(p).run();
#endif
      return Kernel<BFloat16, float>(p).run();
  }
}
