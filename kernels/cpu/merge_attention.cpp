// merge_attention on the CPU: a weighted mean of two rows. Bound by memory; the weights are two exps a row.
// A side whose weight is 0 is left out rather than multiplied: it may hold NaN.
#include "params/merge_attention.h"

#include "cpu/simd.h"

namespace {

template <class Storage>
void merge(const pyspec::MergeAttentionParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    float a = p.lse_a[row], b = p.lse_b[row], largest = a > b || a != a ? a : b;
    float safe = largest == -kInfinity ? 0.0f : largest;
    float weight_a = __builtin_expf(a - safe), weight_b = __builtin_expf(b - safe),
          total = weight_a + weight_b;
    float share_a = total == 0.0f ? 0.0f : weight_a / total,
          share_b = total == 0.0f ? 0.0f : weight_b / total;
    const Storage* from_a = static_cast<const Storage*>(p.out_a) + row * p.head_dim;
    const Storage* from_b = static_cast<const Storage*>(p.out_b) + row * p.head_dim;
    Storage* to = static_cast<Storage*>(p.out) + row * p.head_dim;
    for (int64_t i = 0; i < p.head_dim; ++i) {
      float part_a = share_a == 0.0f ? 0.0f : to_float(from_a[i]) * share_a;
      float part_b = share_b == 0.0f ? 0.0f : to_float(from_b[i]) * share_b;
      from_float(part_a + part_b, to + i);
    }
    p.lse[row] = total == 0.0f ? -kInfinity : safe + __builtin_logf(total);
  }
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_merge_attention)(const pyspec::MergeAttentionParams& p) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return merge<float>(p);
    case pyspec::Element::kFloat16:
      return merge<Float16>(p);
    case pyspec::Element::kBFloat16:
      return merge<BFloat16>(p);
  }
}
