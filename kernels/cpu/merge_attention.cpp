// merge_attention on the CPU: a weighted mean of two rows. Bound by memory; the weights are two exps a row.
// A side whose weight is 0 is left out rather than multiplied: it may hold NaN.
#include "params/merge_attention.h"

#include "cpu/simd.h"

namespace {

// Rows that a thread takes at a time.
constexpr int64_t kRows = 64;

template <class Storage>
void merge_row(const pyspec::MergeAttentionParams& p, int64_t row) {
  int64_t place = row, part = 0;  // of its lse, and of its b
  if (p.heads) {
    const int64_t node = row / p.heads;
    place = row % p.heads * (p.rows / p.heads) + node, part = p.parts[node] * p.part_bytes;
  }
  const auto* lse_b = reinterpret_cast<const float*>(reinterpret_cast<const char*>(p.lse_b) + part);
  float a = p.lse_a[place], b = lse_b[place], largest = a > b || a != a ? a : b;
  float safe = largest == -kInfinity ? 0.0f : largest;
  float weight_a = __builtin_expf(a - safe), weight_b = __builtin_expf(b - safe), total = weight_a + weight_b;
  float share_a = total == 0.0f ? 0.0f : weight_a / total, share_b = total == 0.0f ? 0.0f : weight_b / total;
  const Storage* from_a = static_cast<const Storage*>(p.out_a) + row * p.head_dim;
  const auto* out_b = reinterpret_cast<const Storage*>(static_cast<const char*>(p.out_b) + part);
  const Storage* from_b = out_b + row * p.head_dim;
  Storage* to = static_cast<Storage*>(p.out) + row * p.head_dim;
  for (int64_t i = 0; i < p.head_dim; ++i) {
    float part_a = share_a == 0.0f ? 0.0f : to_float(from_a[i]) * share_a;
    float part_b = share_b == 0.0f ? 0.0f : to_float(from_b[i]) * share_b;
    from_float(part_a + part_b, to + i);
  }
  p.lse[place] = total == 0.0f ? -kInfinity : safe + __builtin_logf(total);
}

template <class Storage>
void merge(const pyspec::MergeAttentionParams& p) {
  auto rows = [&](int64_t item) {
    const int64_t end = (item + 1) * kRows < p.rows ? (item + 1) * kRows : p.rows;
    for (int64_t row = item * kRows; row < end; ++row) merge_row<Storage>(p, row);
  };
  pyspec::parallel(p.parallel_for, (p.rows + kRows - 1) / kRows, rows);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_merge_attention)(const pyspec::MergeAttentionParams& p) {
  with_element(p.element, [&](auto element) { merge<decltype(element)>(p); });
}
