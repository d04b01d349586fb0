// What attention to quantised blocks shares, whatever a block holds (gear, residual_vq): the query rows of a
// KV head and what they see, and how the chunks of a row become its result.
#pragma once

#include "cpu/simd.h"

namespace {

constexpr int64_t kMostHeadDim = 256;
constexpr float kLn2 = 0.693147181f;

// The rows of a KV head are (node, head of its group), node after node. Params have the tensors and sizes of
// GearAttentionParams.
template <class Storage, class Params>
struct PackedRows {
  const Params& p;
  int64_t d, heads_a_group, row_count;

  explicit PackedRows(const Params& params)
      : p(params),
        d(params.head_dim),
        heads_a_group(params.heads / params.kv_heads),
        row_count(params.nodes * heads_a_group) {}

  // Blocks that a row sees: none for rows that only fill up a set.
  int64_t seen(int64_t b, int64_t row) const {
    return row < row_count ? p.seen[b * p.nodes + row / heads_a_group] : 0;
  }

  // The first token that a row sees.
  int64_t oldest(int64_t b, int64_t row) const {
    int64_t token = p.oldest && row < row_count ? p.oldest[b * p.nodes + row / heads_a_group] : 0;
    return token > 0 ? token : 0;
  }

  // The query of a row that is there, in fp32.
  void read_query(int64_t b, int64_t kv_head, int64_t row, float* to) const {
    const Storage* from = static_cast<const Storage*>(p.q) + b * p.q_strides[0] +
                          (kv_head * heads_a_group + row % heads_a_group) * p.q_strides[1] +
                          row / heads_a_group * p.q_strides[2];
    convert_row(from, to, d);
  }

  // The result of a row from its chunks begin .. end - 1, in order: state(chunk) has d sums of values, the
  // largest score (times log2 e) and the sum of weights.
  template <class State>
  void merge_chunks(int64_t b, int64_t kv_head, int64_t row, int64_t begin, int64_t end,
                    const State& state) const {
    alignas(64) float merged[kMostHeadDim];
    float max = -kInfinity, sum = 0.0f;
    for (int64_t i = 0; i < d; ++i) merged[i] = 0.0f;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const float* from = state(chunk);
      float largest = from[d] > max ? from[d] : max, safe = largest == -kInfinity ? 0.0f : largest;
      F16 weight = exp2(set1(max - safe)), other = exp2(set1(from[d] - safe));
      for (int64_t i = 0; i < d; i += 16)
        store(merged + i, fma(load(from + i), other, mul(load(merged + i), weight)));
      alignas(64) float sums[16];
      store(sums, fma(set1(from[d + 1]), other, mul(set1(sum), weight)));
      max = largest, sum = sums[0];
    }
    int64_t head = kv_head * heads_a_group + row % heads_a_group, node = row / heads_a_group;
    Storage* out = static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] +
                   node * p.out_strides[2];
    F16 factor = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
    for (int64_t i = 0; i < d; i += 16) store_as(out + i, mul(load(merged + i), factor));
    p.lse[(b * p.heads + head) * p.nodes + node] =
        sum == 0.0f ? -kInfinity : (max + __builtin_log2f(sum)) * kLn2;
  }
};

}  // namespace
