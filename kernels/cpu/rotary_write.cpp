// rotary_write on the CPU: each row of a projection is read once and leaves as rotated queries and as the
// cache's new keys and values. Rotation is in fp32, before the one rounding to the cache's dtype. A row is
// one item.
#include "params/rotary_write.h"

#include "cpu/simd.h"

namespace {

using pyspec::RotaryWriteParams;

constexpr int64_t kMaxHeadDim = 256;

template <class Storage>
PYSPEC_INLINE void store_head(const float* head, Storage* out, int64_t head_dim) {
  for (int64_t i = 0; i < head_dim; i += 16) store_as(out + i, load(head + i));
}

PYSPEC_INLINE void rotate(const float* head, const float* cos_sin, float* out, int64_t half) {
  const float *cosines = cos_sin, *sines = cos_sin + half;
  for (int64_t i = 0; i < half; ++i) {
    out[i] = head[i] * cosines[i] - head[half + i] * sines[i];
    out[half + i] = head[half + i] * cosines[i] + head[i] * sines[i];
  }
}

template <class Storage>
void write_row(const RotaryWriteParams& p, int64_t row) {
  int64_t d = p.head_dim;
  const float* head = p.qkv + row * (p.heads + 2 * p.kv_heads) * d;
  const float* cos_sin = p.cos_sin + p.positions[row] * d;
  float rotated[kMaxHeadDim];
  Storage* q = static_cast<Storage*>(p.q) + row * p.heads * d;
  for (int64_t h = 0; h < p.heads; ++h, head += d, q += d) {
    rotate(head, cos_sin, rotated, d / 2);
    store_head(rotated, q, d);
  }
  Storage* k = static_cast<Storage*>(p.k) + p.sequences[row] * p.k_strides[0] + p.slots[row] * p.k_strides[2];
  for (int64_t h = 0; h < p.kv_heads; ++h, head += d, k += p.k_strides[1]) {
    rotate(head, cos_sin, rotated, d / 2);
    store_head(rotated, k, d);
  }
  Storage* v = static_cast<Storage*>(p.v) + p.sequences[row] * p.v_strides[0] + p.slots[row] * p.v_strides[2];
  for (int64_t h = 0; h < p.kv_heads; ++h, head += d, v += p.v_strides[1]) store_head(head, v, d);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_rotary_write)(const RotaryWriteParams& p) {
  auto row = [&](int64_t index) {
    if (p.element == pyspec::Element::kFloat32) write_row<float>(p, index);
    if (p.element == pyspec::Element::kFloat16) write_row<Float16>(p, index);
    if (p.element == pyspec::Element::kBFloat16) write_row<BFloat16>(p, index);
  };
  pyspec::parallel(p.parallel_for, p.rows, row);
}
