// selective_state on the CPU. For a channel and one of its states, along the path to a node t,
//
//     s[t] = e^(dt[t] a) s[parent of t] + (dt[t] x[t]) b[t],    y[t] = sum over states of c[t] s[t] + d x[t]
//
// and out[t] = y[t] silu(z[t]). The path begins with the last round's accepted nodes, whose inputs were
// recorded; the state behind them is stored, and that is all the state's traffic: one read, one write,
// whatever the tree.
//
// An item is a tree and a few panels of 16 channels. It holds a block of states in registers, replays the
// accepted nodes, stores, and walks this round's nodes; where a node is not the child of the one before it,
// its parent's block comes from the thread's scratch. Every node takes the same steps in the same order
// whether it is replayed, verified or read as a prompt, so the row rule holds and a replay gives the bits of
// plain decoding. Bound by memory for few nodes, by multiply-adds for many.
#include "params/selective_state.h"

#include "cpu/recurrence.h"

namespace {

using pyspec::kStateLanes;
using pyspec::RoundTree;
using pyspec::SelectiveStateParams;

constexpr int kBlock = kVectorRegisters == 32 ? 16 : 4;  // states in registers
constexpr int kSums = 4;        // of a block's y, so that one addition need not wait for the one before
constexpr int64_t kAhead = 64;  // states that are asked for before they are needed: products take long enough
constexpr int64_t kPanelsPerItem = 4;  // where channels have their own dt

// The steps of an item are the accepted nodes, then this round's. kPerState: each channel has its own dt and
// each of its states its own a; otherwise a head of channels shares both.
template <bool kPerState>
struct Item {
  const SelectiveStateParams& p;
  RoundTree tree;
  int64_t steps, first_panel, panels, head, group;

  // in the thread's scratch
  float* dt;         // [steps], of the head
  float* decay;      // [steps], of the head
  float* input;      // [steps, 16]: dt x of a panel
  float* rate;       // [steps, 16]: dt log2(e) of a panel, only kPerState
  float* sum;        // [nodes, 16]: y of a panel
  float* b;          // [steps, state_size]
  float* c;          // [nodes, state_size]
  float* kept;       // [branches, kBlock, 16]: states of nodes that another than the next one continues
  int32_t* kept_at;  // [nodes]: place in kept, or -1

  Item(const SelectiveStateParams& params, const RoundTree& of, int64_t block)
      : p(params), tree(of), steps(tree.accepted + tree.nodes) {
    int64_t all = p.channels / kStateLanes;
    panels = kPerState ? kPanelsPerItem : all / p.heads;
    first_panel = block * panels, head = block;
    if (first_panel + panels > all) panels = all - first_panel;
    group = first_panel * p.groups / all;
    int64_t vectors = (steps + 15) / 16 * 16;
    float* next = scratch<0>(2 * vectors + (2 * steps + tree.nodes) * kStateLanes +
                             (steps + tree.nodes) * p.state_size + tree.nodes * (kBlock + 1) * kStateLanes);
    auto take = [&](int64_t floats) {
      float* piece = next;
      next += floats;
      return piece;
    };
    dt = take(vectors), decay = take(vectors);
    input = take(steps * kStateLanes), rate = take(steps * kStateLanes), sum = take(tree.nodes * kStateLanes);
    b = take(steps * p.state_size), c = take(tree.nodes * p.state_size);
    kept = take(tree.nodes * kBlock * kStateLanes);
    kept_at = reinterpret_cast<int32_t*>(take(tree.nodes * kStateLanes));
  }

  float* recorded(int64_t half, int64_t node) const {
    return p.record +
           ((half * p.sequences + tree.sequence) * p.record_nodes + node) * pyspec::record_width(p);
  }
  float* recorded_step(int64_t step) const {  // where a step was recorded, or will be; null where it is not
    if (step < tree.accepted) return recorded(tree.half, tree.path[step]);
    return tree.advance ? nullptr : recorded(1 - tree.half, step - tree.accepted);
  }
  int64_t row(int64_t step) const { return tree.first_row + step - tree.accepted; }

  void find_branches() const {
    int32_t branches = 0;
    for (int64_t node = 0; node < tree.nodes; ++node) kept_at[node] = -1;
    for (int64_t node = 1; node < tree.nodes; ++node) {
      int32_t parent = tree.parents[node];
      if (parent != node - 1 && kept_at[parent] < 0) kept_at[parent] = branches++;
    }
  }

  // b and c as fp32, recorded by the item with the first channels of all.
  void read_b_and_c() const {
    int64_t size = p.state_size, offset = p.channels + p.heads + group * size;
    for (int64_t step = 0; step < steps; ++step) {
      float* record = recorded_step(step);
      for (int64_t n = 0; n < size; n += kStateLanes) {
        if (step < tree.accepted) {
          store(b + step * size + n, load(record + offset + n));
          continue;
        }
        store(b + step * size + n, load_element(p.b, row(step) * p.b_stride + group * size + n, p.x_element));
        store(c + (step - tree.accepted) * size + n,
              load_element(p.c, row(step) * p.c_stride + group * size + n, p.x_element));
      }
      if (step < tree.accepted || !record || first_panel > 0) continue;
      for (int64_t n = 0; n < p.groups * size; n += kStateLanes)
        store(record + p.channels + p.heads + n, load_element(p.b, row(step) * p.b_stride + n, p.x_element));
    }
  }

  // dt and decay of the head, 16 steps at a time.
  void read_head() const {
    float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    for (int64_t first = 0; first < tree.nodes; first += 16) {
      float raw[16] = {};
      int64_t count = tree.nodes - first < 16 ? tree.nodes - first : 16;
      for (int64_t i = 0; i < count; ++i) raw[i] = p.dt[(tree.first_row + first + i) * p.dt_stride + head];
      store(raw, softplus(add(load(raw), set1(bias))));
      for (int64_t i = 0; i < count; ++i) dt[tree.accepted + first + i] = raw[i];
    }
    for (int64_t step = 0; step < steps; ++step) {
      float* record = recorded_step(step);
      if (step < tree.accepted) {
        dt[step] = record[p.channels + head];
      } else if (record) {
        record[p.channels + head] = dt[step];
      }
    }
    F16 factor = set1(p.a[head] * kLog2E);
    for (int64_t first = 0; first < steps; first += 16)
      store(decay + first, exp2(mul(load(dt + first), factor)));
  }

  void read_panel(int64_t panel) const {
    int64_t channel = panel * kStateLanes;
    for (int64_t step = 0; step < steps; ++step) {
      float* record = recorded_step(step);
      F16 x, factor;
      if (step < tree.accepted) {
        x = load(record + channel);
        factor = kPerState ? load(record + p.channels + channel) : set1(dt[step]);
      } else {
        x = load_element(p.x, row(step) * p.x_stride + channel, p.x_element);
        if constexpr (kPerState) {
          F16 bias = p.dt_bias ? load(p.dt_bias + channel) : set1(0.0f);
          factor = softplus(add(load(p.dt + row(step) * p.dt_stride + channel), bias));
        } else {
          factor = set1(dt[step]);
        }
        store(sum + (step - tree.accepted) * kStateLanes, set1(0.0f));
        if (record) {
          store(record + channel, x);
          if constexpr (kPerState) store(record + p.channels + channel, factor);
        }
      }
      store(input + step * kStateLanes, mul(factor, x));
      if constexpr (kPerState) store(rate + step * kStateLanes, mul(factor, set1(kLog2E)));
    }
  }

  PYSPEC_INLINE void take_step(F16 (&state)[kBlock], int64_t step, const float* a, int64_t n) const {
    F16 in = load(input + step * kStateLanes);
    const float* factors = b + step * p.state_size + n;
    if constexpr (kPerState) {
      F16 per_a = load(rate + step * kStateLanes);
      PYSPEC_UNROLL
      for (int k = 0; k < kBlock; ++k)
        state[k] = fma(in, set1(factors[k]), mul(state[k], exp2(mul(per_a, load(a + k * kStateLanes)))));
    } else {
      F16 shared = set1(decay[step]);
      PYSPEC_UNROLL
      for (int k = 0; k < kBlock; ++k) state[k] = fma(in, set1(factors[k]), mul(state[k], shared));
    }
  }

  // States n .. n + kBlock of a panel, through all steps.
  void walk(float* states, const float* a, int64_t n) const {
    F16 state[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      state[k] = load(states + k * kStateLanes);
      __builtin_prefetch(states + (kAhead + k) * kStateLanes, 1);
    }
    for (int64_t step = 0; step < tree.accepted; ++step) take_step(state, step, a, n);
    if (tree.accepted) {
      PYSPEC_UNROLL
      for (int k = 0; k < kBlock; ++k) store(states + k * kStateLanes, state[k]);
    }
    for (int64_t node = 0; node < tree.nodes; ++node) {
      if (tree.parents[node] != node - 1) {
        const float* from = kept + kept_at[tree.parents[node]] * kBlock * kStateLanes;
        PYSPEC_UNROLL
        for (int k = 0; k < kBlock; ++k) state[k] = load(from + k * kStateLanes);
      }
      take_step(state, tree.accepted + node, a, n);
      const float* factors = c + node * p.state_size + n;
      F16 y[kSums];
      PYSPEC_UNROLL
      for (int k = 0; k < kSums; ++k) y[k] = mul(state[k], set1(factors[k]));
      PYSPEC_UNROLL
      for (int k = kSums; k < kBlock; ++k) y[k % kSums] = fma(state[k], set1(factors[k]), y[k % kSums]);
      F16 total = add(add(y[0], y[1]), add(y[2], y[3]));
      store(sum + node * kStateLanes, add(load(sum + node * kStateLanes), total));
      if (kept_at[node] >= 0) {
        float* to = kept + kept_at[node] * kBlock * kStateLanes;
        PYSPEC_UNROLL
        for (int k = 0; k < kBlock; ++k) store(to + k * kStateLanes, state[k]);
      }
    }
    if (tree.advance) {
      PYSPEC_UNROLL
      for (int k = 0; k < kBlock; ++k) store(states + k * kStateLanes, state[k]);
    }
  }

  void write_panel(int64_t panel) const {
    int64_t channel = panel * kStateLanes;
    for (int64_t node = 0; node < tree.nodes; ++node) {
      int64_t at = tree.first_row + node;
      F16 y = load(sum + node * kStateLanes);
      if (p.d) y = fma(load(p.d + channel), load_element(p.x, at * p.x_stride + channel, p.x_element), y);
      if (p.z) y = mul(y, silu(load(p.z + at * p.z_stride + channel)));
      store_element(p.out, at * p.channels + channel, p.out_element, y);
    }
  }

  void run() const {
    find_branches();
    read_b_and_c();
    if constexpr (!kPerState) read_head();
    int64_t floats = p.state_size * kStateLanes;
    float* states = p.state + tree.sequence * p.channels * p.state_size;
    for (int64_t panel = first_panel; panel < first_panel + panels; ++panel) {
      read_panel(panel);
      for (int64_t n = 0; n < p.state_size; n += kBlock) {
        const float* a = kPerState ? p.a + panel * floats + n * kStateLanes : nullptr;
        walk(states + panel * floats + n * kStateLanes, a, n);
      }
      write_panel(panel);
    }
  }
};

template <bool kPerState>
void run(const SelectiveStateParams& p) {
  int64_t all = p.channels / kStateLanes;
  int64_t blocks = kPerState ? (all + kPanelsPerItem - 1) / kPanelsPerItem : p.heads;
  auto item = [&](int64_t index) {
    Item<kPerState>(p, pyspec::tree_of(p.round, index / blocks), index % blocks).run();
  };
  pyspec::parallel(p.parallel_for, p.round.trees * blocks, item);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_selective_state)(const SelectiveStateParams& p) {
  p.a_per_state ? run<true>(p) : run<false>(p);
}
