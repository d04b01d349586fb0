// tree_attention on the CPU: flash attention with query rows as vector lanes.
//
// Two phases. Prefix: one item per (sequence, KV head, chunk of key tiles) folds the tiles that the prefix
// fills into the online-softmax state of every row; keys and values are streamed once, all rows of the group
// share them. Tail: one item per (sequence, KV head, 16 rows) merges the chunks in order, then for each node
// gathers the rest of the prefix and the node's ancestors by depth, so that a row sees the tiles of plain
// decoding, bit for bit. Few rows are bound by reading K and V; many rows by multiply-adds (AMX: by exp2).
#include "params/tree_attention.h"

#include <new>

#include "cpu/panel.h"

namespace {

using pyspec::chunk_of;
using pyspec::first_tile;
using pyspec::kLanes;
using pyspec::kTile;
using pyspec::LaneLayout;
using pyspec::TreeAttentionParams;

constexpr int64_t kMaxHeadDim = 256;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// Online softmax of 16 rows. Scores are in units of log2, so that exp2 serves.
struct State {
  float *max, *sum, *values;  // [16], [16], [head_dim][16]

  State(float* data) : max(data), sum(data + kLanes), values(data + 2 * kLanes) {}

  void clear(int64_t head_dim) {
    store(max, set1(-kInfinity));
    for (int64_t i = 0; i <= head_dim; ++i) store(sum + i * kLanes, set1(0.0f));
  }
  void copy(const State& other, int64_t head_dim) {
    std::memcpy(max, other.max, pyspec::state_floats(head_dim) * sizeof(float));
  }
  // The keys of this, then those of other; result may be this.
  void merge(const State& other, int64_t head_dim, State result) const {
    F16 mine = load(max), theirs = load(other.max), largest = ::max(mine, theirs);
    F16 safe = where_less(set1(-kInfinity), largest, largest, set1(0.0f));
    F16 weight = exp2(sub(mine, safe)), other_weight = exp2(sub(theirs, safe));
    store(result.max, largest);
    for (int64_t i = 0; i <= head_dim; ++i) {
      F16 scaled = mul(load(sum + i * kLanes), weight);
      store(result.sum + i * kLanes, fma(load(other.sum + i * kLanes), other_weight, scaled));
    }
  }
};

// A tile's keys and values in the form that panel() reads. count <= 64 keys are real.
struct Tile {
  PanelA k, v;
  int64_t count;
};

struct Scratch {
  alignas(64) float scores[2][kTile][kLanes];
  alignas(64) float weights[2][kTile][kLanes];  // fp32, or bf16 pairs in the first 32 rows
  alignas(64) float k[kTile][kMaxHeadDim];      // staged rows, fp32 or bf16
  alignas(64) float v[kTile][kMaxHeadDim];
  alignas(64) uint32_t v_pairs[kTile / 2 * kMaxHeadDim];
  alignas(64) float states[3][(kMaxHeadDim + 2) * kLanes];
  alignas(64) float lowest[kLanes];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

// Compute is what multiplies: float, or BFloat16 in pairs. kAmx: pairs go through tile registers.
template <class Storage, class Compute, bool kAmx>
struct Kernel {
  static constexpr bool kPairs = std::is_same_v<Compute, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<Storage, Compute>;

  const TreeAttentionParams& p;
  LaneLayout layout;
  int64_t d, steps;    // steps: dwords of a query row
  float score_factor;  // from what softmax() reads to units of log2
  float* queries;
  float* chunk_states;
  int64_t max_chunks;

  explicit Kernel(const TreeAttentionParams& params)
      : p(params),
        layout(params),
        d(params.head_dim),
        steps(kPairs ? d / 2 : d),
        score_factor(params.softcap > 0 ? kLog2E : params.scale * kLog2E),
        queries(params.workspace),
        chunk_states(queries + p.batch * p.kv_heads * layout.blocks * pyspec::query_floats(d)),
        max_chunks(pyspec::chunks(params.longest_prefix)) {}

  float* query_block(int64_t sequence_head, int64_t block) const {
    return queries + (sequence_head * layout.blocks + block) * pyspec::query_floats(d);
  }
  State chunk_state(int64_t sequence_head, int64_t chunk, int64_t block) const {
    return chunk_states +
           ((sequence_head * max_chunks + chunk) * layout.blocks + block) * pyspec::state_floats(d);
  }
  const char* row(const void* base, const int64_t* strides, int64_t b, int64_t h, int64_t slot) const {
    int64_t page = b, within = slot;
    if (p.block_table) {
      page = p.block_table[b * p.block_table_stride + slot / p.page];
      within = slot % p.page;
    }
    return static_cast<const char*>(base) +
           sizeof(Storage) * (page * strides[0] + h * strides[1] + within * strides[2]);
  }
  const uint32_t* bits(int64_t b, int64_t node) const {
    int64_t words = (p.nodes + 31) / 32;
    return reinterpret_cast<const uint32_t*>(p.ancestor_bits) + (b * p.nodes + node) * words;
  }
  int64_t depth(int64_t b, int64_t node) const {  // -1 for padding
    int64_t ancestors = 0;
    for (int64_t w = 0; w < (p.nodes + 31) / 32; ++w) ancestors += __builtin_popcount(bits(b, node)[w]);
    return ancestors - 1;
  }

  // ==== queries: [step][lane], once per call ====

  void pack_queries(int64_t sequence_head) const {
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    for (int64_t block = 0; block < layout.blocks; ++block) {
      Compute* out = reinterpret_cast<Compute*>(query_block(sequence_head, block));
      constexpr int64_t kWidth = kPairs ? 2 : 1;
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        Compute* to = out + lane * kWidth;
        if (!layout.used(block, lane, p.nodes)) {
          for (int64_t i = 0; i < d; ++i) to[i / kWidth * kLanes * kWidth + i % kWidth] = Compute{};
          continue;
        }
        int64_t head = h * layout.group + layout.head(block, lane), node = layout.node(block, lane);
        const Storage* from = static_cast<const Storage*>(p.q) + b * p.q_strides[0] + head * p.q_strides[1] +
                              node * p.q_strides[2];
        for (int64_t i = 0; i < d; ++i) {
          Compute& value = to[i / kWidth * kLanes * kWidth + i % kWidth];
          if constexpr (kDirect) {
            value = from[i];
          } else {
            value = to_float(from[i]);
          }
        }
      }
    }
  }

  // ==== tiles ====

  Compute* staged_k(Scratch& s, int64_t i) const { return reinterpret_cast<Compute*>(s.k) + i * d; }
  Compute* staged_v(Scratch& s, int64_t i) const { return reinterpret_cast<Compute*>(s.v) + i * d; }

  void stage(Scratch& s, int64_t b, int64_t h, int64_t i, int64_t slot) const {
    const Storage* k = reinterpret_cast<const Storage*>(row(p.k, p.k_strides, b, h, slot));
    const Storage* v = reinterpret_cast<const Storage*>(row(p.v, p.v_strides, b, h, slot));
    if constexpr (kDirect) {
      std::memcpy(staged_k(s, i), k, d * sizeof(Compute));
      std::memcpy(staged_v(s, i), v, d * sizeof(Compute));
    } else {
      convert_row(k, staged_k(s, i), d);
      convert_row(v, staged_v(s, i), d);
    }
  }

  // Pairs beyond count must hold zeros, not what was there: 0 * NaN is NaN.
  Tile finish_tile(Scratch& s, const char* k, int64_t k_row, const char* v, int64_t v_row,
                   int64_t count) const {
#if PYSPEC_HAS_BF16_DOT
    if constexpr (kPairs) {
      int64_t pairs = kAmx ? pyspec::ceil_div(count, 32) * 16 : pyspec::ceil_div(count, 2);
      uint32_t* out = s.v_pairs;
#if PYSPEC_HAS_AMX
      if constexpr (kAmx) {
        transpose_pairs(v, v_row, pairs, d, out);
        return {{k, k_row, 4}, {reinterpret_cast<char*>(out), 32 * 4, 4}, count};
      }
#endif
      interleave_pairs(v, v_row, pairs, d, out);
      return {{k, k_row, 4}, {reinterpret_cast<char*>(out), 4, d * 4}, count};
    }
#endif
    return {{k, k_row, 4}, {v, 4, v_row}, count};
  }

  bool one_page(int64_t first, int64_t last) const {
    return !p.block_table || first / p.page == last / p.page;
  }

  // A tile that the prefix fills. Values below visible_from (of the earliest node) are outside every window.
  Tile prefix_tile(Scratch& s, int64_t b, int64_t h, int64_t tile, int64_t visible_from) const {
    int64_t first = tile * kTile, last = first + kTile - 1;
    if (kDirect && one_page(first, last) && visible_from <= first) {
      return finish_tile(s, row(p.k, p.k_strides, b, h, first), p.k_strides[2] * sizeof(Storage),
                         row(p.v, p.v_strides, b, h, first), p.v_strides[2] * sizeof(Storage), kTile);
    }
    for (int64_t i = 0; i < kTile; ++i) {
      stage(s, b, h, i, first + i);
      if (first + i < visible_from) std::memset(static_cast<void*>(staged_v(s, i)), 0, d * sizeof(Compute));
    }
    return staged_tile(s, kTile);
  }

  Tile staged_tile(Scratch& s, int64_t count) const {
    for (int64_t i = count; kPairs && i < pyspec::ceil_div(count, 32) * 32; ++i) {
      std::memset(static_cast<void*>(staged_v(s, i)), 0, d * sizeof(Compute));
    }
    int64_t bytes = d * sizeof(Compute);
    return finish_tile(s, reinterpret_cast<char*>(s.k), bytes, reinterpret_cast<char*>(s.v), bytes, count);
  }

  // ==== the fold: one tile into the states of kBlocks blocks ====

  // Scores to weights; returns what the state must be scaled by. lowest: first visible key of each lane, or
  // null. Four independent sums hide the latency of an add, in an order that only count decides.
  PYSPEC_INLINE F16 softmax(float (*scores)[kLanes], float (*weights)[kLanes], int64_t count, State state,
                            const float* lowest) const {
    if (p.softcap > 0 || lowest) restrict_scores(scores, count, lowest);
    F16 largest[4] = {set1(-kInfinity), set1(-kInfinity), set1(-kInfinity), set1(-kInfinity)};
    int64_t j = 0;
    for (; j + 4 <= count; j += 4) {
      for (int i = 0; i < 4; ++i) largest[i] = max(load(scores[j + i]), largest[i]);
    }
    for (int i = 0; j + i < count; ++i) largest[i] = max(load(scores[j + i]), largest[i]);
    F16 factor = set1(score_factor), before = load(state.max);
    F16 in_tile = max(max(largest[0], largest[1]), max(largest[2], largest[3]));
    F16 now = max(mul(in_tile, factor), before);
    F16 safe = where_less(set1(-kInfinity), now, now, set1(0.0f));
    F16 alpha = exp2(sub(before, safe)), minus_safe = sub(set1(0.0f), safe);

    F16 sums[4] = {set1(0.0f), set1(0.0f), set1(0.0f), set1(0.0f)};
    auto weigh_four = [&](int64_t first, int live) PYSPEC_INLINE_LAMBDA {
      F16 x[4];
      for (int i = 0; i < 4; ++i) {
        if (i >= live) {
          x[i] = set1(0.0f);
          continue;
        }
        F16 exponent = fma(load(scores[first + i]), factor, minus_safe);
        x[i] = kPairs ? exp2(exponent, kExp2Short) : exp2(exponent);
        sums[i] = add(sums[i], x[i]);
        if constexpr (!kPairs) store(weights[first + i], x[i]);
      }
#if PYSPEC_HAS_BF16_DOT
      if constexpr (kPairs) {
        store(weights[first / 2], pair(x[0], x[1]));
        store(weights[first / 2 + 1], pair(x[2], x[3]));
      }
#endif
    };
    for (j = 0; j + 4 <= count; j += 4) {
      weigh_four(j, 4);
    }
    if (j < count) weigh_four(j, static_cast<int>(count - j));
    if constexpr (kAmx) {
      for (int64_t i = pyspec::ceil_div(count, 4) * 2; i % 16; ++i) store(weights[i], set1(0.0f));
    }
    store(state.max, now);
    store(state.sum, fma(load(state.sum), alpha, add(add(sums[0], sums[1]), add(sums[2], sums[3]))));
    return alpha;
  }

  // The cap, c tanh(x / c) with tanh(y) = 1 - 2 / (1 + e^2y), and the window.
  void restrict_scores(float (*scores)[kLanes], int64_t count, const float* lowest) const {
    for (int64_t j = 0; j < count; ++j) {
      F16 x = load(scores[j]);
      if (p.softcap > 0) {
        F16 minus_2y = mul(x, set1(-2 * kLog2E * p.scale / p.softcap));
        F16 e = exp2(sub(set1(0.0f), max(set1(-126.0f), minus_2y)));
        x = mul(sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), e))), set1(p.softcap));
      }
      if (lowest) x = where_less(set1(static_cast<float>(j)), load(lowest), set1(-kInfinity), x);
      store(scores[j], x);
    }
  }

  template <int kBlocks>
  void fold(const Tile& tile, const float* query, State state, const float* lowest, Scratch& s) const {
    int64_t state_block = pyspec::state_floats(d), query_block = pyspec::query_floats(d);
    float* scores = &s.scores[0][0][0];
    float* weights = &s.weights[0][0][0];
    constexpr int64_t kScoreBlock = kTile * kLanes;
#if PYSPEC_HAS_AMX
    if constexpr (kAmx) {
      tile_panel_rows<kBlocks>(tile.k, tile.count, query, query_block, steps / 16, scores, kScoreBlock,
                               false);
    } else
#endif
    {
      panel<kPairs, kBlocks>({tile.k.data, tile.k.row, 4}, tile.count, query, query_block, steps, scores,
                             kScoreBlock, nullptr);
    }
    F16 alpha[kBlocks];
    for (int j = 0; j < kBlocks; ++j) {
      alpha[j] = softmax(s.scores[j], s.weights[j], tile.count, state.max + j * state_block,
                         lowest ? lowest + j * kLanes : nullptr);
    }
#if PYSPEC_HAS_AMX
    if constexpr (kAmx) {
      for (int j = 0; j < kBlocks; ++j) {
        if (all_equal(alpha[j], set1(1.0f))) continue;
        for (int64_t i = 0; i < d; ++i) {
          float* at = state.values + j * state_block + i * kLanes;
          store(at, mul(load(at), alpha[j]));
        }
      }
      tile_panel_rows<kBlocks>(tile.v, d, weights, kScoreBlock, pyspec::ceil_div(tile.count, 32),
                               state.values, state_block, true);
    } else
#endif
    {
      int64_t count = kPairs ? pyspec::ceil_div(tile.count, 2) : tile.count;
      panel<kPairs, kBlocks>({tile.v.data, 4, tile.v.step}, d, weights, kScoreBlock, count, state.values,
                             state_block, alpha);
    }
  }

  // ==== windows: first visible position of each lane, relative to a tile ====

  int64_t visible_from(int64_t b, int64_t node_depth) const {
    return p.window ? p.prefix_lens[b] + node_depth - p.window + 1 : 0;
  }
  // False where every key of the tile is outside the window of every lane.
  bool lane_windows(int64_t b, int64_t block, int64_t tile, float* lowest) const {
    bool any = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int64_t from = kTile;
      if (layout.used(block, lane, p.nodes))
        from = visible_from(b, depth(b, layout.node(block, lane))) - tile * kTile;
      from = from < 0 ? 0 : from > kTile ? kTile : from;
      lowest[lane] = static_cast<float>(from);
      any |= from < kTile;
    }
    return any;
  }

  // ==== phase 1: whole prefix tiles ====

  void fold_chunk(int64_t item) const {
    int64_t chunk = item % max_chunks, sequence_head = item / max_chunks;
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    int64_t end = p.prefix_lens[b] / kTile, first = first_tile(chunk);
    if (first >= end) return;
    if (end > first_tile(chunk + 1)) end = first_tile(chunk + 1);
#if PYSPEC_HAS_AMX
    TileConfig config;
#endif
    Scratch& s = scratch();
    for (int64_t block = 0; block < layout.blocks; ++block) chunk_state(sequence_head, chunk, block).clear(d);
    int64_t earliest = visible_from(b, 0);
    for (int64_t tile = first; tile < end; ++tile) {
      if ((tile + 1) * kTile <= earliest) continue;
      Tile keys = prefix_tile(s, b, h, tile, earliest);
      // Every depth is below the number of nodes, so a tile past that is inside every window.
      if (p.window && visible_from(b, p.nodes) > tile * kTile) {
        for (int64_t block = 0; block < layout.blocks; ++block) {
          if (!lane_windows(b, block, tile, s.lowest)) continue;
          fold<1>(keys, query_block(sequence_head, block), chunk_state(sequence_head, chunk, block), s.lowest,
                  s);
        }
        continue;
      }
      int64_t block = 0;
      if constexpr (kAmx || kPanelBlocks == 2) {
        for (; block + 1 < layout.blocks; block += 2) {
          fold<2>(keys, query_block(sequence_head, block), chunk_state(sequence_head, chunk, block), nullptr,
                  s);
        }
      }
      for (; block < layout.blocks; ++block) {
        fold<1>(keys, query_block(sequence_head, block), chunk_state(sequence_head, chunk, block), nullptr,
                s);
      }
    }
  }

  // ==== phase 2: merge the chunks, then every node's own tail ====

  void finish_block(int64_t item) const {
    int64_t block = item % layout.blocks, sequence_head = item / layout.blocks;
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    int64_t prefix = p.prefix_lens[b], whole_tiles = prefix / kTile, whole_chunks = chunk_of(whole_tiles);
#if PYSPEC_HAS_AMX
    TileConfig config;
#endif
    Scratch& s = scratch();
    State before(s.states[0]), merged(s.states[1]), open(s.states[2]);
    before.clear(d);
    for (int64_t chunk = 0; chunk < whole_chunks; ++chunk) {
      before.merge(chunk_state(sequence_head, chunk, block), d, before);
    }

    int64_t staged_tile_index = -1;
    int64_t first_node = layout.first_node(block), end_node = first_node + layout.nodes_per_block;
    if (end_node > p.nodes) end_node = p.nodes;
    for (int64_t node = first_node; node < end_node; ++node) {
      int64_t node_depth = depth(b, node);
      if (node_depth < 0) {
        write(b, h, block, node, nullptr);
        continue;
      }
      State closed = before;  // the chunks before the open one
      if (whole_tiles > first_tile(whole_chunks)) {
        open.copy(chunk_state(sequence_head, whole_chunks, block), d);
      } else {
        open.clear(d);
      }
      const uint32_t* ancestors = bits(b, node);
      int64_t ancestor = -1;  // index of the ancestor staged last
      int64_t from = visible_from(b, node_depth), keys = prefix + node_depth + 1;
      for (int64_t tile = whole_tiles; tile * kTile < keys; ++tile) {
        if (tile > whole_tiles && tile == first_tile(chunk_of(tile))) {
          closed.merge(open, d, merged);
          closed = merged;
          open.clear(d);
        }
        int64_t first = tile * kTile, count = keys - first < kTile ? keys - first : kTile;
        // The prefix's rest is the same for all nodes: staged once.
        int64_t i = staged_tile_index == tile && first < prefix ? prefix - first : 0;
        for (; i < count; ++i) {
          int64_t slot = first + i;
          if (slot >= prefix) {
            do ++ancestor;
            while (!(ancestors[ancestor / 32] >> ancestor % 32 & 1));
            slot = prefix + ancestor;
          }
          stage(s, b, h, i, slot);
        }
        staged_tile_index = tile;
        if (from <= first) {
          fold<1>(staged_tile(s, count), query_block(sequence_head, block), open, nullptr, s);
        } else if (from < first + count) {
          for (int64_t lane = 0; lane < kLanes; ++lane) s.lowest[lane] = static_cast<float>(from - first);
          for (int64_t j = 0; j < from - first; ++j) {
            std::memset(static_cast<void*>(staged_v(s, j)), 0, d * sizeof(Compute));
          }
          staged_tile_index = -1;
          fold<1>(staged_tile(s, count), query_block(sequence_head, block), open, s.lowest, s);
        }
      }
      closed.merge(open, d, merged);
      write(b, h, block, node, &merged);
    }
  }

  // The node's lanes of a block to out and lse; no state is a padding row.
  void write(int64_t b, int64_t h, int64_t block, int64_t node, const State* state) const {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (!layout.used(block, lane, p.nodes) || layout.node(block, lane) != node) continue;
      int64_t head = h * layout.group + layout.head(block, lane);
      Storage* out = static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] +
                     node * p.out_strides[2];
      float sum = state ? state->sum[lane] : 0.0f;
      float factor = sum == 0.0f ? 0.0f : 1.0f / sum;
      for (int64_t i = 0; i < d; ++i)
        from_float(state ? state->values[i * kLanes + lane] * factor : 0.0f, out + i);
      p.lse[(b * p.heads + head) * p.nodes + node] =
          sum == 0.0f ? -kInfinity : (state->max[lane] + __builtin_log2f(sum)) * kLn2;
    }
  }

  void run() const {
    int64_t sequence_heads = p.batch * p.kv_heads;
    bool few = layout.blocks < 4;  // too little work to wake a thread for
    auto pack = [&](int64_t item) {
      if (!few) return pack_queries(item);
      for (int64_t head = 0; head < sequence_heads; ++head) pack_queries(head);
    };
    auto chunk = [&](int64_t item) { fold_chunk(item); };
    auto finish = [&](int64_t item) { finish_block(item); };
    pyspec::parallel(p.parallel_for, few ? 1 : sequence_heads, pack);
    pyspec::parallel(p.parallel_for, sequence_heads * max_chunks, chunk);
    pyspec::parallel(p.parallel_for, sequence_heads * layout.blocks, finish);
  }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_tree_attention)(const TreeAttentionParams& p) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return Kernel<float, float, false>(p).run();
    case pyspec::Element::kFloat16:
      return Kernel<Float16, float, false>(p).run();
    case pyspec::Element::kBFloat16:
#if PYSPEC_HAS_AMX
      if (p.head_dim % 32 == 0) return Kernel<BFloat16, BFloat16, true>(p).run();
#endif
#if PYSPEC_HAS_BF16_DOT
      return Kernel<BFloat16, BFloat16, false>(p).run();
#endif
      return Kernel<BFloat16, float, false>(p).run();
  }
}
