// causal_conv on the GPU; kernels/cpu/causal_conv.cpp says what is computed.
//
// A thread has one tree and one channel, so that neighbours read neighbouring inputs: it moves its piece of
// the window behind the accepted nodes, and walks this round's, each with its ancestors. A sum runs from the
// oldest input to the newest, wherever they lie. Bound by memory; the trees' parents come from the cache.
#include "cuda/recurrence.h"
#include "params/causal_conv.h"

namespace {

using pyspec::CausalConvParams;
using pyspec::kMostConvTaps;
using pyspec::RoundTree;

constexpr int kThreads = 128;

// One channel of one tree.
struct Channel {
  const CausalConvParams& p;
  const RoundTree& tree;
  int64_t channel;

  __device__ float* window(int64_t place) const {
    return p.window + (tree.sequence * (p.taps - 1) + place) * p.channels + channel;
  }
  __device__ float* recorded(int64_t half, int64_t node) const {
    return p.record + ((half * p.sequences + tree.sequence) * p.record_nodes + node) * p.channels + channel;
  }
  __device__ float input(int64_t node) const { return p.x[(tree.first_row + node) * p.x_stride + channel]; }
};

// Value index of an array that stays in registers.
template <int kSize>
__device__ float pick(const float (&values)[kSize], int index) {
  float found = 0.0f;
#pragma unroll
  for (int i = 0; i < kSize; ++i) found = i == index ? values[i] : found;
  return found;
}

template <int kTaps>
__device__ void run(const Channel& at) {
  const CausalConvParams& p = at.p;
  const RoundTree& tree = at.tree;
  float weight[kTaps], before[kTaps];  // before: the window behind the accepted nodes, then nothing
#pragma unroll
  for (int tap = 0; tap < kTaps; ++tap) weight[tap] = p.weight[tap * p.channels + at.channel];
#pragma unroll
  for (int place = 0; place < kTaps; ++place) {
    int64_t behind = place + tree.accepted - (kTaps - 1);
    before[place] = place == kTaps - 1 ? 0.0f
                    : behind < 0       ? *at.window(place + tree.accepted)
                                       : *at.recorded(tree.half, tree.path[behind]);
  }
  if (tree.fold && tree.accepted) {
#pragma unroll
    for (int place = 0; place < kTaps - 1; ++place) *at.window(place) = before[place];
  }
  float bias = p.bias ? p.bias[at.channel] : 0.0f;
  for (int64_t node = 0; node < tree.nodes; ++node) {
    float seen[kTaps];  // newest last
    int64_t ancestor = node;
    int place = kTaps - 1;
#pragma unroll
    for (int tap = kTaps - 1; tap >= 0; --tap) {
      if (ancestor >= 0) {
        seen[tap] = at.input(ancestor);
        ancestor = tree.parents[ancestor];
      } else {
        seen[tap] = pick(before, --place);
      }
    }
    float sum = bias;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) sum = __fmaf_rn(seen[tap], weight[tap], sum);
    int64_t to = (tree.first_row + node) * p.channels + at.channel;
    pyspec::store_element(p.out, to, p.out_element, pyspec::silu(sum));
    if (!tree.advance) *at.recorded(tree.node_half, tree.first_node + node) = seen[kTaps - 1];
  }
  if (!tree.advance || !tree.nodes) return;
#pragma unroll
  for (int place = 0; place < kTaps - 1; ++place) {
    int64_t behind = place + tree.nodes - (kTaps - 1);
    *at.window(place) = behind < 0 ? pick(before, place + static_cast<int>(tree.nodes)) : at.input(behind);
  }
}

// Grid [trees, pieces of kThreads channels].
template <int kTaps>
__global__ void __launch_bounds__(kThreads)
    causal_conv_kernel(const __grid_constant__ CausalConvParams p, int64_t rows, int64_t pieces) {
  RoundTree tree = pyspec::tree_of(p.round, blockIdx.x / pieces);
  if (!pyspec::fits(tree, p.round, rows, p.sequences, p.record_nodes)) return;
  int64_t channel = blockIdx.x % pieces * kThreads + threadIdx.x;
  if (channel < p.channels) run<kTaps>({p, tree, channel});
}

}  // namespace

// One launch, and none for no trees. rows: of x. A tree that does not fit changes nothing. Returns a
// cudaError_t.
extern "C" int pyspec_causal_conv_cuda(const CausalConvParams& p, int64_t rows, cudaStream_t stream) {
  using Kernel = void (*)(CausalConvParams, int64_t, int64_t);
  const Kernel kernels[] = {
      causal_conv_kernel<1>, causal_conv_kernel<2>, causal_conv_kernel<3>, causal_conv_kernel<4>,
      causal_conv_kernel<5>, causal_conv_kernel<6>, causal_conv_kernel<7>, causal_conv_kernel<kMostConvTaps>};
  if (p.round.trees == 0) return cudaSuccess;
  int64_t pieces = (p.channels + kThreads - 1) / kThreads;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.round.trees * pieces));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernels[p.taps - 1], p, rows, pieces);
}
