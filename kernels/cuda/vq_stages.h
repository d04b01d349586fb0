// residual_vq on a GPU: what a block of threads is for, the codewords and codes that it copies to shared
// memory while it multiplies others, and its queries.
//
// A stage is four levels of the keys or the values. Codebooks of 256 are copied: keys' codewords as they lie,
// 64 bytes one after the other; of values, the two halves of a codeword lie in lines of 128 bytes that the
// four levels share, so that lanes which read different levels meet no bank twice. Those of 2048 do not fit,
// and a chunk has half as many codes as they have codewords: they are read from the caches. Codes are copied
// by the warp that reads them.
#pragma once

#include <cuda_bf16.h>

#include "cuda/tensor_core.h"
#include "params/residual_vq.h"

extern __shared__ uint4 dynamic_shared[];

namespace pyspec {
namespace {

constexpr int kChunkBlocks = 2, kChunk = kChunkBlocks * kVqBlock;
constexpr int kRun = 64;             // tokens that a warp has side by side
constexpr int kLevels = 4;           // of a stage
constexpr int kWord = 2 * kVqWidth;  // bytes of a codeword
constexpr int kStageWords = kLevels * 256 * kWord;
constexpr int kWeights = kChunk + 8;  // of a row; rows begin in different banks
constexpr uint32_t kAll = ~0u;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

__device__ float load(const void* from, Element element, int64_t i) {
  if (element == Element::kFloat32) return static_cast<const float*>(from)[i];
  if (element == Element::kFloat16) return __half2float(static_cast<const __half*>(from)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(from)[i]);
}

// Sizes of the problem, and where things are in shared memory, in bytes; worked out on the host.
struct Sizes {
  int rows, groups, depth, chunks;
  int stages;   // of keys, and again of values
  int buffers;  // 1 or 2 stages lie in shared memory
  int level_bytes, side_bytes;
  int codes, scales, units, queries, bytes;  // codewords, scores and results are at 0; weights at queries
};

// A query row: rows of a KV head are (node, head of its group).
struct Row {
  int node, head;

  __device__ Row(const VqAttentionParams& p, int kv_head, int row) {
    int of_kv_head = static_cast<int>(p.heads) / static_cast<int>(p.kv_heads);
    node = row / of_kv_head, head = kv_head * of_kv_head + row % of_kv_head;
  }
  // Blocks that it sees, however wrong `seen` is.
  __device__ int seen(const VqAttentionParams& p, int64_t b) const {
    int count = p.seen[b * p.nodes + node];
    return count < 0 ? 0 : count < p.most_seen ? count : static_cast<int>(p.most_seen);
  }
  // The first token that it sees: where a window begins, or 0.
  __device__ int oldest(const VqAttentionParams& p, int64_t b) const {
    return p.oldest ? max(p.oldest[b * p.nodes + node], 0) : 0;
  }
  // The values of a chunk, the exponent that they and the sum are over, and the sum of weights.
  __device__ float* state(const VqAttentionParams& p, int64_t b, int64_t chunks, int64_t chunk) const {
    return p.workspace + (((b * p.heads + head) * p.nodes + node) * chunks + chunk) * (p.head_dim + 2);
  }
};

template <bool kLargest>
__device__ float across_warp(float x) {
#pragma unroll
  for (int with = 16; with > 0; with /= 2) {
    float other = __shfl_xor_sync(kAll, x, with);
    x = kLargest ? fmaxf(x, other) : x + other;
  }
  return x;
}

// With each product rounded, or not, by its name: kernels of few and of many rows must not differ.
__device__ void turn(float& x, float& y, float cosine, float sine) {
  float turned = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
  y = __fmaf_rn(y, cosine, __fmul_rn(x, sine)), x = turned;
}

// Two floats as fp16, and what that leaves of them.
template <bool kSplit>
__device__ void split(float x, float y, uint32_t (&parts)[1 + kSplit]) {
  parts[0] = pack_halves(x, y);
  if constexpr (kSplit) parts[1] = pack_halves(x - half_at(parts[0], 0), y - half_at(parts[0], 1));
}

// What a block and its threads are for.
template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
struct VqStages {
  static constexpr int kRows = 8 * kTiles, kParts = 1 + kSplit;  // rows, fp16 numbers for one of them
  static constexpr int kTokens = kRuns * kRun,
                       kSlices = kChunk / kTokens;             // of a warp, of warps with a group
  static constexpr int kBook = (kSmall ? 256 : 2048) * kWord;  // bytes of a level
  static constexpr int kPlane = kTokens / 8,
                       kCodes = kTokens + 3 * kPlane + 8;  // bytes of a warp's codes of a level

  const VqAttentionParams& p;
  const Sizes& of;
  uint8_t* shared;
  int tid, warp, lane, g, t;      // the lane is 4 g + t
  int group, slice, first_token;  // of the warp
  int first_row, chunk;
  int most;  // blocks that any row sees

  __device__ VqStages(const VqAttentionParams& params, const Sizes& sizes)
      : p(params), of(sizes), shared(reinterpret_cast<uint8_t*>(dynamic_shared)) {
    tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    group = warp / kSlices, slice = warp % kSlices, first_token = slice * kTokens;
    chunk = blockIdx.x % of.chunks, first_row = blockIdx.x / of.chunks * kRows;
    most = __reduce_max_sync(kAll, lane < kRows ? seen(lane) : 0);
  }

  // Blocks that a row sees; none where there is no row.
  __device__ int seen(int row) const {
    return first_row + row < of.rows ? Row(p, blockIdx.y, first_row + row).seen(p, blockIdx.z) : 0;
  }
  // The first token that a row sees.
  __device__ int oldest(int row) const { return Row(p, blockIdx.y, first_row + row).oldest(p, blockIdx.z); }
  // Whether some row sees some of the chunk.
  __device__ bool is_seen() const {
    if (most <= chunk * kChunkBlocks) return false;
    if (!p.oldest) return true;
    int first = lane < kRows && seen(lane) ? oldest(lane) / static_cast<int>(kVqBlock) : most;
    return __reduce_min_sync(kAll, first) < (chunk + 1) * kChunkBlocks;
  }
  // Records that no row sees may hold anything, or not be there: the last that is stands in for them.
  __device__ const uint8_t* record(int which) const {
    int64_t block = chunk * kChunkBlocks + which;
    return p.quantised + blockIdx.z * p.quantised_strides[0] + blockIdx.y * p.quantised_strides[1] +
           (block < most ? block : most - 1) * p.quantised_strides[2];
  }
  __device__ uint8_t* buffer(int stage) const {
    return shared + (kSmall ? (stage & (of.buffers - 1)) * kStageWords : 0);
  }
  __device__ uint8_t* codes(int stage) const {
    return shared + of.codes + ((stage & (of.buffers - 1)) * (blockDim.x / 32) + warp) * kLevels * kCodes;
  }
  __device__ int first_level(int stage) const {
    return (stage < of.stages ? stage : stage - of.stages) * kLevels;
  }
  __device__ int levels(int stage) const { return min(kLevels, of.depth - first_level(stage)); }
  __device__ const uint8_t* books(int stage) const {
    int first = (stage < of.stages ? 0 : of.depth) + first_level(stage);
    return reinterpret_cast<const uint8_t*>(p.codebooks) + static_cast<int64_t>(first) * kBook;
  }

  // ==== stages ====

  // Begins to copy a stage: the warp's codes, then codewords, for all, in as many groups as there are levels.
  __device__ void begin(int stage) const {
    bool is_there = stage < 2 * of.stages, is_values = stage >= of.stages;
    if (is_there) begin_codes(stage, is_values);
    if (stage == 0 && tid < kChunk) {  // scales: [keys, values][token]
      const uint8_t* from = record(tid / (kVqBlock / 2) % 2) + tid / kVqBlock * of.side_bytes;
      copy_later<4>(shared + of.scales + tid * 4, from + tid % (kVqBlock / 2) * 4);
    }
    // 16 bytes: of keys at their place; of values, of level tid / 2 % 4, at a quarter of it.
    int own = is_values ? tid / 2 % kLevels : 0, shift = is_values ? 2 : 0;
    const uint8_t* from = books(stage) + (is_values ? own * kBook + tid % 2 * 16 - tid % 8 * 4 : 0);
#pragma unroll 1
    for (int level = 0; level < kLevels; ++level) {
      if (kSmall && is_there && (is_values ? own : level) < levels(stage)) {
        for (int at = level * kBook + tid * 16; at < (level + 1) * kBook; at += blockDim.x * 16)
          copy_later<16>(buffer(stage) + at, from + (at >> shift));
      }
      close_copies();
    }
  }
  __device__ void begin_codes(int stage, bool is_values) const {
    int level = lane / 8, place = first_token % kVqBlock;
    if (level >= levels(stage)) return;
    const uint8_t* from = record(first_token / kVqBlock) + is_values * of.side_bytes + 2 * kVqBlock +
                          (group * of.depth + first_level(stage) + level) * of.level_bytes;
    uint8_t* to = codes(stage) + level * kCodes;
    for (int at = lane % 8 * 4; at < kTokens; at += 32) copy_later<4>(to + at, from + place + at);
    for (int at = lane % 8 * 4; at < 3 * kPlane && !kSmall; at += 32)
      copy_later<4>(to + kTokens + at, from + kVqBlock + at / kPlane * kVqPlane + place / 8 + at % kPlane);
  }
  // Until a level of a stage is there for all, and those before it.
  __device__ void await(int level) const {
    await_copies((of.buffers - 1) * kLevels + kLevels - 1 - level);
    __syncthreads();
  }

  // The codes of a warp's tokens from `first` on in one level.
  template <int kCount>
  __device__ static void read_codes(const uint8_t* level, int first, uint32_t (&code)[kCount]) {
    uint32_t low = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint8_t* at = level + first + i;
      if (i % 4 == 0) low = kCount == 1 ? *at : *reinterpret_cast<const uint32_t*>(at);
      code[i] = low >> i % 4 * 8 & 255;
    }
#pragma unroll
    for (int plane = 0; plane < (kSmall ? 0 : 3); ++plane) {
      uint32_t bits = level[kTokens + plane * kPlane + first / 8] >> first % 8;
#pragma unroll
      for (int i = 0; i < kCount; ++i) code[i] |= (bits >> i & 1) << (8 + plane);
    }
  }
  // ==== queries ====

  using Queries = uint32_t[kParts][kTiles][4];

  __device__ float* unit(int record) const {
    return reinterpret_cast<float*>(shared + of.units) + record * kRows;
  }
  __device__ uint16_t* query(int record, int part, int row) const {
    return reinterpret_cast<uint16_t*>(shared + of.queries) +
           ((record * kParts + part) * kRows + row) * p.head_dim;
  }

  // Rows in shared memory, [group][32], in units of a power of two that puts the largest in [1, 2): once, or
  // turned back by each record's first position.
  __device__ void lay_out_queries() const {
    int half = static_cast<int>(p.head_dim) / 2;
    for (int item = warp; item < (kTurned ? 2 : 1) * kRows; item += blockDim.x / 32) {
      int which = item / kRows, row = item % kRows;
      float x[4][2] = {}, largest = 0.0f;
      if (first_row + row < of.rows) {
        Row at(p, blockIdx.y, first_row + row);
        int64_t start = blockIdx.z * p.q_strides[0] + at.head * p.q_strides[1] + at.node * p.q_strides[2];
        int64_t block = min(chunk * kChunkBlocks + which, most - 1);
        const float* cosines = p.rotary + (kVqBlock + block) * p.head_dim;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          int c = lane + 32 * i;
          if (c >= half) break;
          float first = load(p.q, p.element, start + c), second = load(p.q, p.element, start + half + c);
          float cosine = kTurned ? cosines[c] : 1.0f, sine = kTurned ? cosines[half + c] : 0.0f;
          if (kTurned) turn(first, second, cosine, -sine);
          x[i][0] = first, x[i][1] = second;
          largest = fmaxf(largest, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
        }
      }
      uint32_t exponent = __float_as_uint(across_warp<true>(largest)) >> 23;
      exponent = exponent < 7 ? 7 : exponent > 253 ? 253 : exponent;
      if (lane == 0) unit(which)[row] = __uint_as_float(exponent << 23);
      float factor = __uint_as_float((254 - exponent) << 23);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int c = lane + 32 * i, place = c % of.groups * kVqWidth + c / of.groups;
        if (c >= half) break;
        uint32_t parts[kParts];
        split<kSplit>(x[i][0] * factor, x[i][1] * factor, parts);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          query(which, part, row)[place] = static_cast<uint16_t>(parts[part]);
          query(which, part, row)[place + kVqWidth / 2] = static_cast<uint16_t>(parts[part] >> 16);
        }
      }
    }
  }

  // Row g of each tile: channels 8 t .. 8 t + 7 of the group, or with rotary 4 t .. 4 t + 3 and their
  // partners.
  __device__ void read_queries(Queries& to) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint16_t* row =
            query(kTurned ? first_token / kVqBlock : 0, part, 8 * tile + g) + group * kVqWidth;
        uint2 first = *reinterpret_cast<const uint2*>(row + (kTurned ? 4 : 8) * t);
        uint2 second = *reinterpret_cast<const uint2*>(row + (kTurned ? 16 + 4 * t : 8 * t + 4));
        to[part][tile][0] = first.x, to[part][tile][1] = first.y;
        to[part][tile][2] = second.x, to[part][tile][3] = second.y;
      }
    }
  }
};

}  // namespace
}  // namespace pyspec
