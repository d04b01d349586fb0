// tree_attention: params and the workspace layout that its two phases share.
#pragma once

#include "params/attention.h"

namespace pyspec {

struct TreeAttentionParams {
  const void* q;  // [batch, heads, nodes, head_dim]
  const void* k;  // [batch, kv_heads, slots, head_dim], or pages [pages, kv_heads, page, head_dim]
  const void* v;  // like k
  const int32_t* ancestor_bits;  // [batch, nodes, words], contiguous; may name nodes that are not among these
  const int32_t* prefix_lens;    // [batch]
  const int32_t* block_table;    // [batch, pages of a sequence], contiguous, or null
  const float* sinks;            // [heads], scores of a key without a value, or null
  void* out;                     // [batch, heads, nodes, head_dim]
  float* lse;                    // [batch, heads, nodes], contiguous, natural log
  float* workspace;              // workspace_floats() of these params, 64-byte aligned

  // In elements; the last dimension is contiguous.
  int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3];
  int64_t batch, heads, kv_heads, nodes, head_dim;
  int64_t words;               // of a node's ancestor bits
  int64_t page;                // slots of a page; without a block table, all slots
  int64_t block_table_stride;  // pages of a sequence
  int64_t longest_prefix;      // largest of prefix_lens

  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none
  bool chunked;    // windows do not slide: they begin at multiples of their length
  Element element;
  ParallelFor parallel_for;
};

namespace {  // compiled once per instruction set, so never shared between object files

// How the rows of one KV head are laid out over blocks of lanes. A node's group stays together in a block,
// or, for more than kLanes heads a group, fills blocks of its own.
struct LaneLayout {
  int64_t group, nodes_per_block, blocks_per_node, blocks;

  explicit LaneLayout(const TreeAttentionParams& p)
      : group(p.heads / p.kv_heads),
        nodes_per_block(group <= kLanes ? kLanes / group : 1),
        blocks_per_node(ceil_div(group, kLanes)),
        blocks(group <= kLanes ? ceil_div(p.nodes, nodes_per_block) : p.nodes * blocks_per_node) {}

  int64_t first_node(int64_t block) const { return block / blocks_per_node * nodes_per_block; }
  // Node and head within the group of a lane; a lane past the last one has a node or head out of range.
  int64_t node(int64_t block, int64_t lane) const {
    return blocks_per_node > 1 ? first_node(block) : first_node(block) + lane / group;
  }
  int64_t head(int64_t block, int64_t lane) const {
    return blocks_per_node > 1 ? block % blocks_per_node * kLanes + lane : lane % group;
  }
  // The lanes of a block that are rows: its first ones.
  int64_t used(int64_t block, int64_t nodes) const {
    if (blocks_per_node > 1) {
      int64_t heads = group - block % blocks_per_node * kLanes;
      return heads < kLanes ? heads : kLanes;
    }
    int64_t left = nodes - first_node(block);
    return (left < nodes_per_block ? left : nodes_per_block) * group;
  }
};

inline int64_t chunks(int64_t prefix) { return prefix < kTile ? 0 : chunk_of(prefix / kTile - 1) + 1; }

// [batch, kv_heads, blocks] laid out queries, then [batch, kv_heads, chunks, blocks] states.
inline int64_t workspace_floats(const TreeAttentionParams& p) {
  int64_t blocks = p.batch * p.kv_heads * LaneLayout(p).blocks;
  return blocks * (query_floats(p.head_dim) + chunks(p.longest_prefix) * state_floats(p.head_dim));
}

}  // namespace
}  // namespace pyspec
