// What the steps of gated_delta read on the GPU, in shared memory: a tile of them at a time.
//
// All threads of a block fetch at once, and all of it is on its way before any of it is looked at. A warp
// has some of the steps: it brings their q and k to length 1, which takes a sum over all of its lanes, and
// records what is new.
#pragma once

#include "cuda/recurrence.h"
#include "cuda/tensor_core.h"
#include "params/gated_delta.h"

extern __shared__ uint4 dynamic_shared[];

namespace pyspec {
namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kWarp = 32, kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kLanes = 16;                // values of a block
constexpr int kValues = kLanes / kWarps;  // of a warp
constexpr int kSlices = kWarp / kValues;  // of the keys

// What the host decides.
struct DeltaPlan {
  int64_t rows;
  int panels;          // of a head
  int tile;            // steps
  int kept;            // nodes that there is shared memory for, at least one
  float inverse_root;  // 1 / sqrt(keys)
};

// Of a block, in shared memory.
struct DeltaTile {
  float* k;       // [tile + kWarps, kKeys], of length 1; a warp's last is of a node that it walks again
  float* q;       // [tile, kKeys], of length 1 / sqrt(keys)
  float* states;  // [plan.kept, kPanel]; of the first, also on their way from and to memory
  float* d;       // [tile + kWarps, kDecays]
  float* value;   // [tile, 16]: v of a new node until its u is known, then u
  float* qk;      // [tile]: q k
  float* beta;    // [tile]
  int* parent;    // [tile], of a new node
  int* last;      // [tile]: the last child of a new node, or -1
};

// The steps of a block are the accepted nodes, then this round's; heads have up to 8 * kStates keys.
template <bool kPerKey, int kStates>
struct DeltaSteps {
  static constexpr int kKeys = kSlices * kStates;  // those that are not there are zeros
  static constexpr int kDecays = kPerKey ? kKeys : 1;
  static constexpr int kLoads = kKeys / kWarp, kDecayLoads = kPerKey ? kLoads : 1;  // of a lane, for a step
  static constexpr int kMostTile = kStates > 16 ? 4 : kPerKey ? 8 : 16;             // steps
  static constexpr int kTurns = kMostTile / kWarps;            // in which a warp fetches them
  static constexpr int kPanel = kKeys / 4 * (4 * kLanes + 4);  // floats of a state in shared memory
  static constexpr int kAgain = kKeys + kDecays;               // and of a step that is taken again
  static constexpr int kStep = kAgain + kKeys + kLanes + 4;    // and of one of the tile

  const GatedDeltaParams& p;
  const DeltaPlan& plan;
  RoundTree tree;
  int steps, accepted, channel, head, key_head;  // channel: the block's first
  int keys, decays;                              // of the head
  int warp, lane, value, slice;                  // value: this thread's of the panel; slice: of the keys
  bool first_of_head, first_of_key_head;
  int begin;  // the first step of the tile
  DeltaTile tile;
  float rate;            // A log2(e)
  float state[kStates];  // of keys 32 j + 4 slice + 0..3

  __device__ DeltaSteps(const GatedDeltaParams& params, const DeltaPlan& of, const RoundTree& at, int panel)
      : p(params), plan(of), tree(at), accepted(static_cast<int>(at.accepted)) {
    steps = accepted + static_cast<int>(tree.nodes);
    channel = panel * kLanes, head = panel / plan.panels, keys = static_cast<int>(p.keys);
    key_head = key_head_of(p, head);
    first_of_head = panel % plan.panels == 0;
    first_of_key_head = first_of_head && is_first_of_key_head(p, head);
    warp = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
    value = warp * kValues + lane % kValues, slice = lane / kValues;
    tile.k = reinterpret_cast<float*>(dynamic_shared), tile.q = tile.k + (plan.tile + kWarps) * kKeys;
    tile.states = tile.q + plan.tile * kKeys, tile.d = tile.states + plan.kept * kPanel;
    tile.value = tile.d + (plan.tile + kWarps) * kDecays, tile.qk = tile.value + plan.tile * kLanes;
    tile.beta = tile.qk + plan.tile;
    tile.parent = reinterpret_cast<int*>(tile.beta + plan.tile), tile.last = tile.parent + plan.tile;
    decays = kPerKey ? keys : 1;
    rate = __fmul_rn(p.a[head], kLog2E);
  }

  // ==== where things are ====

  __device__ float* recorded(int64_t half, int64_t node) const {
    return p.record + ((half * p.sequences + tree.sequence) * p.record_nodes + node) * record_width(p);
  }
  __device__ int64_t u_offset() const { return p.key_heads * keys + channel; }
  __device__ int64_t d_offset() const { return p.key_heads * keys + p.channels + int64_t{head} * decays; }
  __device__ int64_t row(int node) const { return tree.first_row + node; }
  __device__ int64_t q_at(int node) const { return row(node) * p.q_stride + int64_t{key_head} * keys; }
  __device__ int64_t k_at(int node) const { return row(node) * p.k_stride + int64_t{key_head} * keys; }
  __device__ const float* decay_at(int node) const {
    return p.decay + row(node) * p.decay_stride + int64_t{head} * decays;
  }
  __device__ float* own_panel() const { return p.state + (tree.sequence * p.channels + channel) * keys; }
  // Of a panel in shared memory, so that no two lanes of a warp want the same bank.
  static __device__ int place(int key, int of) { return key * kLanes + key / 4 * 4 + of; }

  // ==== what a step reads ====

  // All lanes of a warp ask: a lane's keys are lane, lane + 32, ...
  static __device__ float sum_of_warp(float sum) {
#pragma unroll
    for (int with = kWarp / 2; with > 0; with /= 2) sum += __shfl_xor_sync(kAll, sum, with);
    return sum;
  }
  __device__ float dot(const uint32_t (&a)[kLoads], const uint32_t (&b)[kLoads]) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      sum = __fmaf_rn(to_float(a[i], p.element), to_float(b[i], p.element), sum);
    return sum_of_warp(sum);
  }
  __device__ float inverse_length(const uint32_t (&x)[kLoads]) const {
    return 1.0f / sqrtf(__fadd_rn(dot(x, x), kDeltaEpsilon));
  }
  __device__ float decay_of(float raw, float bias) const {
    return exp2f(__fmul_rn(softplus(__fadd_rn(raw, bias)), rate));
  }
  __device__ float bias_of(int key) const {
    return p.dt_bias && key < decays ? p.dt_bias[int64_t{head} * decays + key] : 0.0f;
  }
  // As they lie in memory, zero where there are none; what they mean is computed when all is on its way.
  __device__ void load_keys(const void* from, int64_t at, Element element, uint32_t (&to)[kLoads]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int key = lane + i * kWarp;
      to[i] = key < keys ? load_bits(from, at + key, element) : 0;
    }
  }

  struct Fetched {
    uint32_t k[kLoads], q[kLoads], value;
    float d[kDecayLoads], beta;
  };

  __device__ void start(int step, Fetched& of) const {
    int node = step - accepted;
    const float* record = node < 0 ? recorded(tree.half, tree.path[step]) : nullptr;
    const float* d = record ? record + d_offset() : decay_at(node);
#pragma unroll
    for (int i = 0; i < kDecayLoads; ++i) {
      int key = lane + i * kWarp;
      of.d[i] = !kPerKey ? *d : key < keys ? d[key] : 0.0f;
    }
    if (record) {
      load_keys(record, int64_t{key_head} * keys, Element::kFloat32, of.k);
      of.value = load_bits(record, u_offset() + lane % kLanes, Element::kFloat32);
    } else {
      load_keys(p.k, k_at(node), p.element, of.k), load_keys(p.q, q_at(node), p.element, of.q);
      of.value = load_bits(p.v, row(node) * p.v_stride + channel + lane % kLanes, p.element);
      of.beta = p.beta[row(node) * p.beta_stride + head];
    }
  }
  // Of a new node, k, d and what is recorded of them by the first block that has them.
  __device__ void finish_new(int node, const Fetched& of, float k_scale, int at, bool records) const {
    float* record = records ? recorded(1 - tree.half, node) : nullptr;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      int key = lane + i * kWarp;
      float k = __fmul_rn(to_float(of.k[i], p.element), k_scale);
      tile.k[at * kKeys + key] = k;
      if (records && first_of_key_head && key < keys) record[int64_t{key_head} * keys + key] = k;
    }
#pragma unroll
    for (int i = 0; i < kDecayLoads; ++i) {
      int key = lane + i * kWarp;
      float d = decay_of(of.d[i], bias_of(key));
      if (key < kDecays) tile.d[at * kDecays + key] = d;
      if (records && first_of_head && key < decays) record[d_offset() + key] = d;
    }
  }
  __device__ void finish(int step, const Fetched& of) const {
    int at = step - begin, node = step - accepted;
    bool is_new = node >= 0;
    if (is_new) {
      float k_scale = inverse_length(of.k), q_scale = inverse_length(of.q) * plan.inverse_root;
      float qk = dot(of.q, of.k) * k_scale * q_scale;
      if (lane == 0) tile.qk[at] = qk, tile.beta[at] = p.strength / (1.0f + expf(-of.beta));
#pragma unroll
      for (int i = 0; i < kLoads; ++i)
        tile.q[at * kKeys + lane + i * kWarp] = to_float(of.q[i], p.element) * q_scale;
      finish_new(node, of, k_scale, at, !tree.advance);
    } else {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) tile.k[at * kKeys + lane + i * kWarp] = __uint_as_float(of.k[i]);
#pragma unroll
      for (int i = 0; i < kDecayLoads; ++i)
        if (lane + i * kWarp < kDecays) tile.d[at * kDecays + lane + i * kWarp] = of.d[i];
    }
    Element element = is_new ? p.element : Element::kFloat32;
    if (lane < kLanes) tile.value[at * kLanes + lane] = to_float(of.value, element);
  }

  // To shared memory, without a register for what is on its way.
  __device__ void bring_state() const {
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      int n = static_cast<int>(threadIdx.x) + i * kThreads;
      float* to = tile.states + place(n / kLanes, n % kLanes);
      if (n < keys * kLanes) {
        copy_later<4>(to, own_panel() + n);
      } else {
        *to = 0.0f;
      }
    }
    close_copies();
  }

  // Fills the tile, and records what is new. The first also brings the state. False where
  // the tree does not fit, before anything is written.
  __device__ bool fetch(int count) {
    int n = static_cast<int>(threadIdx.x);
    if (begin == 0) bring_state();
    Fetched fetched[kTurns];
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      int at = warp + i * kWarps;
      if (at >= count) break;
      start(begin + at, fetched[i]);
    }
    if (n < plan.tile) tile.last[n] = -1;
    if (begin == 0 && !parents_fit(tree)) return false;
    if (begin) __syncthreads();
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      int at = warp + i * kWarps;
      if (at >= count) break;
      finish(begin + at, fetched[i]);
    }
    for (int node = n; node < tree.nodes && !tree.advance; node += kThreads) {
      int parent = tree.parents[node], at = node + accepted - begin;
      if (at >= 0 && at < count) tile.parent[at] = parent;
      at = parent + accepted - begin;
      if (parent >= 0 && at >= 0 && at < count) atomicMax(&tile.last[at], node);
    }
    await_copies(0);
    __syncthreads();
    return true;
  }
};

}  // namespace
}  // namespace pyspec
