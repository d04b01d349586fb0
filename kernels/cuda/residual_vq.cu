// Attention to keys and values that are sums of codewords, without rebuilding either, in two launches.
//
// fold: a block takes kRows query rows of a KV head over a chunk of 1024 tokens; a thread has four tokens
// that lie side by side, a warp one record. For every group and level the block makes the table
// q_g . C_l[j] in shared memory and adds each token's entry to its scores, which stay in registers; then it
// gathers weight * scale by code in shared memory, and multiplies what was gathered with the codebook.
// merge: a row's chunks, in order.
//
// Keys that were coded before rotary embedding have no tables: each thread rebuilds its tokens', some
// channels at a time, turns them to their places in the record, and multiplies with queries that were turned
// back by the record's first position.
//
// Masses are added as integers: their sum does not hang on which thread came first. Everything else of a row
// has one order too, whatever rows are beside it: the row rule.
//
// A token costs a look-up of 16 bytes and four atomic adds for each code and kRows rows; a chunk reads the
// codebooks once, from the L2 cache, with head_dim * depth * codes multiply-adds for each row, twice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "params/residual_vq.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::Element;
using pyspec::kVqBlock;
using pyspec::kVqWidth;
using pyspec::VqAttentionParams;

constexpr int kThreads = 256, kWarps = kThreads / 32, kRows = 4, kTokens = 4;
constexpr int kChunkBlocks = kWarps;  // a record for each warp
constexpr uint32_t kAll = ~0u;
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kOne = 1099511627776.0f;  // 2^40, what the largest of a chunk's masses is as an integer

static_assert(kTokens * 32 == kVqBlock, "a warp has one record");

__device__ float to_float(float x) { return x; }
__device__ float to_float(__half x) { return __half2float(x); }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void from_float(float x, float* to) { *to = x; }
__device__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

__device__ float half_at(uint32_t pair, int which) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(which ? pair >> 16 : pair)));
}

// Sizes of the format, worked out on the host.
struct Sizes {
  int64_t planes, level_bytes, side_bytes, chunks;
};

// Where a query row is: rows of a KV head are (node, head of its group).
struct Row {
  int64_t node, head;

  __device__ Row(const VqAttentionParams& p, int64_t kv_head, int64_t row)
      : node(row / (p.heads / p.kv_heads)),
        head(kv_head * (p.heads / p.kv_heads) + row % (p.heads / p.kv_heads)) {}

  // Blocks that it sees, however wrong `seen` is.
  __device__ int64_t seen(const VqAttentionParams& p, int64_t b) const {
    int64_t count = p.seen[b * p.nodes + node];
    return count < 0 ? 0 : count < p.most_seen ? count : p.most_seen;
  }
  __device__ float* state(const VqAttentionParams& p, int64_t b, int64_t chunks, int64_t chunk) const {
    return p.workspace + (((b * p.heads + head) * p.nodes + node) * chunks + chunk) * (p.head_dim + 2);
  }
};

struct Shared {
  float queries[kRows][kVqWidth];
  float across[kWarps][kRows];  // of warps
  float halves[kWarps][32];     // of sums over the first and the second half of the codes
  int64_t seen[kRows];
};

// Over a block, for each row: the largest, or the sum in one order; every thread gets it.
template <bool kLargest>
__device__ void reduce(float (&x)[kRows], Shared& s) {
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int with = 16; with > 0; with /= 2) {
      float other = __shfl_xor_sync(kAll, x[r], with);
      x[r] = kLargest ? fmaxf(x[r], other) : x[r] + other;
    }
    if (lane == 0) s.across[warp][r] = x[r];
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = s.across[0][r];
    for (int w = 1; w < kWarps; ++w) x[r] = kLargest ? fmaxf(x[r], s.across[w][r]) : x[r] + s.across[w][r];
  }
  __syncthreads();
}

// The codes of a thread's tokens in one group and level.
__device__ void read_codes(const uint8_t* level, int64_t planes, bool is_there, uint32_t (&code)[kTokens]) {
  int lane = threadIdx.x % 32;
  uint32_t low = is_there ? reinterpret_cast<const uint32_t*>(level)[lane] : 0;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) code[i] = low >> 8 * i & 255;
  for (int64_t plane = 0; plane < planes && is_there; ++plane) {
    uint32_t bits = level[kVqBlock + plane * pyspec::kVqPlane + lane / 2] >> lane % 2 * 4;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) code[i] |= (bits >> i & 1) << (8 + plane);
  }
}

// Entry j of the table of each row: its query times codeword j, channel by channel.
__device__ void fill_table(const uint4* words, int codes, const Shared& s, float4* table) {
  for (int j = threadIdx.x; j < codes; j += kThreads) {
    float sums[kRows] = {};
    for (int part = 0; part < 4; ++part) {
      uint4 eight = words[j * 4 + part];
      uint32_t pairs[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float x = half_at(pairs[i / 2], i % 2);
#pragma unroll
        for (int r = 0; r < kRows; ++r) sums[r] += s.queries[r][8 * part + i] * x;
      }
    }
    table[j] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

// Adds a group's products of the queries turned back, [kRows][kVqWidth] for each warp, with the keys rebuilt
// and turned to their places: 4 pairs of channels at a time, that all are in registers.
__device__ void add_turned(const VqAttentionParams& p, const Sizes& sizes, int64_t group,
                           const uint8_t* codes, bool is_there, const float* query,
                           float (&scores)[kTokens][kRows]) {
  int64_t groups = p.head_dim / kVqWidth;
  for (int part = 0; part < 4; ++part) {
    float key[kTokens][8] = {};
    for (int64_t level = 0; level < p.format.depth; ++level) {
      const uint2* words = reinterpret_cast<const uint2*>(p.codebooks + level * p.format.codes * kVqWidth);
      uint32_t code[kTokens];
      read_codes(codes + level * sizes.level_bytes, sizes.planes, is_there, code);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        uint2 first = words[code[i] * 8 + part], second = words[code[i] * 8 + 4 + part];
        uint32_t pairs[4] = {first.x, first.y, second.x, second.y};
#pragma unroll
        for (int c = 0; c < 8; ++c) key[i][c] += half_at(pairs[c / 2], c % 2);
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float* cosines = p.rotary + (threadIdx.x % 32 * kTokens + i) * p.head_dim;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        int64_t channel = (4 * part + c) * groups + group;
        float cosine = cosines[channel], sine = cosines[p.head_dim / 2 + channel];
        float first = key[i][c] * cosine - key[i][4 + c] * sine,
              second = key[i][4 + c] * cosine + key[i][c] * sine;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float* row = query + r * kVqWidth + 4 * part + c;
          scores[i][r] += row[0] * first + row[kVqWidth / 2] * second;
        }
      }
    }
  }
}

// The queries of a set of rows in one group of channels, turned back by a record's first position, by its
// warp.
template <class Storage>
__device__ void turn_back(const VqAttentionParams& p, int64_t b, int64_t kv_head, int64_t first_row,
                          int64_t group, int64_t block, float* to) {
  int lane = threadIdx.x % 32, c = lane % 16;
  int64_t groups = p.head_dim / kVqWidth, half = p.head_dim / 2, channel = c * groups + group;
  const float* cosines = p.rotary + (kVqBlock + block) * p.head_dim;
  float cosine = cosines[channel], sine = cosines[half + channel];
  for (int r = lane / 16; r < kRows; r += 2) {
    float first = 0.0f, second = 0.0f;
    int64_t row = first_row + r;
    if (row < p.nodes * (p.heads / p.kv_heads)) {
      Row at(p, kv_head, row);
      const Storage* q = static_cast<const Storage*>(p.q) + b * p.q_strides[0] + at.head * p.q_strides[1] +
                         at.node * p.q_strides[2] + channel;
      first = to_float(q[0]), second = to_float(q[half]);
    }
    to[r * kVqWidth + c] = first * cosine + second * sine;
    to[r * kVqWidth + 16 + c] = second * cosine - first * sine;
  }
}

template <class Storage>
__global__ void __launch_bounds__(kThreads) fold(VqAttentionParams p, Sizes sizes) {
  __shared__ Shared s;
  int64_t chunks = sizes.chunks, planes = sizes.planes, level_bytes = sizes.level_bytes;
  int64_t chunk = blockIdx.x % chunks, set = blockIdx.x / chunks, kv_head = blockIdx.y, b = blockIdx.z;
  int64_t rows = p.nodes * (p.heads / p.kv_heads), first_row = set * kRows;
  int64_t depth = p.format.depth, groups = p.head_dim / kVqWidth, codes = p.format.codes;
  int tid = threadIdx.x, warp = tid / 32, lane = tid % 32;
  int64_t block = chunk * kChunkBlocks + warp;

  if (tid < kRows) {
    int64_t row = first_row + tid;
    s.seen[tid] = row < rows ? Row(p, kv_head, row).seen(p, b) : 0;
  }
  __syncthreads();
  int64_t most = 0;
  for (int r = 0; r < kRows; ++r) most = s.seen[r] > most ? s.seen[r] : most;
  if (most <= chunk * kChunkBlocks) return;
  bool is_there = block < most;  // records behind may hold anything, or be none
  const uint8_t* keys = p.packed + b * p.packed_strides[0] + kv_head * p.packed_strides[1] +
                        (is_there ? block : 0) * p.packed_strides[2];
  const uint8_t* values = keys + sizes.side_bytes;

  // ==== scores ====

  float4* table = reinterpret_cast<float4*>(dynamic_shared);
  float weights[kTokens][kRows] = {};
  for (int64_t group = 0; group < groups && p.rotary; ++group) {
    float* own = reinterpret_cast<float*>(dynamic_shared) + warp * kRows * kVqWidth;
    turn_back<Storage>(p, b, kv_head, first_row, group, is_there ? block : 0, own);
    __syncthreads();
    const uint8_t* codes_of_group = keys + 2 * kVqBlock + group * depth * level_bytes;
    add_turned(p, sizes, group, codes_of_group, is_there, own, weights);
    __syncthreads();
  }
  for (int64_t group = 0; group < groups && !p.rotary; ++group) {
    if (tid < kRows * kVqWidth) {
      int64_t row = first_row + tid / kVqWidth, c = tid % kVqWidth;
      float x = 0.0f;
      if (row < rows) {
        Row at(p, kv_head, row);
        x = to_float(static_cast<const Storage*>(p.q)[b * p.q_strides[0] + at.head * p.q_strides[1] +
                                                      at.node * p.q_strides[2] + c * groups + group]);
      }
      s.queries[tid / kVqWidth][c] = x;
    }
    for (int64_t level = 0; level < depth; ++level) {
      __syncthreads();
      const uint4* words = reinterpret_cast<const uint4*>(p.codebooks + level * codes * kVqWidth);
      fill_table(words, static_cast<int>(codes), s, table);
      __syncthreads();
      uint32_t code[kTokens];
      read_codes(keys + 2 * kVqBlock + (group * depth + level) * level_bytes, planes, is_there, code);
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        float4 entry = table[code[i]];
        weights[i][0] += entry.x, weights[i][1] += entry.y;
        weights[i][2] += entry.z, weights[i][3] += entry.w;
      }
    }
    __syncthreads();
  }

  // ==== scores to weights ====

  float largest[kRows], total[kRows], heaviest[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) largest[r] = -INFINITY, total[r] = 0.0f, heaviest[r] = 0.0f;
  const uint32_t* key_scales = reinterpret_cast<const uint32_t*>(keys) + lane * kTokens / 2;
  const uint32_t* value_scales = reinterpret_cast<const uint32_t*>(values) + lane * kTokens / 2;
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float factor = is_there ? half_at(key_scales[i / 2], i % 2) * (p.scale * kLog2E) : 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      weights[i][r] = block < s.seen[r] ? weights[i][r] * factor : -INFINITY;
      largest[r] = fmaxf(largest[r], weights[i][r]);
    }
  }
  reduce<true>(largest, s);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    float scale = is_there ? half_at(value_scales[i / 2], i % 2) : 0.0f;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float weight = exp2f(weights[i][r] - (largest[r] == -INFINITY ? 0.0f : largest[r]));
      total[r] += weight;
      weights[i][r] = weight * scale;
      heaviest[r] = fmaxf(heaviest[r], weights[i][r]);
    }
  }
  reduce<false>(total, s);
  reduce<true>(heaviest, s);
  float unit[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) unit[r] = heaviest[r] > 0.0f ? kOne / heaviest[r] : 0.0f;

  // ==== values ====

  unsigned long long* mass = reinterpret_cast<unsigned long long*>(dynamic_shared);  // [codes][kRows]
  int own_row = warp % kRows;  // of the product; warps kRows and up take the second half of the codes
  int64_t begin = warp / kRows * (codes / 2), end = begin + codes / 2;
  float from_unit = heaviest[0];
#pragma unroll
  for (int r = 1; r < kRows; ++r) from_unit = r == own_row ? heaviest[r] : from_unit;
  from_unit /= kOne;
  for (int64_t group = 0; group < groups; ++group) {
    float sum = 0.0f;
    for (int64_t level = 0; level < depth; ++level) {
      for (int64_t i = tid; i < codes * kRows; i += kThreads) mass[i] = 0;
      __syncthreads();
      if (is_there) {
        uint32_t code[kTokens];
        read_codes(values + 2 * kVqBlock + (group * depth + level) * level_bytes, planes, true, code);
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float units = weights[i][r] * unit[r];
            if (units > 0.0f) atomicAdd(&mass[code[i] * kRows + r], static_cast<unsigned long long>(units));
          }
        }
      }
      __syncthreads();
      const uint16_t* words = p.codebooks + (depth + level) * codes * kVqWidth + lane;
      for (int64_t j = begin; j < end; ++j) {
        float x = __half2float(__ushort_as_half(words[j * kVqWidth]));
        sum += static_cast<float>(mass[j * kRows + own_row]) * from_unit * x;
      }
      __syncthreads();
    }
    s.halves[warp][lane] = sum;
    __syncthreads();
    int64_t row = first_row + warp;
    if (warp < kRows && row < rows)
      Row(p, kv_head, row).state(p, b, chunks, chunk)[group * kVqWidth + lane] =
          s.halves[warp][lane] + s.halves[warp + kRows][lane];
    __syncthreads();
  }
  if (tid == 0) {
    for (int r = 0; r < kRows && first_row + r < rows; ++r) {
      float* state = Row(p, kv_head, first_row + r).state(p, b, chunks, chunk) + p.head_dim;
      state[0] = largest[r], state[1] = total[r];
    }
  }
}

// A block is a row; a thread has a channel or several.
template <class Storage>
__global__ void __launch_bounds__(64) merge(VqAttentionParams p, int64_t chunks) {
  int64_t row = blockIdx.x, node = row % p.nodes, head = row / p.nodes % p.heads, b = row / p.nodes / p.heads;
  Row at(p, head / (p.heads / p.kv_heads), node * (p.heads / p.kv_heads) + head % (p.heads / p.kv_heads));
  int64_t seen = at.seen(p, b);
  Storage* out =
      static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] + node * p.out_strides[2];
  for (int64_t c = threadIdx.x; c < p.head_dim; c += blockDim.x) {
    float max = -INFINITY, sum = 0.0f, value = 0.0f;
    for (int64_t chunk = 0; chunk * kChunkBlocks < seen; ++chunk) {
      const float* state = at.state(p, b, chunks, chunk);
      float here = state[p.head_dim], largest = fmaxf(max, here);
      float safe = largest == -INFINITY ? 0.0f : largest, weight = exp2f(max - safe),
            other = exp2f(here - safe);
      value = value * weight + state[c] * other;
      sum = sum * weight + state[p.head_dim + 1] * other;
      max = largest;
    }
    from_float(sum == 0.0f ? 0.0f : value / sum, out + c);
    if (c == 0) p.lse[row] = sum == 0.0f ? -INFINITY : (max + log2f(sum)) * kLn2;
  }
}

template <class Storage>
cudaError_t launch(const VqAttentionParams& p, int64_t chunks, cudaStream_t stream) {
  int64_t rows = p.nodes * (p.heads / p.kv_heads), sets = (rows + kRows - 1) / kRows;
  cudaLaunchConfig_t config{};
  config.stream = stream;
  if (chunks > 0) {
    int bytes = static_cast<int>(p.format.codes * kRows * 8);
    cudaError_t error =
        cudaFuncSetAttribute(fold<Storage>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    config.gridDim = dim3(static_cast<unsigned>(chunks * sets), static_cast<unsigned>(p.kv_heads),
                          static_cast<unsigned>(p.batch));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    Sizes of{pyspec::vq_planes(p.format), pyspec::vq_level_bytes(p.format),
             pyspec::vq_side_bytes(p.format, p.head_dim), chunks};
    error = cudaLaunchKernelEx(&config, fold<Storage>, p, of);
    if (error != cudaSuccess) return error;
  }
  config.gridDim = dim3(static_cast<unsigned>(p.batch * p.heads * p.nodes));
  config.blockDim = dim3(64);
  config.dynamicSmemBytes = 0;
  return cudaLaunchKernelEx(&config, merge<Storage>, p, chunks);
}

}  // namespace

// Floats of p.workspace: [batch, heads, nodes, chunks, head_dim + 2] values, largest score and sum.
extern "C" int64_t pyspec_residual_vq_cuda_workspace(const pyspec::VqAttentionParams& p) {
  int64_t chunks = (p.most_seen + kChunkBlocks - 1) / kChunkBlocks;
  return p.batch * p.heads * p.nodes * chunks * (p.head_dim + 2);
}

extern "C" int pyspec_residual_vq_cuda(const pyspec::VqAttentionParams& p, cudaStream_t stream) {
  int64_t chunks = (p.most_seen + kChunkBlocks - 1) / kChunkBlocks;
  switch (p.element) {
    case Element::kFloat32:
      return launch<float>(p, chunks, stream);
    case Element::kFloat16:
      return launch<__half>(p, chunks, stream);
    case Element::kBFloat16:
      return launch<__nv_bfloat16>(p, chunks, stream);
  }
  return cudaErrorInvalidValue;
}
