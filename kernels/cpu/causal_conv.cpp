// causal_conv on the CPU: out[t] = silu(bias + sum over taps of weight[tap] * x[the node so far above t]), or
// without silu.
//
// Above the root lies the window, which first takes in what was accepted of the last round. An item is a tree
// and a piece of its channels: it copies the window, so that it can be shifted in place, and walks the nodes.
// A sum always runs from the oldest input to the newest, wherever they lie, so the row rule holds.
#include "params/causal_conv.h"

#include "cpu/simd.h"

namespace {

using pyspec::CausalConvParams;
using pyspec::kConvLanes;
using pyspec::kMostConvTaps;
using pyspec::RoundTree;

constexpr int64_t kPiece = 256;

struct Item {
  const CausalConvParams& p;
  RoundTree tree;
  int64_t first, size;  // channels
  float before[kMostConvTaps - 1][kPiece];

  Item(const CausalConvParams& params, const RoundTree& of, int64_t channel)
      : p(params),
        tree(of),
        first(channel),
        size(p.channels - channel < kPiece ? p.channels - channel : kPiece) {}

  float* recorded(int64_t half, int64_t node) const {
    return p.record + ((half * p.sequences + tree.sequence) * p.record_nodes + node) * p.channels + first;
  }
  float* window(int64_t place) const {
    return p.window + (tree.sequence * (p.taps - 1) + place) * p.channels + first;
  }
  const float* row(int64_t node) const { return p.x + (tree.first_row + node) * p.x_stride + first; }

  void copy(float* to, const float* from) const { std::memcpy(to, from, size * sizeof(float)); }

  // The inputs before the root, after the last round's path.
  void replay() {
    for (int64_t place = 0; place < p.taps - 1; ++place) {
      int64_t behind = place + tree.accepted - (p.taps - 1);
      copy(before[place],
           behind < 0 ? window(place + tree.accepted) : recorded(tree.half, tree.path[behind]));
    }
    if (!tree.accepted) return;
    for (int64_t place = 0; place < p.taps - 1; ++place) copy(window(place), before[place]);
  }

  template <class Out, bool kIsLinear>
  void node(int64_t index) const {
    const float* taps[kMostConvTaps];
    int64_t ancestor = index, place = p.taps - 1;
    for (int64_t tap = p.taps - 1; tap >= 0; --tap) {
      taps[tap] = ancestor >= 0 ? row(ancestor) : before[--place];
      if (ancestor >= 0) ancestor = tree.parents[ancestor];
    }
    Out* out = static_cast<Out*>(p.out) + (tree.first_row + index) * p.channels + first;
    for (int64_t i = 0; i < size; i += kConvLanes) {
      F16 sum = p.bias ? load(p.bias + first + i) : set1(0.0f);
      for (int64_t tap = 0; tap < p.taps; ++tap)
        sum = fma(load(taps[tap] + i), load(p.weight + tap * p.channels + first + i), sum);
      store_as(out + i, kIsLinear ? sum : silu(sum));
    }
  }

  template <class Out>
  void run() {
    replay();
    for (int64_t index = 0; index < tree.nodes; ++index) {
      p.is_linear ? node<Out, true>(index) : node<Out, false>(index);
      if (!tree.advance) copy(recorded(1 - tree.half, index), row(index));
    }
    if (!tree.advance) return;
    for (int64_t place = 0; place < p.taps - 1; ++place) {
      int64_t behind = place + tree.nodes - (p.taps - 1);
      copy(window(place), behind < 0 ? before[place + tree.nodes] : row(behind));
    }
  }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_causal_conv)(const CausalConvParams& p) {
  int64_t pieces = (p.channels + kPiece - 1) / kPiece;
  auto run = [&](int64_t index) {
    Item item(p, pyspec::tree_of(p.round, index / pieces), index % pieces * kPiece);
    with_element(p.out_element, [&](auto element) { item.run<decltype(element)>(); });
  };
  pyspec::parallel(p.parallel_for, p.round.trees * pieces, run);
}
