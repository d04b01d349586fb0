// Attention to keys and values that are sums of codewords, on tensor cores, in two launches.
//
// fold (vq_fold.h, vq_stages.h): a block takes up to 32 query rows of a KV head over a chunk of 256 tokens, a
// warp a group of 32 channels of 64 of these. Codewords are streamed through shared memory and multiplied.
// merge: a row's chunks, in order.
//
// A column of a tensor core's product does not depend on the others, and sums have one order: the row rule.
//
// Bound by reads of shared memory, 64 bytes for a codeword: 16 clocks of a multiprocessor for the values of a
// token with 128 channels in 8 levels, half as much again for its keys, where two codewords often meet in one
// half of the banks; then by the L2 cache, from which each block copies all codebooks once.
#include <cuda_bf16.h>

#include "cuda/overlap.h"
#include "cuda/vq_fold.h"

namespace pyspec {
namespace {

__device__ void from_float(float x, float* to) { *to = x; }
__device__ void from_float(float x, __half* to) { *to = __float2half_rn(x); }
__device__ void from_float(float x, __nv_bfloat16* to) { *to = __float2bfloat16_rn(x); }

// A multiprocessor has registers for one block, 128 a thread. Most kernels have to be told that one will do,
// or the compiler spills to fit them into 64; that of wide heads and 2048 codewords spills when it is told.
template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
__global__ void __launch_bounds__(512, kSmall || kTurned || kRuns == 1)
    fold(const __grid_constant__ VqAttentionParams p, const __grid_constant__ Sizes sizes) {
  wait_for_inputs();
  Fold<kSplit, kTiles, kRuns, kSmall, kTurned>(p, sizes).run();
}

// A block is a row; each of its warps takes every eighth chunk, and then their sums are added in order.
constexpr int kMergers = 8, kMostChannels = 256;

template <class Storage>
__global__ void __launch_bounds__(32 * kMergers)
    merge(const __grid_constant__ VqAttentionParams p, int chunks) {
  __shared__ float sums[kMergers][kMostChannels + 1];
  wait_for_inputs();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = static_cast<int>(p.head_dim);
  int64_t row = blockIdx.x, node = row % p.nodes, head = row / p.nodes % p.heads, b = row / p.nodes / p.heads;
  int of_kv_head = static_cast<int>(p.heads / p.kv_heads);
  Row at(p, static_cast<int>(head) / of_kv_head, static_cast<int>(node * of_kv_head + head % of_kv_head));
  int blocks = at.seen(p, b), count = (blocks + kChunkBlocks - 1) / kChunkBlocks, oldest = at.oldest(p, b);
  int first = oldest / kVqBlock < blocks ? oldest / kChunk : count;  // no block need have folded those before
  const float* states = at.state(p, b, chunks, 0);
  float largest = -INFINITY, total = 0.0f, values[kMostChannels / 32] = {};
  for (int chunk = first + lane; chunk < count; chunk += 32)
    largest = fmaxf(largest, states[chunk * (d + 2) + d]);
  largest = across_warp<true>(largest);
  float safe = largest == -INFINITY ? 0.0f : largest;
#pragma unroll 2
  for (int chunk = first + warp; chunk < count; chunk += kMergers) {
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
  return launch(Launch{grid, static_cast<unsigned>(threads), bytes, stream}, kernel, arguments...);
}

template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
cudaError_t launch_fold(const VqAttentionParams& p, int chunks, cudaStream_t stream) {
  using Block = Fold<kSplit, kTiles, kRuns, kSmall, kTurned>;
  constexpr int kRows = Block::kRows, kParts = Block::kParts;
  int d = static_cast<int>(p.head_dim), device, limit;
  Sizes of{};
  of.rows = static_cast<int>(p.nodes * (p.heads / p.kv_heads)), of.groups = d / kVqWidth;
  of.depth = static_cast<int>(p.format.depth), of.chunks = chunks,
  of.stages = (of.depth + kLevels - 1) / kLevels;
  of.level_bytes = static_cast<int>(vq_level_bytes(p.format));
  of.side_bytes = static_cast<int>(vq_side_bytes(p.format, d));
  int warps = of.groups * Block::kSlices, scores = of.groups * Block::kPassRows * kChunk * 4;
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
    of.bytes = of.queries + kParts * kRows * 2 * (queries > weights ? queries : weights);
    if (of.bytes <= limit) break;
  }
  int sets = (of.rows + kRows - 1) / kRows;
  dim3 grid(chunks * sets, static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  return launch(fold<kSplit, kTiles, kRuns, kSmall, kTurned>, grid, warps * 32, of.bytes, stream, p, of);
}

template <bool kSplit, bool kSmall, bool kTurned>
cudaError_t launch_fold(const VqAttentionParams& p, int chunks, cudaStream_t stream) {
  if (p.head_dim > 128) return launch_fold<kSplit, 1, 2, kSmall, kTurned>(p, chunks, stream);
  int64_t rows = p.nodes * (p.heads / p.kv_heads);
  if constexpr (!kSplit && kSmall && !kTurned) {  // the others have no registers for more rows
    if (rows > 16) return launch_fold<kSplit, 4, 1, kSmall, kTurned>(p, chunks, stream);
  }
  if constexpr (!kSplit) {
    if (rows > 8) return launch_fold<kSplit, 2, 1, kSmall, kTurned>(p, chunks, stream);
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
}  // namespace pyspec

// Floats of p.workspace: [batch, heads, nodes, chunks, head_dim + 2].
extern "C" int64_t pyspec_residual_vq_cuda_workspace(const pyspec::VqAttentionParams& p) {
  return p.batch * p.heads * p.nodes * pyspec::chunks_of(p) * (p.head_dim + 2);
}

extern "C" int pyspec_residual_vq_cuda(const pyspec::VqAttentionParams& p, cudaStream_t stream) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return pyspec::attend<float>(p, pyspec::chunks_of(p), stream);
    case pyspec::Element::kFloat16:
      return pyspec::attend<__half>(p, pyspec::chunks_of(p), stream);
    case pyspec::Element::kBFloat16:
      return pyspec::attend<__nv_bfloat16>(p, pyspec::chunks_of(p), stream);
  }
  return cudaErrorInvalidValue;
}
