// Attention to keys and values that are sums of codewords, on tensor cores, in two launches.
//
// fold: a block takes up to 8 kTiles query rows of a KV head over a chunk of 256 tokens, a warp a group of 32
// channels of 64 of these. Nothing is summed before it is multiplied: scores are products over (level,
// channel), results over (level, token), so codewords go to the tensor cores as they lie in the codebooks,
// exact, and fp32 sums are all there is. Codebooks of 256 are streamed through shared memory, four levels at
// a time, the next four while these are read; those of 2048 are read from the caches. Queries, and weights
// times the scales of values, are fp16 with a factor for each row; fp32 rows take a second product with what
// fp16 leaves of them. merge: a row's chunks, in order.
//
// Scores: a lane reads a quarter of two tokens' codewords, and four lanes a codeword, which has half of the
// banks. Results: the four lanes t of a column have a level each, which has a quarter of the banks, so that
// no two of them meet, and channels in pairs are turned to tokens in pairs by byte permutes.
//
// Keys that were coded before rotary embedding are summed over the four levels and turned to their places in
// the record, for queries that were turned back by the record's first position.
//
// A column of a tensor core's product does not depend on the others, and sums have one order: the row rule.
//
// Bound by reads of shared memory: 64 bytes for a codeword, 16 clocks of a multiprocessor for a token's 128
// channels at 8 levels, and half as much again for keys, where two codewords often meet in one half of the
// banks; then by the L2 cache, where each block reads all codebooks once.
#include <cuda_bf16.h>

#include "cuda/tensor_core.h"
#include "params/residual_vq.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::Element;
using pyspec::half_at;
using pyspec::kVqBlock;
using pyspec::kVqWidth;
using pyspec::multiply_add;
using pyspec::pack_halves;
using pyspec::VqAttentionParams;

constexpr int kChunkBlocks = 2, kChunk = kChunkBlocks * kVqBlock;
constexpr int kRun = 64;             // tokens that a warp has side by side
constexpr int kLevels = 4;           // of a stage
constexpr int kWord = 2 * kVqWidth;  // bytes of a codeword
constexpr int kStageWords = kLevels * 256 * kWord;
constexpr int kWeights = kChunk + 8;  // of a row; rows begin in different banks
constexpr uint32_t kAll = ~0u;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

__device__ void from_float(float x, float* to) { *to = x; }
__device__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

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

// Two floats as fp16, and what that leaves of them.
template <bool kSplit>
__device__ void split(float x, float y, uint32_t (&parts)[1 + kSplit]) {
  parts[0] = pack_halves(x, y);
  if constexpr (kSplit) parts[1] = pack_halves(x - half_at(parts[0], 0), y - half_at(parts[0], 1));
}

// What a block and its threads are for.
template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
struct Fold {
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
  int seen, most;  // blocks that row `lane` sees, and any row

  __device__ Fold(const VqAttentionParams& params, const Sizes& sizes)
      : p(params), of(sizes), shared(reinterpret_cast<uint8_t*>(dynamic_shared)) {
    tid = threadIdx.x, warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
    group = warp / kSlices, slice = warp % kSlices, first_token = slice * kTokens;
    chunk = blockIdx.x % of.chunks, first_row = blockIdx.x / of.chunks * kRows;
    bool is_row = lane < kRows && first_row + lane < of.rows;
    seen = is_row ? Row(p, blockIdx.y, first_row + lane).seen(p, blockIdx.z) : 0;
    most = __reduce_max_sync(kAll, seen);
  }

  // Records that no row sees may hold anything, or not be there: the last that is stands in for them.
  __device__ const uint8_t* record(int which) const {
    int64_t block = chunk * kChunkBlocks + which;
    return p.packed + blockIdx.z * p.packed_strides[0] + blockIdx.y * p.packed_strides[1] +
           (block < most ? block : most - 1) * p.packed_strides[2];
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

  // Begins to copy a stage: codewords for all, keys' as they lie, values' a level in each quarter of 128
  // bytes; the warp's codes for itself.
  __device__ void begin(int stage) const {
    if (stage < 2 * of.stages) {
      bool is_values = stage >= of.stages;
      if constexpr (kSmall) {
        int threads = blockDim.x, end = levels(stage) * kBook, step = threads * 16;
        const uint8_t* from = books(stage) + tid * 16;
        if (is_values) {
          int level = tid / 2 % kLevels;
          from = books(stage) + level * kBook + tid / 8 * 32 + tid % 2 * 16;
          end = level < levels(stage) ? kStageWords : 0, step = threads * 4;
        }
#pragma unroll 4
        for (int at = tid * 16; at < end; at += threads * 16, from += step)
          pyspec::copy_later<16>(buffer(stage) + at, from);
      }
      int level = lane / 8, place = first_token % kVqBlock;
      if (level < levels(stage)) {
        const uint8_t* from = record(first_token / kVqBlock) + is_values * of.side_bytes + 2 * kVqBlock +
                              (group * of.depth + first_level(stage) + level) * of.level_bytes;
        uint8_t* to = codes(stage) + level * kCodes;
        for (int at = lane % 8 * 4; at < kTokens; at += 32) pyspec::copy_later<4>(to + at, from + place + at);
        for (int at = lane % 8 * 4; at < 3 * kPlane && !kSmall; at += 32)
          pyspec::copy_later<4>(to + kTokens + at,
                                from + kVqBlock + at / kPlane * pyspec::kVqPlane + place / 8 + at % kPlane);
      }
      if (stage == 0 && tid < kChunk) {  // scales: [keys, values][token]
        const uint8_t* from = record(tid / (kVqBlock / 2) % 2) + tid / (kChunk / 2) * of.side_bytes;
        pyspec::copy_later<4>(shared + of.scales + tid * 4, from + tid % (kVqBlock / 2) * 4);
      }
    }
    pyspec::close_copies();
  }
  __device__ void await() const {
    of.buffers == 2 ? pyspec::await_copies<1>() : pyspec::await_copies<0>();
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
  template <class Piece>
  __device__ static Piece read_word(const uint8_t* at) {
    const Piece* piece = reinterpret_cast<const Piece*>(at);
    return kSmall ? *piece : __ldg(piece);
  }

  // ==== queries ====

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
          x[i][0] = kTurned ? first * cosine + second * sine : first;
          x[i][1] = kTurned ? second * cosine - first * sine : second;
          largest = fmaxf(largest, fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
        }
      }
      uint32_t exponent = __float_as_uint(across_warp<true>(largest)) >> 23;
      exponent = exponent < 7 ? 7 : exponent > 253 ? 253 : exponent;
      if (lane == 0) unit(which)[row] = __uint_as_float(exponent << 23);
      float factor = __uint_as_float(254 - exponent << 23);
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
  __device__ void read_queries(uint32_t (&to)[kParts][kTiles][4]) const {
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

  // ==== scores: [tokens][rows], rows g and g + 8 of product i are tokens 8 g + 2 i and 8 g + 2 i + 1 of a
  // run ====

  using Scores = float[kRuns][kRun / 16][kTiles][4];
  using Queries = uint32_t[kParts][kTiles][4];

  __device__ static void add_products(float (&scores)[kTiles][4], const uint32_t (&keys)[4],
                                      const Queries& query, int pair, int parts = kParts) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        if (part < parts)
          multiply_add(scores[tile], keys, query[part][tile][2 * pair], query[part][tile][2 * pair + 1]);
    }
  }

  __device__ void add_scores(int stage, const Queries& query, Scores& scores) const {
    const uint8_t* book = (kSmall ? buffer(stage) : books(stage)) + 16 * t;
    const uint8_t* slots = codes(stage);
    int count = levels(stage);
#pragma unroll 1
    for (int level = 0; level < count; ++level, book += kBook, slots += kCodes) {
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        uint32_t code[8];
        read_codes(slots, run * kRun + 8 * g, code);
#pragma unroll
        for (int i = 0; i < kRun / 16; ++i) {
          uint4 x = read_word<uint4>(book + code[2 * i] * kWord),
                y = read_word<uint4>(book + code[2 * i + 1] * kWord);
          add_products(scores[run][i], {x.x, y.x, x.y, y.y}, query, 0);
          add_products(scores[run][i], {x.z, y.z, x.w, y.w}, query, 1);
        }
      }
    }
  }

  __device__ void add_turned_scores(int stage, const Queries& query, Scores& scores) const {
    const uint8_t* book = (kSmall ? buffer(stage) : books(stage)) + 8 * t;
    int half = static_cast<int>(p.head_dim) / 2, count = levels(stage);
    constexpr int kOfRun = kRun / 16;
#pragma unroll 1  // else all tokens' cosines would be in registers
    for (int i = 0; i < kTokens / 16; ++i) {
      float sums[kTiles][4] = {};
      uint32_t keys[2][kParts][4];  // of the channels 4 t .. 4 t + 3, and of their partners
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        int token = i / kOfRun * kRun + 8 * g + 2 * (i % kOfRun) + which;
        float x[2][4] = {};
#pragma unroll 2
        for (int level = 0; level < count; ++level) {
          uint32_t code[1];
          read_codes(codes(stage) + level * kCodes, token, code);
          const uint8_t* word = book + level * kBook + code[0] * kWord;
          uint2 first = read_word<uint2>(word), second = read_word<uint2>(word + kWord / 2);
          uint32_t pairs[2][2] = {{first.x, first.y}, {second.x, second.y}};
#pragma unroll
          for (int c = 0; c < 8; ++c) x[c / 4][c % 4] += half_at(pairs[c / 4][c % 4 / 2], c % 2);
        }
        const float* cosines =
            p.rotary + (first_token % kVqBlock + token) * 2 * half + 4 * t * of.groups + group;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float cosine = cosines[c * of.groups], sine = cosines[half + c * of.groups], first = x[0][c];
          x[0][c] = first * cosine - x[1][c] * sine;
          x[1][c] = x[1][c] * cosine + first * sine;
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          uint32_t parts[kParts];
          split<kSplit>(x[pair / 2][pair % 2 * 2], x[pair / 2][pair % 2 * 2 + 1], parts);
#pragma unroll
          for (int part = 0; part < kParts; ++part) keys[pair / 2][part][pair % 2 * 2 + which] = parts[part];
        }
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          add_products(sums, keys[side][part], query, side, kParts - part);
      }
#pragma unroll
      for (int j = 0; j < kTokens / 16 * kTiles * 4; ++j) {
        int product = j / (kTiles * 4), tile = j / 4 % kTiles;
        if (product == i) scores[product / kOfRun][product % kOfRun][tile][j % 4] += sums[tile][j % 4];
      }
    }
  }

  // Four tokens' scores of a row over a group; rows lie so that lanes of a warp meet no bank twice.
  __device__ float4& partial(int of_group, int row, int four) const {
    float4* rows = reinterpret_cast<float4*>(buffer(of.stages - 1));
    return rows[(of_group * kRows + row) * (kChunk / 4) + (four ^ (row / 2 % 2 + row / 4 % 2 * 4))];
  }
  __device__ void write_partial(const Scores& scores) const {
#pragma unroll
    for (int i = 0; i < kTokens / 32; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        int row = 8 * tile + 2 * t, four = (first_token + i / 2 * kRun) / 4 + 2 * g + i % 2;
        const float (&x)[4] = scores[i / 2][i % 2 * 2][tile], (&y)[4] = scores[i / 2][i % 2 * 2 + 1][tile];
        partial(group, row, four) = make_float4(x[0], x[2], y[0], y[2]);
        partial(group, row + 1, four) = make_float4(x[1], x[3], y[1], y[3]);
      }
    }
  }

  // ==== scores to weights, by a warp for each row ====

  __device__ uint16_t* weights(int part, int row) const {
    return reinterpret_cast<uint16_t*>(shared + of.queries) + (part * kRows + row) * kWeights;
  }
  // Those of a record's tokens 4 lane .. 4 lane + 3.
  __device__ uint2 scales(int side, int which) const {
    return reinterpret_cast<const uint2*>(shared + of.scales)[(side * kChunkBlocks + which) * 32 + lane];
  }

  // A weight is over the largest of weight * scale of value, so what is multiplied with values is at most 1:
  // fp16 has room for it, however different the scales are.
  __device__ void weigh() const {
    for (int row = warp; row < kRows; row += blockDim.x / 32) {
      float score[kChunkBlocks][4], scale[kChunkBlocks][4], largest = -INFINITY, total = 0.0f;
      int blocks = __shfl_sync(kAll, seen, row) - chunk * kChunkBlocks;
#pragma unroll
      for (int which = 0; which < kChunkBlocks; ++which) {
        float4 sum = partial(0, row, which * 32 + lane);
        for (int i = 1; i < of.groups; ++i) {
          float4 more = partial(i, row, which * 32 + lane);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        float sums[4] = {sum.x, sum.y, sum.z, sum.w},
              factor = unit(kTurned ? which : 0)[row] * (p.scale * kLog2E);
        uint2 keys = scales(0, which), values = scales(1, which);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          bool is_seen = which < blocks;
          score[which][i] = is_seen ? sums[i] * half_at(i < 2 ? keys.x : keys.y, i % 2) * factor : -INFINITY;
          scale[which][i] = is_seen ? half_at(i < 2 ? values.x : values.y, i % 2) : 0.0f;
          largest = fmaxf(largest, score[which][i] + log2f(fmaxf(scale[which][i], 0x1p-24f)));
        }
      }
      largest = across_warp<true>(largest);
      float safe = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
      for (int which = 0; which < kChunkBlocks; ++which) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float weight = exp2f(score[which][i] - safe);
          total += weight;
          score[which][i] = weight * scale[which][i];
        }
        uint32_t first[kParts], second[kParts];
        split<kSplit>(score[which][0], score[which][1], first);
        split<kSplit>(score[which][2], score[which][3], second);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          reinterpret_cast<uint2*>(weights(part, row))[which * 32 + lane] = {first[part], second[part]};
      }
      total = across_warp<false>(total);
      if (lane == 0 && first_row + row < of.rows) {
        float* state =
            Row(p, blockIdx.y, first_row + row).state(p, blockIdx.z, of.chunks, chunk) + p.head_dim;
        state[0] = largest, state[1] = total;
      }
    }
  }

  // ==== values: [channels][rows], rows g and g + 8 of product i are channels 4 g + 2 i and 4 g + 2 i + 1
  // ====

  using Values = float[2][kTiles][4];

  // Lane t has level t of four; where there is none, its weights are zero.
  __device__ void add_values(int stage, Values& values) const {
    int count = levels(stage), level = t < count ? t : count - 1;
    const uint8_t* book = kSmall ? buffer(stage) : books(stage);
    uint32_t place = kSmall ? g / 4 * 128 + level * 32 + g % 4 * 8 : level * kBook + g * 8;
    const uint8_t* slot = codes(stage) + level * kCodes;
#pragma unroll 2
    for (int token = 0; token < kTokens; token += 4) {
      uint32_t code[4], word[4][2], channels[2][4];
      if (kSmall) code[0] = *reinterpret_cast<const uint32_t*>(slot + token);
      if (!kSmall) read_codes(slot, token, code);
#pragma unroll
      for (int i = 0; i < 4;
           ++i) {  // 256 bytes from one code to the next: the code is the address' second byte
        uint32_t at = kSmall ? __byte_perm(code[0], place, 0x5504 | i << 4) : code[i] * kWord + place;
        uint2 piece = read_word<uint2>(book + at);
        word[i][0] = piece.x, word[i][1] = piece.y;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // a channel of two tokens
        const uint32_t (&pair)[2] = word[i % 4 / 2 * 2], (&next)[2] = word[i % 4 / 2 * 2 + 1];
        channels[i / 4][i % 4] = __byte_perm(pair[i / 4], next[i / 4], i % 2 ? 0x7632 : 0x5410);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint16_t* from = weights(part, 8 * tile + g) + first_token + token;
          uint2 weight = *reinterpret_cast<const uint2*>(from);
          if (t >= count) weight = {0, 0};
          multiply_add(values[0][tile], channels[0], weight.x, weight.y);
          multiply_add(values[1][tile], channels[1], weight.x, weight.y);
        }
      }
    }
  }

  __device__ float* result(int of_slice, int row) const {
    return reinterpret_cast<float*>(shared) + (of_slice * kRows + row) * (p.head_dim + 4);
  }
  __device__ void write_values(const Values& values) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = result(slice, 8 * tile + 2 * t + i) + group * kVqWidth + 4 * g;
        const float (&x)[4] = values[0][tile], (&y)[4] = values[1][tile];
        *reinterpret_cast<float4*>(to) = make_float4(x[i], x[2 + i], y[i], y[2 + i]);
      }
    }
    __syncthreads();
    for (int row = warp; row < kRows && first_row + row < of.rows; row += blockDim.x / 32) {
      float* state = Row(p, blockIdx.y, first_row + row).state(p, blockIdx.z, of.chunks, chunk);
      for (int c = lane; c < p.head_dim; c += 32) {
        float sum = 0.0f;
        for (int i = 0; i < kSlices; ++i) sum += result(i, row)[c];
        state[c] = sum;
      }
    }
  }

  __device__ void run() const {
    if (most <= chunk * kChunkBlocks) return;
    begin(0);
    if (of.buffers == 2) begin(1);
    lay_out_queries();
    Scores scores = {};
    Values values = {};
    Queries query;
    for (int stage = 0; stage < of.stages; ++stage) {
      await();
      if (stage == 0) read_queries(query);
      kTurned ? add_turned_scores(stage, query, scores) : add_scores(stage, query, scores);
      __syncthreads();
      if (stage + 1 < of.stages) begin(stage + of.buffers);
    }
    write_partial(scores);
    __syncthreads();
    weigh();
    __syncthreads();
    begin(of.stages - 1 + of.buffers);
    for (int stage = of.stages; stage < 2 * of.stages; ++stage) {
      await();
      add_values(stage, values);
      __syncthreads();
      begin(stage + of.buffers);
    }
    write_values(values);
  }
};

template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
__global__ void __launch_bounds__(512, kSmall)
    fold(const __grid_constant__ VqAttentionParams p, const __grid_constant__ Sizes sizes) {
  Fold<kSplit, kTiles, kRuns, kSmall, kTurned>(p, sizes).run();
}

// A block is a row; each of its warps takes every eighth chunk, and then their sums are added in order.
constexpr int kMergers = 8, kMostChannels = 256;

template <class Storage>
__global__ void __launch_bounds__(32 * kMergers)
    merge(const __grid_constant__ VqAttentionParams p, int chunks) {
  __shared__ float sums[kMergers][kMostChannels + 1];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = static_cast<int>(p.head_dim);
  int64_t row = blockIdx.x, node = row % p.nodes, head = row / p.nodes % p.heads, b = row / p.nodes / p.heads;
  int of_kv_head = static_cast<int>(p.heads / p.kv_heads);
  Row at(p, static_cast<int>(head) / of_kv_head, static_cast<int>(node * of_kv_head + head % of_kv_head));
  int count = (at.seen(p, b) + kChunkBlocks - 1) / kChunkBlocks;
  const float* states = at.state(p, b, chunks, 0);
  float largest = -INFINITY, total = 0.0f, values[kMostChannels / 32] = {};
  for (int chunk = lane; chunk < count; chunk += 32) largest = fmaxf(largest, states[chunk * (d + 2) + d]);
  largest = across_warp<true>(largest);
  float safe = largest == -INFINITY ? 0.0f : largest;
#pragma unroll 2
  for (int chunk = warp; chunk < count; chunk += kMergers) {
    const float* state = states + chunk * (d + 2);
    float weight = exp2f(state[d] - safe);
    total += weight * state[d + 1];
#pragma unroll
    for (int i = 0; i < kMostChannels / 32; ++i)
      if (lane + 32 * i < d) values[i] += weight * state[lane + 32 * i];
  }
#pragma unroll
  for (int i = 0; i < kMostChannels / 32; ++i)
    if (lane + 32 * i < d) sums[warp][lane + 32 * i] = values[i];
  if (lane == 0) sums[warp][kMostChannels] = total;
  __syncthreads();
  auto sum_of = [&](int c) {
    float sum = 0.0f;
    for (int i = 0; i < kMergers; ++i) sum += sums[i][c];
    return sum;
  };
  int c = threadIdx.x;
  total = sum_of(kMostChannels);
  Storage* out =
      static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] + node * p.out_strides[2];
  if (c < d) from_float(total == 0.0f ? 0.0f : sum_of(c) / total, out + c);
  if (c == 0) p.lse[row] = total == 0.0f ? -INFINITY : (largest + log2f(total)) * kLn2;
}

template <class Kernel, class... Arguments>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int bytes, cudaStream_t stream,
                   Arguments... arguments) {
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = bytes,
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
cudaError_t launch_fold(const VqAttentionParams& p, int chunks, cudaStream_t stream) {
  using Block = Fold<kSplit, kTiles, kRuns, kSmall, kTurned>;
  constexpr int kRows = Block::kRows;
  int d = static_cast<int>(p.head_dim), device, limit;
  Sizes of{};
  of.rows = static_cast<int>(p.nodes * (p.heads / p.kv_heads)), of.groups = d / kVqWidth;
  of.depth = static_cast<int>(p.format.depth), of.chunks = chunks,
  of.stages = (of.depth + kLevels - 1) / kLevels;
  of.level_bytes = static_cast<int>(pyspec::vq_level_bytes(p.format));
  of.side_bytes = static_cast<int>(pyspec::vq_side_bytes(p.format, d));
  int warps = of.groups * Block::kSlices, scores = of.groups * kRows * kChunk * 4;
  int queries = (kTurned ? 2 : 1) * d, weights = kWeights;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  for (of.buffers = 2; of.buffers > 0; --of.buffers) {
    of.codes = kSmall ? of.buffers * kStageWords : scores;
    of.scales = of.codes + of.buffers * warps * kLevels * Block::kCodes;
    of.units = of.scales + 2 * kChunk * 2;
    of.queries = of.units + 2 * kRows * 4;
    of.bytes = of.queries + (1 + kSplit) * kRows * (queries > weights ? queries : weights) * 2;
    if (of.bytes <= limit) break;
  }
  int sets = (of.rows + kRows - 1) / kRows;
  dim3 grid(chunks * sets, static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  return launch(fold<kSplit, kTiles, kRuns, kSmall, kTurned>, grid, warps * 32, of.bytes, stream, p, of);
}

template <bool kSplit, bool kSmall, bool kTurned>
cudaError_t launch_fold(const VqAttentionParams& p, int chunks, cudaStream_t stream) {
  if (p.head_dim > 128) return launch_fold<kSplit, 1, 2, kSmall, kTurned>(p, chunks, stream);
  if constexpr (!kSplit) {
    if (p.nodes * (p.heads / p.kv_heads) > 8)
      return launch_fold<kSplit, 2, 1, kSmall, kTurned>(p, chunks, stream);
  }
  return launch_fold<kSplit, 1, 1, kSmall, kTurned>(p, chunks, stream);
}

template <class Storage>
cudaError_t attend(const VqAttentionParams& p, int chunks, cudaStream_t stream) {
  constexpr bool kSplit = sizeof(Storage) == 4;
  if (chunks > 0) {
    auto* fold_all = p.format.codes == 256
                         ? p.rotary ? launch_fold<kSplit, true, true> : launch_fold<kSplit, true, false>
                     : p.rotary ? launch_fold<kSplit, false, true>
                                : launch_fold<kSplit, false, false>;
    cudaError_t error = fold_all(p, chunks, stream);
    if (error != cudaSuccess) return error;
  }
  dim3 grid(static_cast<unsigned>(p.batch * p.heads * p.nodes));
  return launch(merge<Storage>, grid, 32 * kMergers, 0, stream, p, chunks);
}

int chunks_of(const VqAttentionParams& p) {
  return static_cast<int>((p.most_seen + kChunkBlocks - 1) / kChunkBlocks);
}

}  // namespace

// Floats of p.workspace: [batch, heads, nodes, chunks, head_dim + 2].
extern "C" int64_t pyspec_residual_vq_cuda_workspace(const VqAttentionParams& p) {
  return p.batch * p.heads * p.nodes * chunks_of(p) * (p.head_dim + 2);
}

extern "C" int pyspec_residual_vq_cuda(const VqAttentionParams& p, cudaStream_t stream) {
  switch (p.element) {
    case Element::kFloat32:
      return attend<float>(p, chunks_of(p), stream);
    case Element::kFloat16:
      return attend<__half>(p, chunks_of(p), stream);
    case Element::kBFloat16:
      return attend<__nv_bfloat16>(p, chunks_of(p), stream);
  }
  return cudaErrorInvalidValue;
}
