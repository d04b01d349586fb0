// The backward of block_masked_attention on the CPU: five products for each tile that a mask has something
// in.
//
// Of 64 rows by 64 keys, with the forward's lse: scores and their weights p again, what the weights'
// gradients are, then those of the scores, ds = p (d_out . v - constant of the row). These add to dv (p,
// d_out), dk (ds, q) and dq (ds, k). All five go through panel.h. Queries and d_out are laid out twice, rows
// as lanes for the first two products, channels as lanes for the sums over rows; keys and values are read
// where they lie.
//
// One item per (sequence, KV head, segment of row blocks). It takes some strips of 64 rows at a time, whose
// laid out rows and dq stay in the second-level cache, and walks through the key tiles once for them all: dk
// and dv of a tile stay in the first. Segments add to sums of their own, which a second loop adds in order,
// so that no bit depends on threads. Bound by multiply-adds.
#include "cpu/block_masked_attention_rows.h"

namespace {

template <class Storage, class Compute>
struct Kernel : BackwardRows<Storage, Compute> {
  using Rows = BackwardRows<Storage, Compute>;
  using Rows::Rows, Rows::p, Rows::d, Rows::steps, Rows::group, Rows::tiles, Rows::kPairs, Rows::kPer,
      Rows::at;
  using typename Rows::Item;
  static constexpr int64_t kCut = 8;  // what panel() rounds keys up to

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
      Tile tile = this->read_tile(item, index, s);
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
    for (int64_t i = 0; i < count; ++i) this->write_dq(s.strips[i], item);
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
          count += this->open(s.strips[count], item, block, word, s.laid_out[count], s);
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
      int64_t slot = this->slot_at(item, tile * kTile + i);
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
