// gated_delta on the CPU. A head's state is a matrix of keys by values. Along the path to a node t,
//
//     u = beta (v - sum of (d k) s),    s[t] = d s[parent of t] + k u,    y[t] = sum of q s[t] / sqrt(keys)
//
// over the keys. The path begins with the last round's accepted nodes, whose k, u and d were recorded; the
// state behind them is stored, and that is all the state's traffic: one read, one write, whatever the tree.
//
// An item is a tree and a head. A panel of 16 values, a few kilobytes, stays in the first cache while it is
// replayed and all nodes walk from it: a node asks its parent's state for the answers to d k and to d q in
// one pass, and q s[t] is the latter plus (q k) u. So a node without children never makes its state, and a
// step of plain decoding is two passes, replay and answers. Nodes are walked depth first, with one state for
// each depth that has children. Every state is made by one multiply and one multiply-add of an element,
// whether it is replayed, verified or read as a prompt, so the row rule holds and a replay gives the bits of
// plain decoding. Bound by memory for few nodes, by multiply-adds for many.
#include "params/gated_delta.h"

#include <cmath>

#include "cpu/recurrence.h"

namespace {

using pyspec::GatedDeltaParams;
using pyspec::kDeltaLanes;
using pyspec::RoundTree;

constexpr int kSums =
    kVectorRegisters == 32 ? 4 : 2;  // of an answer: one addition need not wait for the last

// kPerKey: each key of a head has its own decay; otherwise they share one.
template <bool kPerKey>
struct Item {
  const GatedDeltaParams& p;
  RoundTree tree;
  int64_t head, key_head, keys, decays;  // decays: of the head
  int64_t panel_size;                    // floats

  // in the thread's scratch
  float* k;                          // [nodes, keys], of length 1
  float* d;                          // [nodes, decays]
  float* dk;                         // [nodes, keys]
  float* dq;                         // [nodes, keys], q of length 1 / sqrt(keys)
  float* qk;                         // [nodes]
  float* beta;                       // [nodes]
  int32_t *depth, *child, *sibling;  // [nodes]: the first child and the next sibling of a node, or -1
  float* reached;                    // [depths, panel_size]: states of the path to a node

  Item(const GatedDeltaParams& params, const RoundTree& of, int64_t index)
      : p(params), tree(of), head(index), keys(params.keys) {
    key_head = pyspec::key_head_of(p, head), decays = kPerKey ? keys : 1, panel_size = keys * kDeltaLanes;
    int64_t nodes = tree.nodes;
    float* next = scratch<0>(nodes * (3 * keys + decays + 5));
    auto take = [&](int64_t floats) {
      float* piece = next;
      next += floats;
      return piece;
    };
    k = take(nodes * keys), dk = take(nodes * keys), dq = take(nodes * keys), d = take(nodes * decays);
    qk = take(nodes), beta = take(nodes);
    depth = reinterpret_cast<int32_t*>(take(nodes));
    child = reinterpret_cast<int32_t*>(take(nodes)), sibling = reinterpret_cast<int32_t*>(take(nodes));
    int32_t depths = find_children();
    reached = tree.advance ? nullptr : scratch<1>(depths * panel_size);
  }

  int32_t find_children() const {
    int32_t depths = 0;
    for (int64_t node = 0; node < tree.nodes; ++node) {
      child[node] = sibling[node] = -1;
      depth[node] = node ? depth[tree.parents[node]] + 1 : 0;
      if (depth[node] >= depths) depths = depth[node] + 1;
    }
    for (int64_t node = tree.nodes - 1; node > 0; --node) {
      int32_t& first = child[tree.parents[node]];
      sibling[node] = first, first = static_cast<int32_t>(node);
    }
    return depths;
  }

  int64_t u_offset() const { return p.key_heads * keys; }  // in a record
  int64_t d_offset() const { return u_offset() + p.channels; }
  float* recorded(int64_t half, int64_t node) const {
    return p.record +
           ((half * p.sequences + tree.sequence) * p.record_nodes + node) * pyspec::record_width(p);
  }
  float* record_of(int64_t node) const { return tree.advance ? nullptr : recorded(1 - tree.half, node); }

  // One over the length of a vector.
  float inverse_length(const void* x, int64_t at) const {
    F16 squares = set1(0.0f);
    for (int64_t i = 0; i < keys; i += kDeltaLanes) {
      F16 part = load_element(x, at + i, p.element);
      squares = fma(part, part, squares);
    }
    return 1.0f / std::sqrt(sum(squares) + pyspec::kDeltaEpsilon);
  }

  // A decay of each lane, the same of all where the head has one.
  F16 decay_at(int64_t row, int64_t i) const {
    int64_t at = head * decays + i;
    const float* raw = p.decay + row * p.decay_stride + at;
    F16 x = kPerKey ? load(raw) : set1(*raw);
    if (p.dt_bias) x = add(x, kPerKey ? load(p.dt_bias + at) : set1(p.dt_bias[at]));
    return exp2(mul(softplus(x), set1(p.a[head] * kLog2E)));
  }

  // What all panels share of a node, recorded by the first item that has it.
  void read(int64_t node) const {
    int64_t row = tree.first_row + node, at_q = row * p.q_stride + key_head * keys;
    int64_t at_k = row * p.k_stride + key_head * keys;
    F16 k_scale = set1(inverse_length(p.k, at_k)), dots = set1(0.0f);
    F16 q_scale = set1(inverse_length(p.q, at_q) / std::sqrt(static_cast<float>(keys)));
    F16 factor = decay_at(row, 0);
    float lanes[kDeltaLanes];
    float* record = record_of(node);
    for (int64_t i = 0; i < keys; i += kDeltaLanes) {
      if (kPerKey && i) factor = decay_at(row, i);
      F16 k_here = mul(load_element(p.k, at_k + i, p.element), k_scale);
      F16 q_here = mul(load_element(p.q, at_q + i, p.element), q_scale);
      dots = fma(q_here, k_here, dots);
      store(k + node * keys + i, k_here);
      store(dk + node * keys + i, mul(factor, k_here)), store(dq + node * keys + i, mul(factor, q_here));
      if constexpr (kPerKey) store(d + node * keys + i, factor);
      if (!record) continue;
      if (pyspec::is_first_of_key_head(p, head)) store(record + key_head * keys + i, k_here);
      if constexpr (kPerKey) store(record + d_offset() + head * keys + i, factor);
    }
    if constexpr (!kPerKey) {
      store(lanes, factor);
      d[node] = lanes[0];
      if (record) record[d_offset() + head] = lanes[0];
    }
    store(lanes, sigmoid_product(set1(p.strength), set1(p.beta[row * p.beta_stride + head])));
    qk[node] = sum(dots), beta[node] = lanes[0];
  }

  // One state from another.
  PYSPEC_INLINE void move(const float* from, float* to, const float* k, const float* d, F16 u) const {
    for (int64_t i = 0; i < keys; i += kSums) {
      PYSPEC_UNROLL
      for (int j = 0; j < kSums; ++j) {
        F16 kept = mul(load(from + (i + j) * kDeltaLanes), set1(d[kPerKey ? i + j : 0]));
        store(to + (i + j) * kDeltaLanes, fma(set1(k[i + j]), u, kept));
      }
    }
  }

  // Writes a node's y and returns its u, from its parent's state.
  PYSPEC_INLINE F16 ask(const float* from, int64_t node, int64_t channel) const {
    const float *to_k = dk + node * keys, *to_q = dq + node * keys;
    F16 answer[kSums], y[kSums];
    for (int j = 0; j < kSums; ++j) answer[j] = y[j] = set1(0.0f);
    for (int64_t i = 0; i < keys; i += kSums) {
      PYSPEC_UNROLL
      for (int j = 0; j < kSums; ++j) {
        F16 here = load(from + (i + j) * kDeltaLanes);
        answer[j] = fma(here, set1(to_k[i + j]), answer[j]);
        y[j] = fma(here, set1(to_q[i + j]), y[j]);
      }
    }
    for (int half = kSums / 2; half > 0; half /= 2) {
      for (int j = 0; j < half; ++j)
        answer[j] = add(answer[j], answer[j + half]), y[j] = add(y[j], y[j + half]);
    }
    int64_t row = tree.first_row + node;
    F16 v = load_element(p.v, row * p.v_stride + channel, p.element);
    F16 u = mul(set1(beta[node]), sub(v, answer[0]));
    store_element(p.out, row * p.channels + channel, p.out_element, fma(set1(qk[node]), u, y[0]));
    if (float* record = record_of(node)) store(record + u_offset() + channel, u);
    return u;
  }

  void walk(float* panel, int64_t channel) const {
    for (int64_t step = 0; step < tree.accepted; ++step) {
      const float* record = recorded(tree.half, tree.path[step]);
      move(panel, panel, record + key_head * keys, record + d_offset() + head * decays,
           load(record + u_offset() + channel));
    }
    for (int64_t node = 0; node < tree.nodes;) {
      const float* from = tree.advance || !depth[node] ? panel : reached + (depth[node] - 1) * panel_size;
      F16 u = ask(from, node, channel);
      if (tree.advance) {
        move(from, panel, k + node * keys, d + node * decays, u);
        ++node;
        continue;
      }
      if (child[node] >= 0) {
        move(from, reached + depth[node] * panel_size, k + node * keys, d + node * decays, u);
        node = child[node];
        continue;
      }
      while (node >= 0 && sibling[node] < 0) node = tree.parents[node];
      if (node < 0) break;
      node = sibling[node];
    }
  }

  void run() const {
    for (int64_t node = 0; node < tree.nodes; ++node) read(node);
    int64_t head_dim = p.channels / p.heads;
    float* state = p.state + tree.sequence * p.channels * keys;
    for (int64_t channel = head * head_dim; channel < (head + 1) * head_dim; channel += kDeltaLanes)
      walk(state + channel * keys, channel);
  }
};

template <bool kPerKey>
void run(const GatedDeltaParams& p) {
  auto item = [&](int64_t index) {
    Item<kPerKey>(p, pyspec::tree_of(p.round, index / p.heads), index % p.heads).run();
  };
  pyspec::parallel(p.parallel_for, p.round.trees * p.heads, item);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_gated_delta)(const GatedDeltaParams& p) {
  p.decays > p.heads ? run<true>(p) : run<false>(p);
}
