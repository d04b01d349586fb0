// rotary_write on the CPU: each row of a projection is read once and leaves as rotated queries and as the
// cache's new keys and values. Norms and rotation are in fp32, before the one rounding to the cache's dtype.
// A row is one item.
#include "params/rotary_write.h"

#include "cpu/simd.h"

namespace {

using pyspec::RotaryWriteParams;

constexpr int64_t kMaxHeadDim = 512;

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

// What `count` values are divided by their root mean square with.
float scale_of(const float* x, int64_t count, float epsilon) {
  F16 squares = set1(0.0f);
  for (int64_t i = 0; i < count; i += 16) squares = fma(load(x + i), load(x + i), squares);
  float lanes[16], total = 0;
  store(lanes, squares);
  for (float lane : lanes) total += lane;
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(count) + epsilon);
}

// `count` heads, of queries or of keys, normalised with weights from `norm` on where there are any, turned,
// and multiplied by factor.
template <class Storage>
void turn(const RotaryWriteParams& p, const float* head, int64_t count, const float* norm,
          const float* cos_sin, float factor, Storage* out, int64_t stride) {
  int64_t d = p.head_dim;
  bool is_whole = p.norm_rows != 2;
  float scale = norm && is_whole ? scale_of(head, count * d, p.epsilon) : 0.0f;
  float normed[kMaxHeadDim], rotated[kMaxHeadDim];
  for (int64_t h = 0; h < count; ++h, head += d, out += stride) {
    const float* source = head;
    if (norm) {
      if (!is_whole) scale = scale_of(head, d, p.epsilon);
      const float* weight = norm + (is_whole ? h * d : 0);
      for (int64_t i = 0; i < d; ++i) normed[i] = head[i] * scale * weight[i];
      source = normed;
    }
    rotate(source, cos_sin, rotated, p.width / 2);
    for (int64_t i = p.width; i < d; ++i) rotated[i] = source[i];
    for (int64_t i = 0; i < d; ++i) rotated[i] *= factor;
    store_head(rotated, out, d);
  }
}

template <class Storage>
void write_row(const RotaryWriteParams& p, int64_t row) {
  int64_t d = p.head_dim;
  const float* head = p.qkv + row * p.qkv_stride;
  const float* cos_sin = p.cos_sin + p.positions[row] * p.width;
  float factor = p.query_scales ? p.query_scales[p.positions[row]] : 1.0f;
  turn(p, head, p.heads, p.norm, cos_sin, factor, static_cast<Storage*>(p.q) + row * p.heads * d, d);
  if (!p.kv_heads) return;
  head += p.heads * d;
  Storage* k = static_cast<Storage*>(p.k) + p.sequences[row] * p.k_strides[0] + p.slots[row] * p.k_strides[2];
  const float* k_norm = p.norm ? p.norm + (p.norm_rows == 2 ? 1 : p.heads) * d : nullptr;
  turn(p, head, p.kv_heads, k_norm, cos_sin, 1.0f, k, p.k_strides[1]);
  head += p.kv_heads * d;
  Storage* v = static_cast<Storage*>(p.v) + p.sequences[row] * p.v_strides[0] + p.slots[row] * p.v_strides[2];
  for (int64_t h = 0; h < p.kv_heads; ++h, head += d, v += p.v_strides[1]) {
    if (!p.norms_values) {
      store_head(head, v, d);
      continue;
    }
    F16 scale = set1(scale_of(head, d, p.epsilon));
    for (int64_t i = 0; i < d; i += 16) store_as(v + i, mul(load(head + i), scale));
  }
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
