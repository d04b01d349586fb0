// selective_state on the GPU; kernels/cpu/selective_state.cpp says what is computed.
//
// A block has one tree and one panel of 16 channels, and lives as long as its states do in registers: it
// loads them, replays the accepted nodes, stores, and walks this round's nodes, so that a round reads every
// state once and writes it once at most, whatever the tree. A lane has one channel and kStates neighbouring
// states of it; half a warp covers a panel's channels, so that what a load brings is used whole. y is a sum
// over the lanes of a channel, in one order.
//
// Steps come in tiles. What they read (x, dt, B, C, of the record or of this round) is fetched by all threads
// at once into shared memory, recorded on the way, and the steps of a tile then wait for nothing. Where a
// node is not the child of the one before it, its parent's states come from shared memory, as far as there is
// room for such nodes, else they are walked to again from the nearest that are there. Every step is the same
// two instructions in fp32, replayed, verified, walked again or read as a prompt, so all of them have the
// same bits.
#include "cuda/recurrence.h"
#include "params/selective_state.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::Element;
using pyspec::kStateLanes;
using pyspec::load_element;
using pyspec::RoundTree;
using pyspec::SelectiveStateParams;

constexpr int kTile = 8;            // steps
constexpr int kLanes = 16;          // channels of a block
constexpr int kMostThreads = 256;   // of a block
constexpr int kMostKept = 8;        // nodes whose states wait for another child
constexpr int kShared = 46 * 1024;  // bytes; every block may have so many
constexpr float kLog2E = 1.44269504f;

// What the host decides.
struct Plan {
  int64_t rows;
  int kept;  // nodes that there is shared memory for, at least one
};

// Of a block, in shared memory.
struct Tile {
  float* input;   // [kTile, 16]: dt x
  float* rate;    // [kTile, 16]: where each state has its own decay dt log2(e), else the decay
  float* b;       // [kTile, state_size]
  float* c;       // [kTile, state_size]
  float* sum;     // [warps, kTile, 16]: y of a warp's states
  int* parent;    // [kTile], of a new node
  int* branches;  // [kTile]: whether a child other than the next node continues a new node
  float* kept;    // [plan.kept, kStates, threads]
};

__host__ __device__ int tile_floats(int64_t state_size, int threads) {
  return kTile * (2 * kLanes + 2 * static_cast<int>(state_size) + threads / 2 + 2);
}

__device__ float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The steps of a block are the accepted nodes, then this round's.
template <bool kPerState, int kStates>
struct Block {
  const SelectiveStateParams& p;
  const Plan& plan;
  RoundTree tree;
  int64_t steps, panel, channel, head, group;  // channel: the panel's first
  int first, lane;                             // this thread's first state, and its channel of the panel
  Tile tile;
  float state[kStates];
  float a[kPerState ? kStates : 1];
  int kept_node[kMostKept];
  int kept;

  __device__ Block(const SelectiveStateParams& params, const Plan& of, const RoundTree& at, int64_t panel_of)
      : p(params), plan(of), tree(at), steps(at.accepted + at.nodes), panel(panel_of), kept(0) {
    int64_t panels = p.channels / kLanes;
    channel = panel * kLanes;
    head = panel * p.heads / panels;  // kPerState: not used
    group = panel * p.groups / panels;
    first = static_cast<int>(threadIdx.x) / kLanes * kStates;
    lane = static_cast<int>(threadIdx.x) % kLanes;
    float* next = reinterpret_cast<float*>(dynamic_shared);
    tile.input = next, tile.rate = tile.input + kTile * kLanes;
    tile.b = tile.rate + kTile * kLanes, tile.c = tile.b + kTile * p.state_size;
    tile.sum = tile.c + kTile * p.state_size;
    tile.parent = reinterpret_cast<int*>(tile.sum + kTile * blockDim.x / 2);
    tile.branches = tile.parent + kTile;
    tile.kept = next + tile_floats(p.state_size, static_cast<int>(blockDim.x));
#pragma unroll
    for (int k = 0; k < (kPerState ? kStates : 1); ++k)
      a[k] = kPerState ? p.a[(panel * p.state_size + first + k) * kLanes + lane] : p.a[head] * kLog2E;
  }

  // ==== where things are ====

  __device__ float* own_states() const {  // from one to the next: kLanes
    return p.state + ((tree.sequence * (p.channels / kLanes) + panel) * p.state_size + first) * kLanes + lane;
  }
  __device__ float* recorded(int64_t half, int64_t node) const {
    return p.record +
           ((half * p.sequences + tree.sequence) * p.record_nodes + node) * pyspec::record_width(p);
  }
  __device__ bool is_new(int64_t step) const { return step >= tree.accepted; }
  __device__ int64_t row(int64_t step) const { return tree.first_row + step - tree.accepted; }
  __device__ float* record_of(int64_t step) const {  // of an accepted node, or where a new one goes
    return is_new(step) ? recorded(tree.node_half, tree.first_node + step - tree.accepted)
                        : recorded(tree.half, tree.path[step]);
  }
  __device__ bool records(int64_t step) const { return is_new(step) && !tree.advance; }

  // ==== what a step reads ====

  __device__ float x_of(int64_t step, int at) const {
    if (!is_new(step)) return record_of(step)[channel + at];
    return load_element(p.x, row(step) * p.x_stride + channel + at, p.x_element);
  }
  __device__ float dt_of(int64_t step, int at) const {
    int64_t place = kPerState ? channel + at : head;
    if (!is_new(step)) return record_of(step)[p.channels + place];
    return softplus(p.dt[row(step) * p.dt_stride + place] + (p.dt_bias ? p.dt_bias[place] : 0.0f));
  }
  __device__ float b_of(int64_t step, int n) const {
    int64_t place = group * p.state_size + n;
    if (!is_new(step)) return record_of(step)[p.channels + p.heads + place];
    return load_element(p.b, row(step) * p.b_stride + place, p.x_element);
  }
  __device__ float rate_of(float dt) const {
    return kPerState ? __fmul_rn(dt, kLog2E) : exp2f(__fmul_rn(dt, a[0]));
  }

  // Fills the tile, and records what is new: dt of a head, and B of a group, by the block with its first
  // panel.
  __device__ void fetch(int64_t begin, int count) const {
    int64_t panels = p.channels / kLanes;
    bool first_of_head = kPerState || panel % (panels / p.heads) == 0;
    bool first_of_group = panel % (panels / p.groups) == 0;
    for (int i = threadIdx.x; i < count * kLanes; i += blockDim.x) {
      int64_t step = begin + i / kLanes;
      int at = i % kLanes;
      float x = x_of(step, at), dt = dt_of(step, at);
      tile.input[i] = __fmul_rn(dt, x), tile.rate[i] = rate_of(dt);
      if (!records(step)) continue;
      float* record = record_of(step);
      record[channel + at] = x;
      if (kPerState) {
        record[p.channels + channel + at] = dt;
      } else if (first_of_head && at == 0) {
        record[p.channels + head] = dt;
      }
    }
    int size = static_cast<int>(p.state_size);
    for (int i = threadIdx.x; i < count * size; i += blockDim.x) {
      int64_t step = begin + i / size;
      int n = i % size;
      float b = b_of(step, n);
      tile.b[i] = b;
      if (is_new(step)) tile.c[i] = load_element(p.c, row(step) * p.c_stride + group * size + n, p.x_element);
      if (records(step) && first_of_group) record_of(step)[p.channels + p.heads + group * size + n] = b;
    }
    for (int64_t node = threadIdx.x; node < tree.nodes; node += blockDim.x) {
      int64_t parent = tree.parents[node], at = node + tree.accepted - begin;
      if (at >= 0 && at < count) tile.parent[at] = static_cast<int>(parent);
      at = parent + tree.accepted - begin;
      if (parent >= 0 && parent != node - 1 && at >= 0 && at < count) tile.branches[at] = 1;
    }
    __syncthreads();
  }

  // ==== steps ====

  __device__ void take(int k, float input, float rate, float b) {
    float decay = kPerState ? exp2f(__fmul_rn(rate, a[kPerState ? k : 0])) : rate;
    state[k] = __fmaf_rn(input, b, __fmul_rn(state[k], decay));
  }
  __device__ void take_step(int at) {  // of the tile
    float input = tile.input[at * kLanes + lane], rate = tile.rate[at * kLanes + lane];
    const float* b = tile.b + at * p.state_size + first;
#pragma unroll
    for (int k = 0; k < kStates; ++k) take(k, input, rate, b[k]);
  }
  __device__ void take_step_again(int64_t step) {
    float dt = dt_of(step, lane), input = __fmul_rn(dt, x_of(step, lane)), rate = rate_of(dt);
#pragma unroll
    for (int k = 0; k < kStates; ++k) take(k, input, rate, b_of(step, first + k));
  }

  __device__ void load() {
    const float* from = own_states();
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k] = from[k * kLanes];
  }
  __device__ void store() const {
    float* to = own_states();
#pragma unroll
    for (int k = 0; k < kStates; ++k) to[k * kLanes] = state[k];
  }

  // ==== branches ====

  __device__ float* kept_states(int slot) const {  // from one to the next: blockDim.x
    return tile.kept + slot * kStates * blockDim.x + threadIdx.x;
  }
  __device__ int slot_of(int node) const {
    int found = -1;
#pragma unroll
    for (int slot = 0; slot < kMostKept; ++slot)
      if (slot < kept && kept_node[slot] == node) found = slot;
    return found;
  }
  __device__ void keep(int node) {
    if (kept == plan.kept) return;
    float* to = kept_states(kept);
#pragma unroll
    for (int k = 0; k < kStates; ++k) to[k * blockDim.x] = state[k];
#pragma unroll
    for (int slot = 0; slot < kMostKept; ++slot)
      if (slot == kept) kept_node[slot] = node;
    ++kept;
  }
  // The states behind a node that branches. The first of these was kept, and the others are all below it.
  __device__ void return_to(int node) {
    int from = node, depth = 0;
    while (slot_of(from) < 0) from = tree.parents[from], ++depth;
    const float* kept_here = kept_states(slot_of(from));
#pragma unroll
    for (int k = 0; k < kStates; ++k) state[k] = kept_here[k * blockDim.x];
    for (; depth > 0; --depth) {
      int next = node;
      for (int above = 1; above < depth; ++above) next = tree.parents[next];
      take_step_again(tree.accepted + next);
    }
  }

  // ==== the block's work ====

  __device__ void visit(int node, int at) {
    if (tile.parent[at] != node - 1) return_to(tile.parent[at]);
    take_step(at);
    const float* c = tile.c + at * p.state_size + first;
    float y[4] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) y[k % 4] = __fmaf_rn(state[k], c[k], y[k % 4]);
    float total = (y[0] + y[1]) + (y[2] + y[3]);
    total += __shfl_xor_sync(0xffffffffu, total, kLanes);
    if (threadIdx.x % 32 < kLanes) tile.sum[(threadIdx.x / 32 * kTile + at) * kLanes + lane] = total;
    if (tile.branches[at]) keep(node);
  }

  // y of the tile's new nodes, of which the first is `at`.
  __device__ void write(int64_t begin, int at, int count) const {
    __syncthreads();
    if (threadIdx.x < kTile) tile.branches[threadIdx.x] = 0;
    int warps = static_cast<int>(blockDim.x) / 32;
    for (int i = at * kLanes + threadIdx.x; i < count * kLanes; i += blockDim.x) {
      int64_t to = row(begin + i / kLanes), own = channel + i % kLanes;
      float y = 0.0f;
      for (int warp = 0; warp < warps; ++warp) y += tile.sum[warp * kTile * kLanes + i];
      if (p.d) y = __fmaf_rn(p.d[own], load_element(p.x, to * p.x_stride + own, p.x_element), y);
      if (p.z) y *= pyspec::silu(p.z[to * p.z_stride + own]);
      pyspec::store_element(p.out, to * p.channels + own, p.out_element, y);
    }
    __syncthreads();
  }

  __device__ void run() {
    load();
    if (threadIdx.x < kTile) tile.branches[threadIdx.x] = 0;
    __syncthreads();
    for (int64_t begin = 0; begin < steps; begin += kTile) {
      int count = static_cast<int>(steps - begin < kTile ? steps - begin : kTile);
      int old = static_cast<int>(tree.accepted - begin < 0 ? 0 : tree.accepted - begin);
      fetch(begin, count);
      for (int at = 0; at < count; ++at) {
        int64_t step = begin + at;
        if (is_new(step)) {
          visit(static_cast<int>(step - tree.accepted), at);
        } else {
          take_step(at);
          if (tree.fold && step == tree.accepted - 1) store();
        }
      }
      write(begin, old < count ? old : count, count);
    }
    if (tree.advance) store();
  }
};

// Grid [trees, panels].
template <bool kPerState, int kStates>
__global__ void __launch_bounds__(kMostThreads, 1)
    selective_state_kernel(const __grid_constant__ SelectiveStateParams p,
                           const __grid_constant__ Plan plan) {
  int64_t panels = p.channels / kLanes;
  RoundTree tree = pyspec::tree_of(p.round, blockIdx.x / panels);
  if (!pyspec::fits(tree, p.round, plan.rows, p.sequences, p.record_nodes)) return;
  Block<kPerState, kStates>(p, plan, tree, blockIdx.x % panels).run();
}

template <bool kPerState, int kStates>
cudaError_t launch(const SelectiveStateParams& p, int64_t rows, cudaStream_t stream) {
  int threads = static_cast<int>(p.state_size) / kStates * kLanes;
  int64_t floats = tile_floats(p.state_size, threads), kept = kStates * threads;
  Plan plan{rows, static_cast<int>((kShared / 4 - floats) / kept)};
  if (plan.kept > kMostKept) plan.kept = kMostKept;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.round.trees * (p.channels / kLanes)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(4 * (floats + plan.kept * kept));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, selective_state_kernel<kPerState, kStates>, p, plan);
}

}  // namespace

// One launch, and none for no trees. rows: of x; state_size is at most 256. A tree that does not fit changes
// nothing. Returns a cudaError_t.
extern "C" int pyspec_selective_state_cuda(const SelectiveStateParams& p, int64_t rows, cudaStream_t stream) {
  if (p.round.trees == 0) return cudaSuccess;
  bool wide = p.state_size % 32 == 0;
  if (p.a_per_state) return wide ? launch<true, 16>(p, rows, stream) : launch<true, 8>(p, rows, stream);
  return wide ? launch<false, 16>(p, rows, stream) : launch<false, 8>(p, rows, stream);
}
