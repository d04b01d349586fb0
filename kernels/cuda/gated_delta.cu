// gated_delta on the GPU; kernels/cpu/gated_delta.cpp says what is computed.
//
// A block has one tree and one panel of 16 values of a head, and lives as long as its state does in
// registers: it loads it, replays the accepted nodes, stores, and walks this round's nodes. So a round reads
// every state once and writes it once at most, whatever the tree. A warp has four values and all of their
// keys: a lane has one value and an eighth of the keys, and what a state answers to k and q is a sum over
// the eight lanes of a value, by shuffles in one order. So warps wait for each other only where inputs are
// fetched, and states are loaded and stored through shared memory, whole lines at a time.
//
// Steps come in tiles. What they read is fetched by all threads at once, all of it on its way before any of
// it is looked at: a warp has some of the steps, brings their q and k to length 1 in shared memory, and
// records what is new. A node asks its parent's state, and y is what that answers to d q, plus (q k) u: a
// node without children never makes its state, and leaves its parent's in registers. Else the states of a
// node with children to come wait in shared memory, as far as there is room, or are walked to again from the
// nearest that are there. Every state is made by the same two instructions in fp32, replayed, verified,
// walked again or read as a prompt, so all of them have the same bits. Bound by memory for large batches, by
// latency for small ones: of two loads that wait for each other, and of 40 multiply-adds and three shuffles
// for each step.
#include "cuda/gated_delta_steps.h"

namespace {

using pyspec::DeltaPlan;
using pyspec::GatedDeltaParams;
using pyspec::kLanes, pyspec::kSlices, pyspec::kThreads, pyspec::kValues, pyspec::kWarp, pyspec::kWarps;
using pyspec::RoundTree;

constexpr int kMostKept = 4;        // nodes whose states wait for another child
constexpr int kShared = 46 * 1024;  // bytes; every block may have so many

template <bool kPerKey, int kStates>
struct Block : pyspec::DeltaSteps<kPerKey, kStates> {
  using Steps = pyspec::DeltaSteps<kPerKey, kStates>;
  using Steps::begin, Steps::steps, Steps::accepted, Steps::channel, Steps::keys, Steps::state;
  using Steps::kDecays, Steps::kKeys, Steps::kPanel, Steps::place;
  using Steps::p, Steps::plan, Steps::tree, Steps::tile, Steps::warp, Steps::value, Steps::slice;
  using Steps::recorded, Steps::u_offset, Steps::own_panel, Steps::row;

  int held = -1, held_last = -1;  // the node whose state that is, or -1, and its last child, or -1
  int kept_node[kMostKept], kept = 0;

  using Steps::Steps;

  // ==== steps ====

  __device__ float4 of_slice(const float* step, int j) const {
    return reinterpret_cast<const float4*>(step)[j * kSlices + slice];
  }
  __device__ float4 decays_of(int at, int j) const {
    if (kPerKey) return of_slice(tile.d + at * kDecays, j);
    return make_float4(tile.d[at], tile.d[at], tile.d[at], tile.d[at]);
  }
  // From the state of a node's parent to its own.
  __device__ void take(int at, float u) {
#pragma unroll
    for (int j = 0; j < kStates / 4; ++j) {
      float4 k = of_slice(tile.k + at * kKeys, j), d = decays_of(at, j);
      float* s = state + 4 * j;
      s[0] = __fmaf_rn(k.x, u, __fmul_rn(s[0], d.x)), s[1] = __fmaf_rn(k.y, u, __fmul_rn(s[1], d.y));
      s[2] = __fmaf_rn(k.z, u, __fmul_rn(s[2], d.z)), s[3] = __fmaf_rn(k.w, u, __fmul_rn(s[3], d.w));
    }
  }
  __device__ void take_step(int at) { take(at, tile.value[at * kLanes + value]); }  // of the tile
  __device__ void take_node_again(int node) {
    int at = node + accepted - begin;
    if (at >= 0) return take_step(at);
    typename Steps::Fetched again;
    this->start(node + accepted, again);
    float u = recorded(1 - tree.half, node)[u_offset() + value], k_scale = this->inverse_length(again.k);
    __syncwarp();
    this->finish_new(node, again, k_scale, plan.tile + warp, false);
    __syncwarp();
    take(plan.tile + warp, u);
  }

  // This thread's places of a panel in shared memory, which no other thread touches between two barriers.
  __device__ void load(int slot) {
    const float* from = tile.states + slot * kPanel;
#pragma unroll
    for (int i = 0; i < kStates; ++i) state[i] = from[place(i / 4 * kWarp + slice * 4 + i % 4, value)];
  }
  __device__ void save(int slot) const {
    float* to = tile.states + slot * kPanel;
#pragma unroll
    for (int i = 0; i < kStates; ++i) to[place(i / 4 * kWarp + slice * 4 + i % 4, value)] = state[i];
  }
  __device__ void store() const {
    save(0);
    __syncthreads();
    for (int n = static_cast<int>(threadIdx.x); n < keys * kLanes; n += kThreads)
      own_panel()[n] = tile.states[place(n / kLanes, n % kLanes)];
    __syncthreads();
  }

  // ==== branches ====

  __device__ int slot_of(int node) const {
    int found = -1;
#pragma unroll
    for (int slot = 0; slot < kMostKept; ++slot)
      if (slot < kept && kept_node[slot] == node) found = slot;
    return found;
  }
  // Before another state takes its place: one with children to come waits for them.
  __device__ void keep_for_children_behind(int node) {
    if (held_last <= node || kept == plan.kept) return;
    save(kept);
#pragma unroll
    for (int slot = 0; slot < kMostKept; ++slot)
      if (slot == kept) kept_node[slot] = held;
    ++kept;
  }
  // The first state that another took the place of was kept, and all that are returned to are below it.
  __device__ void return_to(int node) {
    __syncwarp();  // u of other lanes
    int from = node, depth = 0;
    while (slot_of(from) < 0) from = tree.parents[from], ++depth;
    load(slot_of(from));
    for (; depth > 0; --depth) {
      int next = node;
      for (int above = 1; above < depth; ++above) next = tree.parents[next];
      take_node_again(next);
    }
    held = node, held_last = -1;  // it waits already, or there was no room
  }

  // ==== the block's work ====

  // Writes y, and in place of v u.
  __device__ void ask(int node, int at) {
    float to_k[4] = {}, to_q[4] = {};
#pragma unroll
    for (int j = 0; j < kStates / 4; ++j) {
      float4 k = of_slice(tile.k + at * kKeys, j), q = of_slice(tile.q + at * kKeys, j);
      float4 s = make_float4(state[4 * j], state[4 * j + 1], state[4 * j + 2], state[4 * j + 3]);
      if (kPerKey) {
        float4 d = decays_of(at, j);
        s = make_float4(s.x * d.x, s.y * d.y, s.z * d.z, s.w * d.w);
      }
      to_k[0] = __fmaf_rn(s.x, k.x, to_k[0]), to_q[0] = __fmaf_rn(s.x, q.x, to_q[0]);
      to_k[1] = __fmaf_rn(s.y, k.y, to_k[1]), to_q[1] = __fmaf_rn(s.y, q.y, to_q[1]);
      to_k[2] = __fmaf_rn(s.z, k.z, to_k[2]), to_q[2] = __fmaf_rn(s.z, q.z, to_q[2]);
      to_k[3] = __fmaf_rn(s.w, k.w, to_k[3]), to_q[3] = __fmaf_rn(s.w, q.w, to_q[3]);
    }
    float answer = (to_k[0] + to_k[1]) + (to_k[2] + to_k[3]), y = (to_q[0] + to_q[1]) + (to_q[2] + to_q[3]);
#pragma unroll
    for (int with = kValues; with < kWarp; with *= 2) {
      answer += __shfl_xor_sync(0xffffffffu, answer, with), y += __shfl_xor_sync(0xffffffffu, y, with);
    }
    if (!kPerKey) answer *= tile.d[at], y *= tile.d[at];
    float u = tile.beta[at] * (tile.value[at * kLanes + value] - answer);
    __syncwarp();
    if (slice == 0) {
      tile.value[at * kLanes + value] = u;
      if (!tree.advance) recorded(1 - tree.half, node)[u_offset() + value] = u;
      int64_t to = row(node) * p.channels + channel + value;
      pyspec::store_element(p.out, to, p.out_element, __fmaf_rn(tile.qk[at], u, y));
    }
    __syncwarp();
  }

  __device__ void visit(int node, int at) {
    int parent = tree.advance ? node - 1 : tile.parent[at], last = tile.last[at];
    if (parent != held) keep_for_children_behind(node), return_to(parent);
    ask(node, at);
    if (!tree.advance && last < 0) return;
    keep_for_children_behind(node);
    take_step(at);
    held = node, held_last = last;
  }

  __device__ void run() {
    for (begin = 0; begin < steps; begin += plan.tile) {
      int count = min(steps - begin, plan.tile);
      if (!this->fetch(count)) return;
      if (begin == 0) load(0);
      for (int at = 0; at < count; ++at) {
        int step = begin + at;
        if (step >= accepted) {
          visit(step - accepted, at);
        } else {
          take_step(at);
          if (step == accepted - 1) store();
        }
      }
      __syncthreads();
    }
    if (tree.advance && tree.nodes) store();
  }
};

// Grid [trees, panels].
// Blocks that a multiprocessor has registers for.
constexpr int blocks_of(bool per_key, int states) { return states > 16 ? 2 : per_key && states > 8 ? 3 : 4; }

// Grid [trees, panels].
template <bool kPerKey, int kStates>
__global__ void __launch_bounds__(kThreads, blocks_of(kPerKey, kStates))
    gated_delta_kernel(const __grid_constant__ GatedDeltaParams p, const __grid_constant__ DeltaPlan plan) {
  pyspec::wait_for_inputs();
  RoundTree tree = pyspec::tree_on_gpu(p.round, blockIdx.x);
  if (!pyspec::fits(tree, plan.rows, p.sequences, p.record_nodes)) return;
  Block<kPerKey, kStates>(p, plan, tree, static_cast<int>(blockIdx.y)).run();
}

// Shared memory for what a tree of the average size needs: what it takes, other blocks lack.
template <bool kPerKey, int kStates>
cudaError_t launch(const GatedDeltaParams& p, int64_t rows, cudaStream_t stream) {
  using Of = Block<kPerKey, kStates>;
  int panels = static_cast<int>(p.channels) / kLanes, again = kWarps * Of::kAgain;
  int nodes = static_cast<int>((rows + p.round.trees - 1) / p.round.trees);
  DeltaPlan plan{rows, panels / static_cast<int>(p.heads)};
  plan.tile = min(Of::kMostTile, max(1, nodes + static_cast<int>(p.round.longest_path)));
  int room = (kShared / 4 - again - plan.tile * Of::kStep) / Of::kPanel;
  plan.kept = max(1, min(min(kMostKept, room), nodes / 2));
  plan.inverse_root = 1.0f / sqrtf(static_cast<float>(p.keys));
  dim3 grid(static_cast<unsigned>(p.round.trees), static_cast<unsigned>(panels));
  int64_t shared = 4 * (again + plan.tile * Of::kStep + plan.kept * Of::kPanel);
  return pyspec::launch({grid, kThreads, shared, stream}, gated_delta_kernel<kPerKey, kStates>, p, plan);
}

template <bool kPerKey>
cudaError_t launch_for_keys(const GatedDeltaParams& p, int64_t rows, cudaStream_t stream) {
  if (p.keys <= 8 * kSlices) return launch<kPerKey, 8>(p, rows, stream);
  return p.keys <= 16 * kSlices ? launch<kPerKey, 16>(p, rows, stream) : launch<kPerKey, 32>(p, rows, stream);
}

}  // namespace

// One launch, and none for no trees. rows: of v; keys is at most 256. A tree that does not fit changes
// nothing. Returns a cudaError_t.
extern "C" int pyspec_gated_delta_cuda(const GatedDeltaParams& p, int64_t rows, cudaStream_t stream) {
  if (p.round.trees == 0) return cudaSuccess;
  return p.decays > p.heads ? launch_for_keys<true>(p, rows, stream)
                            : launch_for_keys<false>(p, rows, stream);
}
