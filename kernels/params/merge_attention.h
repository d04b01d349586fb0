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
  Element element;
};

}  // namespace pyspec
