// gear: quantised keys and values (pyspec/ops/gear.py), params and the format that every backend reads.
//
// Format version 1. kBlock = 128 tokens of one KV head become one record: first its keys, then its values,
// each
//   scale, zero  fp16 [groups][vectors] each: x = zero + scale * code. Keys: [kBlock / group][head_dim], a
//                scale for `group` tokens of a channel. Values: [head_dim / width][kBlock], a scale for
//                width = min(group, head_dim) channels of a token.
//   codes        of the first 64 tokens, then of the last 64. Sixteen tokens and two channels (keys) or
//                sixteen channels and two tokens (values) are a vector of 32 codes: code 2 j + i is that of
//                token j and channel i (channel j and token i). A half has 2 * head_dim vectors:
//                  keys    vector 4 p + t   channels 2 p and 2 p + 1 of tokens 16 t ..
//                  values  vector p * (head_dim / 16) + c   tokens 2 p and 2 p + 1, channels 16 c ..
//                16 / bits vectors, one after another, share 32 uint16: the first lies in the lowest bits.
//                3 bits are two such planes, the low 2 bits of all vectors and then the high bit.
//   low rank     factor fp32 [rank], int8 a [rank][kBlock] (tokens), int8 b [rank][head_dim]:
//                x += factor[r] * a[r][token] * b[r][channel]
//   outliers     bf16 value [outliers][vectors], uint8 index [outliers][vectors]; a vector is a channel of
//                keys, its index a token; or a token of values, its index a channel. There
//                (x without the low rank) is zero + scale * ((2^bits - 1) / 2 + value).
//   channels     keys only: uint8 [key_channels], ascending. Where key_channels is not 0, a record has that
//   many
//                channels of its keys, these, and head_dim above is key_channels; the others count as 0.
// and zeros up to a multiple of 64 bytes. Numbers are little-endian.
#pragma once

#include "params/common.h"

namespace pyspec {

struct GearFormat {
  int64_t bits;          // 2, 3, 4 or 8
  int64_t group;         // 32, 64 or 128
  int64_t rank;          // 0 .. 16
  int64_t outliers;      // 0 .. 16 of each vector, half of them its smallest
  int64_t key_channels;  // 0 for all, or a multiple of 16 below head_dim
};

struct GearAttentionParams {
  const void* q;             // [batch, heads, nodes, head_dim]
  const uint8_t* quantised;  // [batch, kv_heads, blocks, record], the last dimension contiguous
  const int32_t* seen;       // [batch, nodes], contiguous: the first blocks that a node sees
  const int32_t* oldest;     // like seen: and of them the tokens from this one on; null for all
  void* out;                 // [batch, heads, nodes, head_dim]
  float* lse;                // [batch, heads, nodes], contiguous, natural log
  float* workspace;          // gear_workspace_floats() of these params, 64-byte aligned

  int64_t q_strides[3], out_strides[3];  // in elements; the last dimension is contiguous
  int64_t quantised_strides[3];          // in bytes
  int64_t batch, heads, kv_heads, nodes, head_dim;
  int64_t most_seen;  // largest of seen
  GearFormat format;

  float scale;
  Element element;
  ParallelFor parallel_for;
};

struct GearEncodeParams {
  const void*
      k;  // [batch, kv_heads, blocks * kBlock, key_channels or head_dim], the last dimension contiguous
  const void* v;            // [batch, kv_heads, blocks * kBlock, head_dim], the last dimension contiguous
  const uint8_t* channels;  // [batch, kv_heads, blocks, key_channels], contiguous
  uint8_t* quantised;       // [batch, kv_heads, blocks, record], contiguous

  int64_t k_strides[3], v_strides[3];  // in elements
  int64_t batch, kv_heads, blocks, head_dim;
  GearFormat format;
  int64_t fitted;  // 0 or 1: ranges and low rank for the least squared error
  Element element;
  ParallelFor parallel_for;
};

namespace {  // compiled once per instruction set, so never shared between object files

constexpr int64_t kBlock = 128;  // tokens of a record
constexpr int64_t kHalf = 64;    // tokens whose codes are unpacked at a time
constexpr int64_t kMostRank = 16, kMostOutliers = 16;
constexpr float kSmallestScale =
    0x1p-14f;  // of a group whose values are all the same; fp16's smallest normal

// Channels of a record's keys.
inline int64_t gear_key_dim(const GearFormat& f, int64_t head_dim) {
  return f.key_channels ? f.key_channels : head_dim;
}

// Where the parts of a side, keys or values, begin, in bytes.
struct GearSide {
  int64_t scale, zero, codes, half_codes, factor, a, b, outlier_values, outlier_indices, channels, bytes;

  GearSide(const GearFormat& f, int64_t head_dim, bool values) {
    if (!values) head_dim = gear_key_dim(f, head_dim);
    int64_t width = f.group < head_dim ? f.group : head_dim;
    int64_t scales = values ? head_dim / width * kBlock : kBlock / f.group * head_dim;
    int64_t vectors = values ? kBlock : head_dim;
    scale = 0;
    zero = 2 * scales;
    codes = 4 * scales;
    half_codes = kHalf * head_dim * f.bits / 8;
    factor = codes + 2 * half_codes;
    a = factor + 4 * f.rank;
    b = a + f.rank * kBlock;
    outlier_values = b + f.rank * head_dim;
    outlier_indices = outlier_values + 2 * f.outliers * vectors;
    channels = outlier_indices + f.outliers * vectors;
    bytes = channels + (values ? 0 : f.key_channels);
  }
};

inline int64_t gear_record_bytes(const GearFormat& f, int64_t head_dim) {
  return (GearSide(f, head_dim, false).bytes + GearSide(f, head_dim, true).bytes + 63) / 64 * 64;
}

// As for tree_attention, the row rule lives here: blocks are folded in order within chunks, whose results are
// merged in order. The first chunks are short, so that a short text is shared out too.
constexpr int64_t kGearChunkBlocks = 8, kGearShortChunkBlocks = 2, kGearShortChunks = 4;

inline int64_t gear_first_block(int64_t chunk) {
  return chunk < kGearShortChunks
             ? chunk * kGearShortChunkBlocks
             : kGearShortChunks * kGearShortChunkBlocks + (chunk - kGearShortChunks) * kGearChunkBlocks;
}
inline int64_t gear_chunks(int64_t blocks) {
  int64_t chunks = 0;
  while (gear_first_block(chunks) < blocks) ++chunks;
  return chunks;
}

constexpr int64_t kGearRows = 32;  // query rows that share an unpacked half

// Query rows of a KV head, (node, head of its group), filled up to whole sets of kGearRows.
inline int64_t gear_row_sets(const GearAttentionParams& p) {
  return (p.nodes * (p.heads / p.kv_heads) + kGearRows - 1) / kGearRows;
}
// Values, largest score and sum of a row, filled up so that rows are aligned.
inline int64_t gear_state_floats(int64_t head_dim) { return head_dim + 16; }

// [batch, kv_heads, rows, head_dim] queries, then [batch, kv_heads, chunks, rows] states.
inline int64_t gear_workspace_floats(const GearAttentionParams& p) {
  int64_t rows = p.batch * p.kv_heads * gear_row_sets(p) * kGearRows;
  return rows * (p.head_dim + gear_chunks(p.most_seen) * gear_state_floats(p.head_dim));
}

}  // namespace
}  // namespace pyspec
