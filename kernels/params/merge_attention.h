// merge_attention: two attentions over disjoint keys become one.
#pragma once

#include "params/common.h"

namespace pyspec {

struct MergeAttentionParams {
  const void* out_a;   // [rows, head_dim], contiguous
  const float* lse_a;  // [rows], natural log
  const void* out_b;   // [rows, head_dim], contiguous
  const float* lse_b;  // [rows]
  void* out;           // [rows, head_dim], contiguous
  float* lse;          // [rows]
  int64_t rows, head_dim;
  // Where heads is not 0, rows are [nodes, heads] but each lse [heads, nodes]. A node then takes one of
  // several b: number parts[node], each part_bytes behind the one before.
  int64_t heads;
  const int32_t* parts;  // [nodes]
  int64_t part_bytes;
  Element element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
