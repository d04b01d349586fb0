// residual_vq: keys and values as sums of codewords (pyspec/ops/residual_vq.py), params and the format that
// every backend reads.
//
// Format version 1. kVqBlock = 128 tokens of one KV head become one record: first its keys, then its values,
// each
//   scale  fp16 [kVqBlock]: of each token, the standard deviation of its channels
//   codes  [groups][depth][level]: groups = head_dim / 32. Group g has channels g, g + groups, ... of keys,
//          and 32 g .. 32 g + 31 of values. A level is
//            uint8 [kVqBlock]              the low 8 bits of each token's code
//            [bits - 8][kVqBlock / 8]      a plane for each higher bit, lowest plane first: bit t % 8 of
//                                          byte t / 8 is token t's. 256 codes have none, 2048 have three.
// and zeros up to a multiple of 64 bytes. Numbers are little-endian. A vector of a group is
//   scale * (C_0[code_0] + C_1[code_1] + ...)
// with codebooks C fp16 [2 (keys, values)][depth][codes][32]. Whether keys were coded before rotary embedding
// is the codebooks' to know, not the record's: attention is given `rotary` then.
#pragma once

#include "params/common.h"

namespace pyspec {

struct VqFormat {
  int64_t depth;  // 1 .. 16
  int64_t codes;  // 256 or 2048
};

struct VqAttentionParams {
  const void* q;              // [batch, heads, nodes, head_dim]
  const uint8_t* quantised;   // [batch, kv_heads, blocks, record], the last dimension contiguous
  const int32_t* seen;        // [batch, nodes], contiguous: the first blocks that a node sees
  const int32_t* oldest;      // like seen: and of them the tokens from this one on; null for all
  const uint16_t* codebooks;  // fp16 [2, depth, codes, 32], contiguous
  const float* rotary;  // [kVqBlock + blocks, 2, head_dim / 2], contiguous: see below; null: keys are turned
  void* out;            // [batch, heads, nodes, head_dim]
  float* lse;           // [batch, heads, nodes], contiguous, natural log
  float* workspace;     // 64-byte aligned; on the CPU vq_workspace_floats() of these params

  int64_t q_strides[3], out_strides[3];  // in elements; the last dimension is contiguous
  int64_t quantised_strides[3];          // in bytes
  int64_t batch, heads, kv_heads, nodes, head_dim;
  int64_t most_seen;  // largest of seen; on a GPU, which does not wait for it, all blocks
  VqFormat format;

  float scale;
  Element element;
  ParallelFor parallel_for;  // on the CPU
};

// Keys that were coded before rotary embedding are turned by attention: with cosines and sines of a token's
// place in its block, rows 0 .. kVqBlock - 1 of `rotary`, after the query was turned back by those of the
// block's first position, row kVqBlock + block. Channel c is turned with channel c + head_dim / 2; both are
// of one group.

struct VqEncodeParams {
  const void* k;              // [batch, kv_heads, blocks * kVqBlock, head_dim], the last dimension contiguous
  const void* v;              // like k
  const uint16_t* codebooks;  // fp16 [batch, 2, depth, codes, 32], contiguous but for the first dimension
  uint8_t* quantised;         // [batch, kv_heads, blocks, record], contiguous

  int64_t k_strides[3], v_strides[3];  // in elements
  int64_t codebooks_stride;            // of the first dimension, in elements; may be 0
  int64_t batch, kv_heads, blocks, head_dim;
  VqFormat format;
  Element element;
  ParallelFor parallel_for;
};

namespace {  // compiled once per instruction set, so never shared between object files

constexpr int64_t kVqBlock = 128;  // tokens of a record
constexpr int64_t kVqWidth = 32;   // channels of a group
constexpr int64_t kVqMostDepth = 16, kVqMostCodes = 2048;
constexpr int64_t kVqPlane = kVqBlock / 8;  // bytes of one high bit

constexpr int64_t vq_planes(const VqFormat& f) { return f.codes == 256 ? 0 : 3; }
constexpr int64_t vq_level_bytes(const VqFormat& f) { return kVqBlock + vq_planes(f) * kVqPlane; }
constexpr int64_t vq_side_bytes(const VqFormat& f, int64_t head_dim) {
  return 2 * kVqBlock + head_dim / kVqWidth * f.depth * vq_level_bytes(f);
}
constexpr int64_t vq_record_bytes(const VqFormat& f, int64_t head_dim) {
  return (2 * vq_side_bytes(f, head_dim) + 63) / 64 * 64;
}

// ==== the workspace of attention on the CPU ====

// As for tree_attention, the row rule lives here: a chunk of so many blocks has one maximum, and chunks are
// merged in order.
constexpr int64_t kVqChunkBlocks = 32;
constexpr int64_t vq_chunks(int64_t blocks) { return (blocks + kVqChunkBlocks - 1) / kVqChunkBlocks; }

// Query rows of a KV head, (node, head of its group), are taken in sets, of 4 where they are few, else of 16.
inline int64_t vq_rows(const VqAttentionParams& p) { return p.nodes * (p.heads / p.kv_heads); }
inline int64_t vq_set_rows(const VqAttentionParams& p) { return vq_rows(p) <= 8 ? 4 : 16; }
inline int64_t vq_sets(const VqAttentionParams& p) {
  return (vq_rows(p) + vq_set_rows(p) - 1) / vq_set_rows(p);
}
inline int64_t vq_state_floats(int64_t head_dim) { return head_dim + 16; }  // values, maximum, sum
inline int64_t vq_table_floats(const VqAttentionParams& p) {
  return p.rotary ? 0 : p.head_dim / kVqWidth * p.format.depth * p.format.codes * vq_set_rows(p);
}
inline int64_t vq_place_floats(const VqAttentionParams& p) { return p.rotary ? kVqBlock * p.head_dim : 0; }

// [depth, 32, codes] the codewords of keys in fp32, transposed, or with `rotary` [depth, codes, 32] as they
// are; then either [batch, kv_heads, sets, groups, depth, codes, set_rows] tables or [kVqBlock / 16, head_dim
// / 2, 2, 16] cosines and sines of places, tokens as lanes; then [batch, kv_heads, sets, chunks, set_rows]
// states.
inline int64_t vq_workspace_floats(const VqAttentionParams& p) {
  int64_t states = vq_chunks(p.most_seen) * vq_set_rows(p) * vq_state_floats(p.head_dim);
  return p.format.depth * kVqWidth * p.format.codes + vq_place_floats(p) +
         p.batch * p.kv_heads * vq_sets(p) * (vq_table_floats(p) + states);
}

}  // namespace
}  // namespace pyspec
