// selective_state on the GPU; kernels/cpu/selective_state.cpp says what is computed.
//
// A block has one tree and one panel of 16 channels, and lives as long as its states do in registers: it
// loads them, replays the accepted nodes, stores, and walks this round's nodes, so that a round reads every
// state once and writes it once at most, whatever the tree. A lane has one channel and kStates neighbouring
// states of it; half a warp covers a panel's channels, so that what a load brings is used whole. y is a sum
// over the lanes of a channel, in one order.
//
// Steps come in tiles. What they read (x, dt, z, B, C, of the record or of this round) is fetched by all
// threads at once, all of it on its way before any of it is looked at, into shared memory, recorded on the
// way, and the steps of a tile then wait for nothing. A round of up to kMostTile steps is one tile, so its
// time is that of two loads that wait for each other, of the round and of all else, and of the steps. Where a
// node is not the child of the one before it, its parent's states come from shared memory, as far as there is
// room for such nodes, else they are walked to again from the nearest that are there. Every step is the same
// two instructions in fp32, replayed, verified, walked again or read as a prompt, so all of them have the
// same bits.
#include "cuda/recurrence.h"
#include "params/selective_state.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::Element;
using pyspec::kLog2E;
using pyspec::kStateLanes;
using pyspec::RoundTree;
using pyspec::SelectiveStateParams;
using pyspec::softplus;
using pyspec::to_float;

constexpr int kMostTile = 16;       // steps
constexpr int kLanes = 16;          // channels of a block
constexpr int kMostThreads = 256;   // of a block
constexpr int kTurns = 4;           // in which a block fetches x, dt and z
constexpr int kMostKept = 4;        // nodes whose states wait for another child
constexpr int kShared = 46 * 1024;  // bytes; every block may have so many

// What the host decides.
struct Plan {
  int64_t rows;
  int panels_per_head, panels_per_group;  // the former not for a_per_state
  int tile;                               // steps
  int kept;                               // nodes that there is shared memory for, at least one
};

// Where a step's inputs begin, for a block.
struct Source {
  const void *x, *b, *c;
  const float *dt, *z;
  float* record;  // of a new node, or null
};

// Of a block, in shared memory.
struct Tile {
  Source* source;  // [tile]
  float* input;    // [tile, 16]: dt x
  float* rate;     // [tile, 16]: where each state has its own decay dt log2(e), else the decay
  float* x;        // [tile, 16]
  float* gate;     // [tile, 16]: z
  float* b;        // [tile, state_size]
  float* c;        // [tile, state_size]
  float* sum;      // [warps, tile, 16]: y of a warp's states
  int* parent;     // [tile], of a new node
  int* branches;   // [tile]: whether a child other than the next node continues a new node
  float* kept;     // [plan.kept, kStates, threads]
};

int step_floats(int state_size, int threads) {
  return 4 * kLanes + 2 * state_size + threads / 2 + 2 + static_cast<int>(sizeof(Source)) / 4;
}

// The steps of a block are the accepted nodes, then this round's.
template <bool kPerState, int kStates>
struct Block {
  const SelectiveStateParams& p;
  const Plan& plan;
  RoundTree tree;
  int steps, accepted, panel, channel, head, group;  // channel: the panel's first
  int first, lane;  // this thread's first state, and its channel of the panel
  int size;         // states of a channel
  int begin;        // the first step of the tile
  Tile tile;
  float state[kStates];
  float a[kPerState ? kStates : 1];
  float bias, d;  // of this thread's channel: asked for before anything is waited for
  int kept_node[kMostKept];
  int kept;

  __device__ Block(const SelectiveStateParams& params, const Plan& of, const RoundTree& at, int panel_of)
      : p(params), plan(of), tree(at), accepted(static_cast<int>(at.accepted)), panel(panel_of), kept(0) {
    steps = accepted + static_cast<int>(tree.nodes);
    channel = panel * kLanes;
    head = kPerState ? 0 : panel / plan.panels_per_head;
    group = panel / plan.panels_per_group;
    first = static_cast<int>(threadIdx.x) / kLanes * kStates;
    lane = static_cast<int>(threadIdx.x) % kLanes;
    size = static_cast<int>(p.state_size);
    int rows = plan.tile * kLanes;
    tile.source = reinterpret_cast<Source*>(dynamic_shared);
    tile.input = reinterpret_cast<float*>(tile.source + plan.tile), tile.rate = tile.input + rows;
    tile.x = tile.rate + rows, tile.gate = tile.x + rows;
    tile.b = tile.gate + rows, tile.c = tile.b + plan.tile * size;
    tile.sum = tile.c + plan.tile * size;
    tile.kept = tile.sum + plan.tile * static_cast<int>(blockDim.x) / 2;
    tile.parent = reinterpret_cast<int*>(tile.kept + plan.kept * kStates * static_cast<int>(blockDim.x));
    tile.branches = tile.parent + plan.tile;
#pragma unroll
    for (int k = 0; k < (kPerState ? kStates : 1); ++k)
      a[k] = kPerState ? p.a[(int64_t{panel} * size + first + k) * kLanes + lane] : p.a[head];
    bias = p.dt_bias ? p.dt_bias[kPerState ? channel + lane : head] : 0.0f;
    d = p.d ? p.d[channel + lane] : 0.0f;
  }

  // ==== where things are ====

  __device__ float* own_states() const {  // from one to the next: kLanes
    return p.state + ((tree.sequence * (p.channels / kLanes) + panel) * size + first) * kLanes + lane;
  }
  __device__ float* recorded(int64_t half, int64_t node) const {
    return p.record +
           ((half * p.sequences + tree.sequence) * p.record_nodes + node) * pyspec::record_width(p);
  }
  __device__ bool is_new(int step) const { return step >= accepted; }
  __device__ int64_t row(int step) const { return tree.first_row + step - accepted; }
  __device__ Element element_of(int step) const { return is_new(step) ? p.x_element : Element::kFloat32; }

  // ==== what a step reads ====

  __device__ Source source_of(int step) const {
    Source from{};
    int64_t own = kPerState ? channel : head, states = int64_t{group} * size;
    if (is_new(step)) {
      int64_t row = this->row(step), width = p.x_element == Element::kFloat32 ? 4 : 2;
      from.x = static_cast<const char*>(p.x) + (row * p.x_stride + channel) * width;
      from.b = static_cast<const char*>(p.b) + (row * p.b_stride + states) * width;
      from.c = static_cast<const char*>(p.c) + (row * p.c_stride + states) * width;
      from.dt = p.dt + row * p.dt_stride + own;
      from.z = p.z ? p.z + row * p.z_stride + channel : nullptr;
      from.record = tree.advance ? nullptr : recorded(1 - tree.half, step - accepted);
    } else {
      const float* record = recorded(tree.half, tree.path[step]);
      from.x = record + channel, from.dt = record + p.channels + own;
      from.b = record + p.channels + p.heads + states;
    }
    return from;
  }
  // As it lies in memory; what it means is computed when all is on its way.
  __device__ float dt_at(const Source& from) const { return from.dt[kPerState ? lane : 0]; }
  __device__ float dt_of(int step, float loaded) const {
    if (!is_new(step)) return loaded;
    return softplus(loaded + bias);
  }
  __device__ float rate_of(float dt) const {
    return kPerState ? __fmul_rn(dt, kLog2E) : exp2f(__fmul_rn(dt, __fmul_rn(a[0], kLog2E)));
  }

  // Fills the tile, and records what is new: dt of a head, and B of a group, by the block with its first
  // panel. False where the tree does not fit, before anything is written.
  __device__ bool fetch(int count) {
    int turn = static_cast<int>(blockDim.x) / kLanes, own = static_cast<int>(threadIdx.x) / kLanes;
    int n = static_cast<int>(threadIdx.x);
    if (n < count) tile.source[n] = source_of(begin + n);
    if (n < plan.tile) tile.branches[n] = 0;
    __syncthreads();

    uint32_t x[kTurns], b[kMostTile], c[kMostTile];
    float dt[kTurns], gate[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      int at = own + i * turn;
      if (at >= count) break;
      const Source& from = tile.source[at];
      x[i] = pyspec::load_bits(from.x, lane, element_of(begin + at)), dt[i] = dt_at(from);
      if (from.z) gate[i] = from.z[lane];
    }
    if (n < size) {
#pragma unroll
      for (int at = 0; at < kMostTile; ++at) {
        if (at >= count) break;
        const Source& from = tile.source[at];
        b[at] = pyspec::load_bits(from.b, n, element_of(begin + at));
        if (from.c) c[at] = pyspec::load_bits(from.c, n, p.x_element);
      }
    }
    if (begin == 0 && !pyspec::parents_fit(tree)) return false;

    bool first_of_head = kPerState || panel % plan.panels_per_head == 0;
    bool first_of_group = panel % plan.panels_per_group == 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      int at = own + i * turn, to = at * kLanes + lane;
      if (at >= count) break;
      float x_here = to_float(x[i], element_of(begin + at)), dt_here = dt_of(begin + at, dt[i]);
      tile.input[to] = __fmul_rn(dt_here, x_here), tile.rate[to] = rate_of(dt_here);
      tile.x[to] = x_here, tile.gate[to] = gate[i];
      float* record = tile.source[at].record;
      if (!record) continue;
      record[channel + lane] = x_here;
      if (kPerState) {
        record[p.channels + channel + lane] = dt_here;
      } else if (first_of_head && lane == 0) {
        record[p.channels + head] = dt_here;
      }
    }
    if (n < size) {
      int64_t place = p.channels + p.heads + int64_t{group} * size + n;
#pragma unroll
      for (int at = 0; at < kMostTile; ++at) {
        if (at >= count) break;
        float b_here = to_float(b[at], element_of(begin + at));
        tile.b[at * size + n] = b_here, tile.c[at * size + n] = to_float(c[at], p.x_element);
        float* record = tile.source[at].record;
        if (record && first_of_group) record[place] = b_here;
      }
    }
    for (int node = n; node < tree.nodes; node += static_cast<int>(blockDim.x)) {
      int parent = tree.parents[node], at = node + accepted - begin;
      if (at >= 0 && at < count) tile.parent[at] = parent;
      at = parent + accepted - begin;
      if (parent >= 0 && parent != node - 1 && at >= 0 && at < count) tile.branches[at] = 1;
    }
    __syncthreads();
    return true;
  }

  // ==== steps ====

  __device__ void take(int k, float input, float rate, float b) {
    float decay = kPerState ? exp2f(__fmul_rn(rate, a[kPerState ? k : 0])) : rate;
    state[k] = __fmaf_rn(input, b, __fmul_rn(state[k], decay));
  }
  __device__ void take_step(int at) {  // of the tile
    float input = tile.input[at * kLanes + lane], rate = tile.rate[at * kLanes + lane];
    const float* b = tile.b + at * size + first;
#pragma unroll
    for (int k = 0; k < kStates; ++k) take(k, input, rate, b[k]);
  }
  __device__ void take_step_again(int step) {
    if (step >= begin) return take_step(step - begin);
    Source from = source_of(step);
    Element element = element_of(step);
    float dt = dt_of(step, dt_at(from)), rate = rate_of(dt);
    float input = __fmul_rn(dt, to_float(pyspec::load_bits(from.x, lane, element), element));
#pragma unroll
    for (int k = 0; k < kStates; ++k) {
      take(k, input, rate, to_float(pyspec::load_bits(from.b, first + k, element), element));
    }
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
      take_step_again(accepted + next);
    }
  }

  // ==== the block's work ====

  __device__ void visit(int node, int at) {
    if (tile.parent[at] != node - 1) return_to(tile.parent[at]);
    take_step(at);
    const float* c = tile.c + at * size + first;
    float y[4] = {};
#pragma unroll
    for (int k = 0; k < kStates; ++k) y[k % 4] = __fmaf_rn(state[k], c[k], y[k % 4]);
    float total = (y[0] + y[1]) + (y[2] + y[3]);
    total += __shfl_xor_sync(0xffffffffu, total, kLanes);
    if (threadIdx.x % 32 < kLanes) tile.sum[(threadIdx.x / 32 * plan.tile + at) * kLanes + lane] = total;
    if (tile.branches[at]) keep(node);
  }

  // y of the tile's new nodes, of which the first is `at`.
  __device__ void write(int at, int count) const {
    __syncthreads();
    int warps = static_cast<int>(blockDim.x) / 32;
    for (int i = at * kLanes + threadIdx.x; i < count * kLanes; i += blockDim.x) {
      float y = 0.0f;
      for (int warp = 0; warp < warps; ++warp) y += tile.sum[warp * plan.tile * kLanes + i];
      if (p.d) y = __fmaf_rn(d, tile.x[i], y);
      if (p.z) y *= pyspec::silu(tile.gate[i]);
      pyspec::store_element(p.out, row(begin + i / kLanes) * p.channels + channel + lane, p.out_element, y);
    }
    __syncthreads();
  }

  __device__ void run() {
    load();
    for (begin = 0; begin < steps; begin += plan.tile) {
      int count = min(steps - begin, plan.tile), old = max(accepted - begin, 0);
      if (!fetch(count)) return;
      for (int at = 0; at < count; ++at) {
        int step = begin + at;
        if (is_new(step)) {
          visit(step - accepted, at);
        } else {
          take_step(at);
          if (step == accepted - 1) store();
        }
      }
      write(min(old, count), count);
    }
    if (tree.advance) store();
  }
};

// Grid [trees, panels].
template <bool kPerState, int kStates>
__global__ void __launch_bounds__(kMostThreads, kPerState&& kStates == 16 ? 1 : 2)
    selective_state_kernel(const __grid_constant__ SelectiveStateParams p,
                           const __grid_constant__ Plan plan) {
  pyspec::wait_for_inputs();
  RoundTree tree = pyspec::tree_on_gpu(p.round, blockIdx.x);
  if (!pyspec::fits(tree, plan.rows, p.sequences, p.record_nodes)) return;
  Block<kPerState, kStates>(p, plan, tree, static_cast<int>(blockIdx.y)).run();
}

template <bool kPerState, int kStates>
cudaError_t launch(const SelectiveStateParams& p, int64_t rows, cudaStream_t stream) {
  int size = static_cast<int>(p.state_size), threads = size / kStates * kLanes;
  int panels = static_cast<int>(p.channels) / kLanes, kept = kStates * threads;
  Plan plan{rows};
  plan.panels_per_head = kPerState ? 1 : panels / static_cast<int>(p.heads);
  plan.panels_per_group = panels / static_cast<int>(p.groups);
  int step = step_floats(size, threads);
  plan.tile = min(min(kMostTile, kTurns * threads / kLanes), (kShared / 4 - kept) / step);
  plan.kept = min(kMostKept, (kShared / 4 - plan.tile * step) / kept);
  dim3 grid(static_cast<unsigned>(p.round.trees), static_cast<unsigned>(panels));
  int64_t shared = 4 * (plan.tile * step + plan.kept * kept);
  return pyspec::launch({grid, static_cast<unsigned>(threads), shared, stream},
                        selective_state_kernel<kPerState, kStates>, p, plan);
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
