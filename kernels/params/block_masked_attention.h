// block_masked_attention: params. Lists and bits are those of pyspec.BlockMask.
#pragma once

#include "params/attention.h"

namespace pyspec {

struct BlockMaskedAttentionParams {
  const void* q;                  // [batch, heads, rows, head_dim]
  const void* k;                  // [batch, kv_heads, keys, head_dim]
  const void* v;                  // like k
  const int32_t* full_ranges;     // [mask_batch, mask_heads, blocks, 2], begin and end in full_tiles
  const int32_t* full_tiles;      // key tiles that every row of the block sees whole
  const int32_t* partial_ranges;  // [mask_batch, mask_heads, blocks, 2], begin and end in partial_tiles
  const int32_t* partial_tiles;   // [..., 2], key tile and which of bits
  const uint64_t* bits;      // [..., words, kTile], bit r of [w][j]: row 64 w + r of a tile sees its key j
  const int32_t* row_order;  // [mask_batch, rows] or null: place i of the tiles holds row row_order[i]
  const int32_t* key_order;  // [mask_batch, keys] or null
  const float* sinks;        // [heads], scores of a key without a value, or null; forward only
  void* out;                 // [batch, heads, rows, head_dim]
  float* lse;                // [batch, heads, rows], contiguous, natural log

  // In elements; the last dimension is contiguous.
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  int64_t batch, heads, kv_heads, rows, keys, head_dim;
  int64_t mask_batch, mask_heads;  // 1, or batch and heads
  int64_t blocks, words;           // a row block has 64 * words rows

  float scale;
  float softcap;  // 0: none
  Element element;
  ParallelFor parallel_for;
};

// What the forward read and wrote, and what comes back through it.
struct BlockMaskedAttentionBackwardParams : BlockMaskedAttentionParams {
  const void* d_out;   // like out
  const float* d_lse;  // [batch, heads, rows] contiguous, or null
  void* dq;            // like q
  void* dk;            // like k
  void* dv;            // like k

  // A segment is a run of row blocks that one thread goes through; what each adds to a key is summed at last.
  float* sums;       // [batch, kv_heads, segments, key tiles, 2, kTile * head_dim], of dk and dv
  uint8_t* visited;  // [batch, kv_heads, segments, key tiles], whether sums has something

  int64_t d_out_strides[3], dq_strides[3], dk_strides[3], dv_strides[3];
  int64_t segments;
};

namespace {

// So many that there is work for some threads, where there are few heads: each has sums of its own. The
// number of threads does not count: it changes no bit of a gradient.
inline int64_t backward_segments(int64_t sequence_heads, int64_t blocks) {
  constexpr int64_t kItems = 16, kLeastBlocks = 4;
  int64_t most = ceil_div(blocks, kLeastBlocks), wanted = ceil_div(kItems, sequence_heads);
  return wanted < most ? wanted : most;
}

}  // namespace
}  // namespace pyspec
