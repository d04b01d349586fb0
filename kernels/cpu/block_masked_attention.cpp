// block_masked_attention on the CPU: flash attention over the tiles that a mask has something in.
//
// One item per (sequence, heads of one KV head, row block). The rows of the block, of up to 256 rows' worth
// of heads, lie as vector lanes and share every tile of keys and values. No mask is read for full
// tiles; of a partial tile, lanes see the keys that its bits say, and 16 or 32 lanes fold only the keys from
// the first to the last that any of them sees. Tiles are folded in the order and the chunks of
// tree_attention, so a row has the same bits as there if it sees the same keys at the same places.
// Bound by multiply-adds (AMX: by exp2).
#include "params/block_masked_attention.h"

#include <new>

#include "cpu/flash.h"

namespace {

using pyspec::BlockMaskedAttentionParams;
using pyspec::ceil_div;
using pyspec::chunk_of;
using pyspec::state_floats;

constexpr int64_t kMaxBlocks = 16;  // of lanes, in an item

struct Scratch : FoldScratch {
  alignas(64) float rows[kLanes][kMaxHeadDim + 16];
  alignas(64) float queries[kMaxBlocks * kLanes * kMaxHeadDim];
  alignas(64) float states[kMaxBlocks * kLanes * (kMaxHeadDim + 2)];  // of the chunk that is folded
  alignas(64) float before[kMaxBlocks * kLanes * (kMaxHeadDim + 2)];  // of the chunks before it, merged
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

  // Keys that a partial tile can be cut to: what panel() and pairs round up to.
  static constexpr int64_t kCut = kAmx ? 32 : 8;

  const BlockMaskedAttentionParams& p;
  int64_t group, heads_per_item, head_items;

  explicit Kernel(const BlockMaskedAttentionParams& params)
      : Base(params.head_dim, params.scale, params.softcap),
        p(params),
        group(params.heads / params.kv_heads) {
    int64_t most = kMaxBlocks * kLanes / (kTile * p.words);
    head_items = p.mask_heads > 1 ? group : ceil_div(group, most);
    heads_per_item = ceil_div(group, head_items);
  }

  // One item: heads first_head .. of a sequence, rows of one block.
  struct Item {
    int64_t b, kv_head, first_head, heads, block, rows, lane_blocks;
    const int32_t *row_order, *key_order;
  };

  // ==== rows in and out, a block of lanes at a time ====

  int64_t row_of(const Item& item, int64_t lane_block, int64_t lane) const {
    int64_t place = item.block * kTile * p.words + lane_block * kLanes + lane;
    return item.row_order ? item.row_order[place] : place;
  }
  int64_t lanes_of(const Item& item, int64_t lane_block) const {
    int64_t rest = item.rows - lane_block * kLanes;
    return rest < kLanes ? rest : kLanes;
  }

  // Rows of whole vectors of what is multiplied are read where they lie.
  void pack_queries(const Item& item, int64_t head, int64_t lane_block, float* out, Scratch& s) const {
    int64_t lanes = lanes_of(item, lane_block);
    const float* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      rows[lane] = s.rows[lane];
      if (lane >= lanes) {
        std::memset(s.rows[lane], 0, d * sizeof(Compute));
        continue;
      }
      const Storage* from = static_cast<const Storage*>(p.q) + item.b * p.q_strides[0] +
                            head * p.q_strides[1] + row_of(item, lane_block, lane) * p.q_strides[2];
      if (kDirect && this->steps % kLanes == 0) {
        rows[lane] = reinterpret_cast<const float*>(from);
      } else {
        this->copy_row(from, reinterpret_cast<Compute*>(s.rows[lane]));
      }
    }
    for (int64_t step = 0; step < this->steps; step += kLanes) {
      F16 values[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) values[lane] = load(rows[lane] + step);
      transpose(values);
      for (int64_t i = 0; i < kLanes; ++i) store(out + (step + i) * kLanes, values[i]);
    }
  }

  void write(const Item& item, int64_t head, int64_t lane_block, State state) const {
    alignas(64) float factor[kLanes];
    int64_t lanes = lanes_of(item, lane_block);
    Storage* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      Finish finish(state, lane, p.sinks ? p.sinks + head : nullptr);
      factor[lane] = finish.factor;
      if (lane >= lanes) continue;
      int64_t row = row_of(item, lane_block, lane);
      rows[lane] = static_cast<Storage*>(p.out) + item.b * p.out_strides[0] + head * p.out_strides[1] +
                   row * p.out_strides[2];
      p.lse[(item.b * p.heads + head) * p.rows + row] = finish.lse;
    }
    for (int64_t channel = 0; channel < d; channel += kLanes) {
      F16 values[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        values[i] = mul(load(state.values + (channel + i) * kLanes), load(factor));
      transpose(values);
      for (int64_t lane = 0; lane < lanes; ++lane) store_as(rows[lane] + channel, values[lane]);
    }
  }

  // ==== tiles ====

  const Storage* key_row(const void* base, const int64_t* strides, const Item& item, int64_t place) const {
    int64_t slot = item.key_order ? item.key_order[place] : place;
    return static_cast<const Storage*>(base) + item.b * strides[0] + item.kv_head * strides[1] +
           slot * strides[2];
  }
  bool is_one_run(const Item& item, int64_t first, int64_t count) const {
    if (!item.key_order) return true;
    for (int64_t i = 1; i < count; ++i)
      if (item.key_order[first + i] != item.key_order[first] + i) return false;
    return true;
  }

  // Keys and values of a tile; those read where they lie must be whole tiles.
  Tile read_tile(const Item& item, int64_t tile, Scratch& s) const {
    int64_t first = tile * kTile, count = p.keys - first < kTile ? p.keys - first : kTile;
    if (kDirect && count == kTile && is_one_run(item, first, count)) {
      return this->tile_in_place(s, key_row(p.k, p.k_strides, item, first), p.k_strides[2],
                                 key_row(p.v, p.v_strides, item, first), p.v_strides[2]);
    }
    for (int64_t i = 0; i < count; ++i) {
      this->stage(s, i, key_row(p.k, p.k_strides, item, first + i),
                  key_row(p.v, p.v_strides, item, first + i));
    }
    return this->staged_tile(s, count);
  }

  // A weight of 0 does not hide a value that is NaN or infinite. Keys of a partial tile with such values, bit
  // by bit; 0 almost always.
  uint64_t keys_not_finite(const Item& item, int64_t tile, int64_t count) const {
    uint64_t keys = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Storage* value = key_row(p.v, p.v_strides, item, tile * kTile + i);
      F16 zeros = set1(0.0f);
      for (int64_t c = 0; c < d; c += 16) zeros = fma(load_as_float(value + c), set1(0.0f), zeros);
      if (!all_equal(zeros, set1(0.0f))) keys |= uint64_t{1} << i;
    }
    return keys;
  }
  static bool is_finite(float x) { return x * 0.0f == 0.0f; }

  // The tile with zeros in place of values that are not finite.
  Tile without(const Item& item, int64_t tile, int64_t count, uint64_t keys, Scratch& s) const {
    for (int64_t i = 0; i < count; ++i) {
      const Storage* value = key_row(p.v, p.v_strides, item, tile * kTile + i);
      this->stage(s, i, key_row(p.k, p.k_strides, item, tile * kTile + i), value);
      if (!(keys >> i & 1)) continue;
      for (int64_t c = 0; c < d; ++c)
        if (!is_finite(to_float(value[c]))) this->staged_v(s, i)[c] = Compute{};
    }
    return this->staged_tile(s, count);
  }
  // Those values, given to the lanes that see them.
  void add_not_finite(const Item& item, int64_t tile, uint64_t keys, Visible visible, State state) const {
    for (; keys; keys &= keys - 1) {
      int64_t i = __builtin_ctzll(keys);
      const Storage* value = key_row(p.v, p.v_strides, item, tile * kTile + i);
      for (int64_t c = 0; c < d; ++c) {
        if (is_finite(to_float(value[c]))) continue;
        float* at = state.values + c * kLanes;
        store(at,
              select(visible.words[i * visible.stride], add(load(at), set1(to_float(value[c]))), load(at)));
      }
    }
  }

  // ==== the two lists ====

  float* query(Scratch& s, int64_t i) const { return s.queries + i * pyspec::query_floats(d); }
  State state(Scratch& s, int64_t i) const { return s.states + i * state_floats(d); }
  State before(Scratch& s, int64_t i) const { return s.before + i * state_floats(d); }

  void fold_full(const Item& item, int64_t tile, Scratch& s) const {
    Tile keys = read_tile(item, tile, s);
    int64_t i = 0, count = item.heads * item.lane_blocks;
    if constexpr (kAmx || kPanelBlocks == 2) {
      for (; i + 1 < count; i += 2) this->template fold<2>(keys, query(s, i), state(s, i), nullptr, s);
    }
    for (; i < count; ++i) this->template fold<1>(keys, query(s, i), state(s, i), nullptr, s);
  }

  // Keys from first to one past last that some lane sees, rounded to kCut.
  static Tile cut(const Tile& tile, uint64_t seen, int64_t& first) {
    first = __builtin_ctzll(seen) / kCut * kCut;
    int64_t end = (64 - __builtin_clzll(seen) + kCut - 1) / kCut * kCut;
    if (end > tile.count) end = tile.count;
    int64_t steps = kPairs ? first / 2 : first;
    return {{tile.k.data + first * tile.k.row, tile.k.row, tile.k.step},
            {tile.v.data + steps * tile.v.step, tile.v.row, tile.v.step},
            end - first};
  }

  template <int kBlocks>
  void fold_visible(const Tile& tile, const Visible* visible, uint64_t seen, int64_t i, Scratch& s) const {
    int64_t first;
    Tile keys = cut(tile, seen, first);
    Visible shifted[kBlocks];
    for (int j = 0; j < kBlocks; ++j) {
      shifted[j] = {visible[j].words + first * visible[j].stride, visible[j].stride};
    }
    this->template fold<kBlocks>(keys, query(s, i), state(s, i), shifted, s);
  }

  void fold_partial(const Item& item, int64_t tile, const uint64_t* bits, Scratch& s) const {
    int64_t rest = p.keys - tile * kTile, count = rest < kTile ? rest : kTile;
    // For every block of lanes: which lanes see a key, and by which keys any lane is seen.
    Visible visible[kMaxBlocks];
    uint64_t seen[kMaxBlocks] = {};
    for (int64_t i = 0; i < item.lane_blocks; ++i) {
      visible[i] = {reinterpret_cast<const uint16_t*>(bits + i / 4 * kTile) + i % 4, 4};
      for (int64_t j = 0; j < count; ++j) seen[i] |= uint64_t{visible[i].words[4 * j] != 0} << j;
    }
    uint64_t not_finite = keys_not_finite(item, tile, count);
    Tile keys = not_finite ? without(item, tile, count, not_finite, s) : read_tile(item, tile, s);
    for (int64_t head = 0; head < item.heads; ++head) {
      int64_t first = head * item.lane_blocks;
      for (int64_t i = 0; i < item.lane_blocks;) {
        if ((kAmx || kPanelBlocks == 2) && i + 1 < item.lane_blocks && seen[i] && seen[i + 1]) {
          fold_visible<2>(keys, visible + i, seen[i] | seen[i + 1], first + i, s);
          i += 2;
          continue;
        }
        if (seen[i]) fold_visible<1>(keys, visible + i, seen[i], first + i, s);
        ++i;
      }
      for (int64_t i = 0; not_finite && i < item.lane_blocks; ++i)
        add_not_finite(item, tile, not_finite, visible[i], state(s, first + i));
    }
  }

  void run_item(int64_t index) const {
    Item item{};
    item.block = index % p.blocks, index /= p.blocks;
    item.first_head = index % head_items * heads_per_item, index /= head_items;
    item.kv_head = index % p.kv_heads, item.b = index / p.kv_heads;
    item.heads = group - item.first_head < heads_per_item ? group - item.first_head : heads_per_item;
    item.first_head += item.kv_head * group;
    item.rows = p.rows - item.block * kTile * p.words;
    if (item.rows > kTile * p.words) item.rows = kTile * p.words;
    item.lane_blocks = ceil_div(item.rows, kLanes);
    int64_t mask_b = p.mask_batch > 1 ? item.b : 0, mask_head = p.mask_heads > 1 ? item.first_head : 0;
    item.row_order = p.row_order ? p.row_order + mask_b * p.rows : nullptr;
    item.key_order = p.key_order ? p.key_order + mask_b * p.keys : nullptr;
#if PYSPEC_HAS_AMX
    TileConfig config;
#endif
    Scratch& s = scratch();
    for (int64_t i = 0; i < item.heads * item.lane_blocks; ++i) {
      pack_queries(item, item.first_head + i / item.lane_blocks, i % item.lane_blocks, query(s, i), s);
      state(s, i).clear(d);
    }
    int64_t lists = ((mask_b * p.mask_heads + mask_head) * p.blocks + item.block) * 2;
    const int32_t* full = p.full_tiles + p.full_ranges[lists];
    const int32_t* full_end = p.full_tiles + p.full_ranges[lists + 1];
    const int32_t* partial = p.partial_tiles + 2 * p.partial_ranges[lists];
    const int32_t* partial_end = p.partial_tiles + 2 * p.partial_ranges[lists + 1];
    int64_t blocks = item.heads * item.lane_blocks, chunk = -1;
    bool is_first = true;
    while (full < full_end || partial < partial_end) {
      bool is_full = partial == partial_end || (full < full_end && *full < *partial);
      int64_t tile = is_full ? *full : *partial;
      if (chunk_of(tile) != chunk) {
        for (int64_t i = 0; chunk >= 0 && i < blocks; ++i) close_chunk(s, i, is_first);
        is_first = chunk < 0;
        chunk = chunk_of(tile);
      }
      if (is_full) {
        fold_full(item, *full++, s);
      } else {
        fold_partial(item, tile, p.bits + partial[1] * p.words * kTile, s);
        partial += 2;
      }
    }
    for (int64_t i = 0; i < blocks; ++i) {
      if (!is_first) before(s, i).merge(state(s, i), d, state(s, i));
      write(item, item.first_head + i / item.lane_blocks, i % item.lane_blocks, state(s, i));
    }
  }

  // What has been folded since the last call goes behind what was folded before.
  void close_chunk(Scratch& s, int64_t i, bool is_first) const {
    if (is_first) {
      before(s, i).copy(state(s, i), d);
    } else {
      before(s, i).merge(state(s, i), d, before(s, i));
    }
    state(s, i).clear(d);
  }

  void run() const {
    auto body = [&](int64_t index) { run_item(index); };
    pyspec::parallel(p.parallel_for, p.batch * p.kv_heads * head_items * p.blocks, body);
  }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_block_masked_attention)(const BlockMaskedAttentionParams& p) {
  run_for_element<Kernel>(p);
}
