// tree_attention on the CPU: flash attention with query rows as vector lanes.
//
// Two phases. Prefix: one item per (sequence, KV head, chunk of key tiles) folds the tiles that the prefix
// fills into the online-softmax state of every row; keys and values are streamed once, all rows of the group
// share them. Tail: one item per (sequence, KV head, 16 rows) merges the chunks in order, then for each node
// gathers the rest of the prefix and the node's ancestors by depth, so that a row sees the tiles of plain
// decoding, bit for bit. Few rows are bound by reading K and V; many rows by multiply-adds (AMX: by exp2).
// Rows of keys lie too far apart for the processor to foresee them, so while a tile is folded the next is
// asked for.
#include "params/tree_attention.h"

#include <new>

#include "cpu/flash.h"

namespace {

using pyspec::chunk_of;
using pyspec::first_tile;
using pyspec::LaneLayout;
using pyspec::TreeAttentionParams;

constexpr int64_t kSlotsAhead = 4;  // at a call; at least 17 calls fold a tile of head dimension 128

struct Scratch : FoldScratch {
  alignas(64) float states[3][(kMaxHeadDim + 2) * kLanes];
  alignas(64) uint16_t in_window[kTile];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

template <class Storage, class Compute, bool kAmx>
struct Kernel : Flash<Storage, Compute, kAmx> {
  using Base = Flash<Storage, Compute, kAmx>;
  using Base::d;
  using Base::kDirect;
  using Base::kPairs;

  const TreeAttentionParams& p;
  LaneLayout layout;
  float* queries;
  float* chunk_states;
  int64_t max_chunks;

  explicit Kernel(const TreeAttentionParams& params)
      : Base(params.head_dim, params.scale, params.softcap),
        p(params),
        layout(params),
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
  const Storage* row(const void* base, const int64_t* strides, int64_t b, int64_t h, int64_t slot) const {
    int64_t page = b, within = slot;
    if (p.block_table) {
      page = p.block_table[b * p.block_table_stride + slot / p.page];
      within = slot % p.page;
    }
    return static_cast<const Storage*>(base) + page * strides[0] + h * strides[1] + within * strides[2];
  }
  const uint32_t* bits(int64_t b, int64_t node) const {
    return reinterpret_cast<const uint32_t*>(p.ancestor_bits) + (b * p.nodes + node) * p.words;
  }
  int64_t depth(int64_t b, int64_t node) const {  // -1 for padding
    int64_t ancestors = 0;
    for (int64_t w = 0; w < p.words; ++w) ancestors += __builtin_popcount(bits(b, node)[w]);
    return ancestors - 1;
  }

  // ==== queries: [step][lane], once per call ====

  void pack_queries(int64_t sequence_head) const {
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    for (int64_t block = 0; block < layout.blocks; ++block) {
      Compute* out = reinterpret_cast<Compute*>(query_block(sequence_head, block));
      constexpr int64_t kWidth = kPairs ? 2 : 1;
      int64_t used = layout.used(block, p.nodes);
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        Compute* to = out + lane * kWidth;
        if (lane >= used) {
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

  void stage(Scratch& s, int64_t b, int64_t h, int64_t i, int64_t slot) const {
    Base::stage(s, i, row(p.k, p.k_strides, b, h, slot), row(p.v, p.v_strides, b, h, slot));
  }

  bool one_page(int64_t first, int64_t last) const {
    return !p.block_table || first / p.page == last / p.page;
  }

  // A tile that the prefix fills. Values below visible_from (of the earliest node) are outside every window.
  Tile prefix_tile(Scratch& s, int64_t b, int64_t h, int64_t tile, int64_t visible_from) const {
    int64_t first = tile * kTile, last = first + kTile - 1;
    if (kDirect && one_page(first, last) && visible_from <= first) {
      return this->tile_in_place(s, row(p.k, p.k_strides, b, h, first), p.k_strides[2],
                                 row(p.v, p.v_strides, b, h, first), p.v_strides[2]);
    }
    for (int64_t i = 0; i < kTile; ++i) {
      stage(s, b, h, i, first + i);
      if (first + i < visible_from) this->clear_staged_v(s, i);
    }
    return this->staged_tile(s, kTile);
  }

  // ==== windows ====

  int64_t visible_from(int64_t b, int64_t node_depth) const {
    if (!p.window) return 0;
    int64_t position = p.prefix_lens[b] + node_depth;
    return p.chunked ? position / p.window * p.window : position - p.window + 1;
  }
  // Lanes that see each key of a tile, from the first visible key of each, relative to the tile.
  Visible from_key(Scratch& s, const float* lowest) const {
    F16 from = load(lowest);
    for (int64_t j = 0; j < kTile; ++j) {
      s.in_window[j] = static_cast<uint16_t>(less_mask(from, set1(static_cast<float>(j) + 0.5f)));
    }
    return {s.in_window, 1};
  }
  // No words where every key of the tile is outside the window of every lane.
  Visible lane_windows(Scratch& s, int64_t b, int64_t block, int64_t tile) const {
    alignas(64) float lowest[kLanes];
    bool any = false;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      int64_t from = kTile;
      if (lane < layout.used(block, p.nodes))
        from = visible_from(b, depth(b, layout.node(block, lane))) - tile * kTile;
      from = from < 0 ? 0 : from > kTile ? kTile : from;
      lowest[lane] = static_cast<float>(from);
      any |= from < kTile;
    }
    return any ? from_key(s, lowest) : Visible{};
  }

  // ==== phase 1: whole prefix tiles ====

  // Asks for the keys and values of slots up to end, a few at a call: while a tile is multiplied, the next
  // one comes from memory.
  struct Ahead {
    const Kernel& kernel;
    int64_t b, h, *slot, end;

    PYSPEC_INLINE void operator()() const {
      for (int64_t i = 0; i < kSlotsAhead && *slot < end; ++i, ++*slot) {
        ask(kernel.row(kernel.p.k, kernel.p.k_strides, b, h, *slot));
        ask(kernel.row(kernel.p.v, kernel.p.v_strides, b, h, *slot));
      }
    }
    PYSPEC_INLINE void ask(const Storage* row) const {
      for (int64_t i = 0; i < kernel.d; i += 64 / sizeof(Storage)) __builtin_prefetch(row + i, 0, 2);
    }
  };

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
      // Every depth is below the number of bits, so a tile past that is inside every window.
      if (p.window && visible_from(b, 32 * p.words) > tile * kTile) {
        for (int64_t block = 0; block < layout.blocks; ++block) {
          Visible visible = lane_windows(s, b, block, tile);
          if (!visible.words) continue;
          this->template fold<1>(keys, query_block(sequence_head, block),
                                 chunk_state(sequence_head, chunk, block), &visible, s);
        }
        continue;
      }
      int64_t block = 0, next = (tile + 1) * kTile;
      Ahead ahead{*this, b, h, &next, tile + 1 < end ? next + kTile : next};
      if constexpr (kAmx || kPanelBlocks == 2) {
        for (; block + 1 < layout.blocks; block += 2) {
          this->template fold<2>(keys, query_block(sequence_head, block),
                                 chunk_state(sequence_head, chunk, block), nullptr, s, ahead);
        }
      }
      for (; block < layout.blocks; ++block) {
        this->template fold<1>(keys, query_block(sequence_head, block),
                               chunk_state(sequence_head, chunk, block), nullptr, s, ahead,
                               {0, layout.used(block, p.nodes)});
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
      auto fold_staged = [&](int64_t count, const Visible* visible) {
        this->template fold<1>(this->staged_tile(s, count), query_block(sequence_head, block), open, visible,
                               s, Nothing(), lanes_of(block, node));
      };
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
          fold_staged(count, nullptr);
        } else if (from < first + count) {
          alignas(64) float lowest[kLanes];
          store(lowest, set1(static_cast<float>(from - first)));
          Visible visible = from_key(s, lowest);
          for (int64_t j = 0; j < from - first; ++j) this->clear_staged_v(s, j);
          staged_tile_index = -1;
          fold_staged(count, &visible);
        }
      }
      closed.merge(open, d, merged);
      write(b, h, block, node, &merged);
    }
  }

  // The lanes of a node in a block.
  Lanes lanes_of(int64_t block, int64_t node) const {
    int64_t first = (node - layout.first_node(block)) * layout.group, end = first + layout.group;
    return {first, end < kLanes ? end : kLanes};
  }

  // The node's lanes of a block to out and lse; no state is a padding row.
  void write(int64_t b, int64_t h, int64_t block, int64_t node, const State* state) const {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (lane >= layout.used(block, p.nodes) || layout.node(block, lane) != node) continue;
      int64_t head = h * layout.group + layout.head(block, lane);
      Storage* out = static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] +
                     node * p.out_strides[2];
      float& lse = p.lse[(b * p.heads + head) * p.nodes + node];
      if (!state) {
        lse = -kInfinity;
        for (int64_t i = 0; i < d; ++i) from_float(0.0f, out + i);
        continue;
      }
      Finish finish(*state, lane, p.sinks ? p.sinks + head : nullptr);
      lse = finish.lse;
      for (int64_t i = 0; i < d; ++i) from_float(state->values[i * kLanes + lane] * finish.factor, out + i);
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
  run_for_element<Kernel>(p);
}
