// causal_conv on the GPU; kernels/cpu/causal_conv.cpp says what is computed.
//
// A block has one tree and a warp's width of neighbouring channels. Each of its warps takes some of this
// round's nodes, with all of their ancestors' inputs on their way at once, behind its own copy of the window
// behind the accepted nodes. The first warp moves the window, when all have read it. A sum runs from the
// oldest input to the newest, wherever they lie. Bound by latency: three loads wait for each other, of the
// round, of the parents, and of the inputs.
#include "cuda/recurrence.h"
#include "params/causal_conv.h"

namespace {

using pyspec::CausalConvParams;
using pyspec::kMostConvTaps;
using pyspec::RoundTree;

constexpr int kLanes = 32;  // channels of a block
constexpr int kWarps = 8;

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
__device__ void run(const Channel& at, bool is_there) {
  const CausalConvParams& p = at.p;
  const RoundTree& tree = at.tree;
  float weight[kTaps], before[kTaps], bias = 0.0f;  // before: the window behind the accepted nodes
  if (is_there) {
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) weight[tap] = p.weight[tap * p.channels + at.channel];
#pragma unroll
    for (int place = 0; place < kTaps; ++place) {
      int64_t behind = place + tree.accepted - (kTaps - 1);
      before[place] = place == kTaps - 1 ? 0.0f
                      : behind < 0       ? *at.window(place + tree.accepted)
                                         : *at.recorded(tree.half, tree.path[behind]);
    }
    if (p.bias) bias = p.bias[at.channel];
  }
  if (!pyspec::parents_fit(tree) || !is_there) return;
  int warp = static_cast<int>(threadIdx.x) / kLanes;
  for (int64_t node = warp; node < tree.nodes; node += kWarps) {
    int64_t ancestors[kTaps];  // newest last; below 0 so many before the root
    ancestors[kTaps - 1] = node;
#pragma unroll
    for (int tap = kTaps - 2; tap >= 0; --tap) {
      int64_t child = ancestors[tap + 1];
      ancestors[tap] = child >= 0 ? tree.parents[child] : child - 1;
    }
    float seen[kTaps];
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (ancestors[tap] >= 0) seen[tap] = at.input(ancestors[tap]);
    }
    float sum = bias;
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      int place = kTaps - 1 + static_cast<int>(ancestors[tap]);
      sum = __fmaf_rn(ancestors[tap] >= 0 ? seen[tap] : pick(before, place), weight[tap], sum);
    }
    int64_t to = (tree.first_row + node) * p.channels + at.channel;
    pyspec::store_element(p.out, to, p.out_element, p.is_linear ? sum : pyspec::silu(sum));
    if (!tree.advance) *at.recorded(1 - tree.half, node) = seen[kTaps - 1];
  }
  bool moves = tree.advance && tree.nodes;
  if (warp > 0 || !(moves || tree.accepted)) return;
  int64_t nodes = moves ? tree.nodes : 0;
#pragma unroll
  for (int place = 0; place < kTaps - 1; ++place) {
    int64_t behind = place + nodes - (kTaps - 1);
    *at.window(place) = behind < 0 ? pick(before, place + static_cast<int>(nodes)) : at.input(behind);
  }
}

// Grid [trees, pieces of kLanes channels].
template <int kTaps>
__global__ void __launch_bounds__(kLanes* kWarps)
    causal_conv_kernel(const __grid_constant__ CausalConvParams p, int64_t rows) {
  pyspec::wait_for_inputs();
  RoundTree tree = pyspec::tree_on_gpu(p.round, blockIdx.x);
  if (!pyspec::fits(tree, rows, p.sequences, p.record_nodes)) return;
  int64_t channel = blockIdx.y * kLanes + threadIdx.x % kLanes;
  run<kTaps>({p, tree, channel}, channel < p.channels);
}

}  // namespace

// One launch, and none for no trees. rows: of x. A tree that does not fit changes nothing. Returns a
// cudaError_t.
extern "C" int pyspec_causal_conv_cuda(const CausalConvParams& p, int64_t rows, cudaStream_t stream) {
  using Kernel = void (*)(CausalConvParams, int64_t);
  const Kernel kernels[] = {
      causal_conv_kernel<1>, causal_conv_kernel<2>, causal_conv_kernel<3>, causal_conv_kernel<4>,
      causal_conv_kernel<5>, causal_conv_kernel<6>, causal_conv_kernel<7>, causal_conv_kernel<kMostConvTaps>};
  if (p.round.trees == 0) return cudaSuccess;
  int64_t pieces = (p.channels + kLanes - 1) / kLanes;
  dim3 grid(static_cast<unsigned>(p.round.trees), static_cast<unsigned>(pieces));
  return pyspec::launch({grid, kLanes * kWarps, 0, stream}, kernels[p.taps - 1], p, rows);
}
