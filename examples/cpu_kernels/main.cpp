// Tree attention from the kernels folder alone: no torch, no Python.
//
// Three drafts behind a prefix of 100 keys: node 1 and node 2 are two guesses at one place, node 3 follows
// node 2. The kernel's output is compared with the formula.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>
#include <vector>

#include "params/tree_attention.h"

// The entry point of the instruction set that CMakeLists.txt compiles the kernels for.
extern "C" void PYSPEC_ENTRY(pyspec_tree_attention)(const pyspec::TreeAttentionParams&);

namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kNodes = 4, kPrefix = 100, kHeadDim = 64,
                  kSlots = kPrefix + kNodes;

// Kernels bring no threads; they ask for items to be run on the caller's.
void on_two_threads(int64_t items, pyspec::ParallelBody body, void* context) {
  auto every_second = [&](int64_t first) {
    for (int64_t item = first; item < items; item += 2) body(context, item);
  };
  std::thread other(every_second, 1);
  every_second(0);
  other.join();
}

std::vector<float> random_floats(size_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

}  // namespace

int main() {
  // Bit j of node i is set if j is i or an ancestor of i.
  const int32_t ancestor_bits[kNodes] = {0b0001, 0b0011, 0b0101, 0b1101};
  const int32_t prefix_lens[1] = {kPrefix};
  auto q = random_floats(kHeads * kNodes * kHeadDim, 1);
  auto k = random_floats(kKvHeads * kSlots * kHeadDim, 2), v = random_floats(kKvHeads * kSlots * kHeadDim, 3);
  std::vector<float> out(q.size()), lse(kHeads * kNodes);

  pyspec::TreeAttentionParams p{};
  p.q = q.data(), p.k = k.data(), p.v = v.data(), p.out = out.data(), p.lse = lse.data();
  p.ancestor_bits = ancestor_bits, p.prefix_lens = prefix_lens;
  p.batch = 1, p.heads = kHeads, p.kv_heads = kKvHeads, p.nodes = kNodes, p.head_dim = kHeadDim;
  p.words = 1;
  const int64_t rows[3] = {kHeads * kNodes * kHeadDim, kNodes * kHeadDim, kHeadDim};
  const int64_t keys[3] = {kKvHeads * kSlots * kHeadDim, kSlots * kHeadDim, kHeadDim};
  for (int i = 0; i < 3; ++i) {
    p.q_strides[i] = p.out_strides[i] = rows[i];
    p.k_strides[i] = p.v_strides[i] = keys[i];
  }
  p.page = kSlots, p.longest_prefix = kPrefix;
  p.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  p.element = pyspec::Element::kFloat32;
  p.parallel_for = on_two_threads;
  p.workspace = static_cast<float*>(std::aligned_alloc(64, (pyspec::workspace_floats(p) * 4 + 63) / 64 * 64));
  PYSPEC_ENTRY(pyspec_tree_attention)(p);
  std::free(p.workspace);

  float largest = 0.0f;
  for (int64_t head = 0; head < kHeads; ++head) {
    for (int64_t node = 0; node < kNodes; ++node) {
      std::vector<double> weights(kSlots, 0.0), expected(kHeadDim, 0.0);
      const float* row = &q[(head * kNodes + node) * kHeadDim];
      const int64_t first = head / (kHeads / kKvHeads) * kSlots * kHeadDim;
      double sum = 0.0;
      for (int64_t slot = 0; slot < kSlots; ++slot) {
        if (slot >= kPrefix && !(ancestor_bits[node] >> (slot - kPrefix) & 1)) continue;
        double score = 0.0;
        for (int64_t c = 0; c < kHeadDim; ++c) score += row[c] * k[first + slot * kHeadDim + c];
        sum += weights[slot] = std::exp(score * p.scale);
      }
      for (int64_t slot = 0; slot < kSlots; ++slot)
        for (int64_t c = 0; c < kHeadDim; ++c)
          expected[c] += weights[slot] / sum * v[first + slot * kHeadDim + c];
      for (int64_t c = 0; c < kHeadDim; ++c) {
        const float found = out[(head * kNodes + node) * kHeadDim + c];
        largest = std::max(largest, std::fabs(found - static_cast<float>(expected[c])));
      }
    }
  }
  std::printf("largest difference from the formula: %.1e\n", largest);
  return largest < 1e-5f ? 0 : 1;
}
