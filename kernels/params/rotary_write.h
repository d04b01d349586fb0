// rotary_write: queries and keys are turned to their positions; keys and values go to their cache slots.
#pragma once

#include "params/common.h"

namespace pyspec {

struct RotaryWriteParams {
  const float* qkv;      // [rows, (heads + 2 kv_heads) * head_dim]: queries, keys, values
  const float* cos_sin;  // [positions, 2, width / 2], contiguous: cosines, then sines
  const float* norm;  // [norm_rows, head_dim], contiguous, or null: weights of queries' norms, then of keys'
  const float* query_scales;  // [positions], contiguous, or null: what turned queries are multiplied by
  const int32_t* positions;   // [rows]
  const int32_t* sequences;   // [rows]
  const int32_t* slots;       // [rows]
  void* q;                    // [rows, heads, head_dim], contiguous
  void* k;                    // [batch, kv_heads, slots, head_dim]
  void* v;                    // like k

  int64_t qkv_stride, k_strides[3], v_strides[3];  // in elements; the last dimension is contiguous
  int64_t rows, heads, kv_heads, head_dim;
  int64_t width;      // of a head's dimensions, the first that are turned
  int64_t norm_rows;  // 2: each head is normalised by itself; heads + kv_heads: all of a row together
  float epsilon;
  bool norms_values;  // values are divided by their root mean square, each head's by its own
  Element element;    // of q, k and v
  ParallelFor parallel_for;
};

}  // namespace pyspec
