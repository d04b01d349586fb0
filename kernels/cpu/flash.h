// Flash attention's inner step with query rows as vector lanes: one tile of keys and values is folded into
// the online softmax of 16 or 32 rows. Two products by panel.h, and between them the softmax, which needs no
// shuffles: every lane is a row.
#pragma once

#include "cpu/panel.h"
#include "params/attention.h"

namespace {

using pyspec::kLanes;
using pyspec::kMaxHeadDim;
using pyspec::kTile;

constexpr float kLn2 = 0.693147181f;
// Of a staged row at most: a line of the cache apart from the next one. The products with values walk down
// the 64 rows of a tile, which at powers of two apart would share a few sets of the first cache.
constexpr int64_t kStagedBytes = kMaxHeadDim * 4 + 64;

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

// What the values of a lane are multiplied by at last, and the natural log-sum-exp of its scores. A lane that
// saw nothing gives 0 and -inf. sink: null, or the score of one more key, which has no value.
struct Finish {
  float factor, lse;

  Finish(const State& state, int64_t lane, const float* sink) : factor(0.0f), lse(-kInfinity) {
    float largest = state.max[lane], sum = state.sum[lane], kept = 1.0f;
    if (sum == 0.0f) return;
    if (sink) {
      float score = *sink * kLog2E, most = score > largest ? score : largest;
      kept = __builtin_exp2f(largest - most);
      sum = sum * kept + __builtin_exp2f(score - most);
      largest = most;
    }
    factor = kept / sum, lse = (largest + __builtin_log2f(sum)) * kLn2;
  }
};

// A tile's keys and values in the form that panel() reads. count <= 64 keys are real.
struct Tile {
  PanelA k, v;
  int64_t count;
};

// What folding one tile needs beside it.
struct FoldScratch {
  alignas(64) char k[kTile * kStagedBytes], v[kTile * kStagedBytes];  // staged rows, fp32 or bf16
  alignas(64) float scores[2][kTile][kLanes];
  alignas(64) float weights[2][kTile][kLanes];  // fp32, or bf16 pairs in the first 32 rows
  alignas(64) uint32_t v_pairs[kTile / 2 * kMaxHeadDim];
};

// Which lanes see each key of a tile: bit i of words[key * stride] is lane i's. words null: all see all.
struct Visible {
  const uint16_t* words;
  int64_t stride;
};

// Lanes that are to be folded; others may hold anything afterwards. A hint: without parts of a panel all are.
struct Lanes {
  int64_t first = 0, end = kLanes;
};

// Compute is what multiplies: float, or BFloat16 in pairs. kAmx: pairs go through tile registers.
template <class Storage, class Compute, bool kAmx>
struct Flash {
  static constexpr bool kPairs = std::is_same_v<Compute, BFloat16>;
  static constexpr bool kDirect = std::is_same_v<Storage, Compute>;

  int64_t d, steps;  // steps: dwords of a query row
  float scale, softcap;
  float score_factor;  // from what softmax() reads to units of log2

  Flash(int64_t head_dim, float scale, float softcap)
      : d(head_dim),
        steps(kPairs ? head_dim / 2 : head_dim),
        scale(scale),
        softcap(softcap),
        score_factor(softcap > 0 ? kLog2E : scale * kLog2E) {}

  // ==== tiles ====

  int64_t staged_bytes() const { return d * sizeof(Compute) + 64; }
  Compute* staged_k(FoldScratch& s, int64_t i) const {
    return reinterpret_cast<Compute*>(s.k + i * staged_bytes());
  }
  Compute* staged_v(FoldScratch& s, int64_t i) const {
    return reinterpret_cast<Compute*>(s.v + i * staged_bytes());
  }
  void copy_row(const Storage* from, Compute* to) const {
    if constexpr (kDirect) {
      std::memcpy(static_cast<void*>(to), from, d * sizeof(Compute));
    } else {
      convert_row(from, to, d);
    }
  }
  void stage(FoldScratch& s, int64_t i, const Storage* k, const Storage* v) const {
    copy_row(k, staged_k(s, i));
    copy_row(v, staged_v(s, i));
  }
  void clear_staged_v(FoldScratch& s, int64_t i) const {
    std::memset(static_cast<void*>(staged_v(s, i)), 0, d * sizeof(Compute));
  }
  // Of the first count staged rows.
  Tile staged_tile(FoldScratch& s, int64_t count) const {
    for (int64_t i = count; kPairs && i < pyspec::ceil_div(count, 32) * 32; ++i) clear_staged_v(s, i);
    return finish_tile(s, s.k, staged_bytes(), s.v, staged_bytes(), count);
  }
  // Of whole tiles that need no conversion. Where the first cache may have eight ways, 64 rows of values that
  // are a multiple of 512 bytes apart would fill them, so they move all the same.
  Tile tile_in_place(FoldScratch& s, const Storage* k, int64_t k_stride, const Storage* v,
                     int64_t v_stride) const {
    const char* values = reinterpret_cast<const char*>(v);
    int64_t v_row = v_stride * sizeof(Storage);
#if PYSPEC_HAS_X86_VECTORS && !PYSPEC_HAS_AVX512
    if (v_row % 512 == 0) {
      for (int64_t i = 0; i < kTile; ++i)
        std::memcpy(s.v + i * staged_bytes(), values + i * v_row, d * sizeof(Storage));
      values = s.v, v_row = staged_bytes();
    }
#endif
    return finish_tile(s, reinterpret_cast<const char*>(k), k_stride * sizeof(Storage), values, v_row, kTile);
  }

  // Pairs beyond count must hold zeros, not what was there: 0 * NaN is NaN.
  Tile finish_tile(FoldScratch& s, const char* k, int64_t k_row, const char* v, int64_t v_row,
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

  // Scores to weights; returns what the state must be scaled by. Four independent sums hide the latency of an
  // add, in an order that only count decides.
  PYSPEC_INLINE F16 softmax(float (*scores)[kLanes], float (*weights)[kLanes], int64_t count, State state,
                            Visible visible) const {
    if (softcap > 0 || visible.words) restrict_scores(scores, count, visible);
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

  // The cap, c tanh(x / c) with tanh(y) = 1 - 2 / (1 + e^2y), and the mask.
  void restrict_scores(float (*scores)[kLanes], int64_t count, Visible visible) const {
    for (int64_t j = 0; j < count; ++j) {
      F16 x = load(scores[j]);
      if (softcap > 0) {
        F16 minus_2y = mul(x, set1(-2 * kLog2E * scale / softcap));
        F16 e = exp2(sub(set1(0.0f), max(set1(-126.0f), minus_2y)));
        x = mul(sub(set1(1.0f), div(set1(2.0f), add(set1(1.0f), e))), set1(softcap));
      }
      if (visible.words) x = select(visible.words[j * visible.stride], x, set1(-kInfinity));
      store(scores[j], x);
    }
  }

  // Into the states of kBlocks blocks, which lie one after another like their queries. between is called
  // every few hundred cycles, but on AMX.
  template <int kBlocks, class Between = Nothing>
  void fold(const Tile& tile, const float* query, State state, const Visible* visible, FoldScratch& s,
            const Between& between = {}, Lanes lanes = {}) const {
    int64_t state_block = pyspec::state_floats(d), query_block = pyspec::query_floats(d);
    float* scores = &s.scores[0][0][0];
    float* weights = &s.weights[0][0][0];
    constexpr int64_t kScoreBlock = kTile * kLanes;
#if PYSPEC_HAS_PART_PANELS
    if constexpr (kBlocks == 1) {
      auto fold_part = [&](auto width) PYSPEC_INLINE_LAMBDA {
        constexpr int kWidth = decltype(width)::value;
        int64_t first = lanes.first / kWidth * kWidth;
        if (lanes.end > first + kWidth) return false;
        part_panel<kPairs, kWidth>(tile.k, tile.count, query + first, steps, scores + first, nullptr,
                                   between);
        alignas(64) float alpha[kLanes];
        store(alpha,
              softmax(s.scores[0], s.weights[0], tile.count, state.max, visible ? *visible : Visible{}));
        int64_t count = kPairs ? pyspec::ceil_div(tile.count, 2) : tile.count;
        part_panel<kPairs, kWidth>({tile.v.data, 4, tile.v.step}, d, weights + first, count,
                                   state.values + first, alpha + first, between);
        return true;
      };
#if PYSPEC_HAS_NEON
      if (fold_part(std::integral_constant<int, 4>())) return;
#endif
      if (fold_part(std::integral_constant<int, 8>())) return;
    }
#endif
#if PYSPEC_HAS_AMX
    if constexpr (kAmx) {
      tile_panel_rows<kBlocks>(tile.k, tile.count, query, query_block, steps / 16, scores, kScoreBlock,
                               false);
    } else
#endif
    {
      panel<kPairs, kBlocks>({tile.k.data, tile.k.row, 4}, tile.count, query, query_block, steps, scores,
                             kScoreBlock, nullptr, between);
    }
    F16 alpha[kBlocks];
    for (int j = 0; j < kBlocks; ++j) {
      alpha[j] = softmax(s.scores[j], s.weights[j], tile.count, state.max + j * state_block,
                         visible ? visible[j] : Visible{});
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
                             state_block, alpha, between);
    }
  }
};

// Runs an op's kernel for the element type of its tensors, on the best products that there are for it.
template <template <class Storage, class Compute, bool kAmx> class Kernel, class Params>
void run_for_element(const Params& p) {
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

}  // namespace
