// rms_norm on the CPU: hidden = (hidden + delta) * hidden_scale; out = hidden / sqrt(mean(hidden^2) +
// epsilon) * weight.
//
// A row is read twice, from the first cache the second time, or a third time where its mean is taken off, and
// is one item; its squares are summed in one order, so the row rule holds. Nothing here is large: it is one
// op so that the residual stream is walked once.
#include "params/rms_norm.h"

#include "cpu/simd.h"

namespace {

using pyspec::RmsNormParams;

// The last values of a row, fewer than 16, with zeros behind them.
PYSPEC_INLINE F16 load_some(const float* p, int64_t count) {
  float values[16] = {};
  std::memcpy(values, p, count * sizeof(float));
  return load(values);
}
PYSPEC_INLINE F16 load_up_to(const float* p, int64_t count) {
  return count >= 16 ? load(p) : load_some(p, count);
}

// The mean of a row, from its sums in 16 lanes.
PYSPEC_INLINE float mean_of(const RmsNormParams& p, F16 sums) {
  float lanes[16], total = 0;
  store(lanes, sums);
  for (float lane : lanes) total += lane;
  return total / static_cast<float>(p.size);
}

// What a row is divided by its root mean square with, from the sums of its squares.
PYSPEC_INLINE F16 scale_of(const RmsNormParams& p, F16 squares) {
  return set1(1.0f / __builtin_sqrtf(mean_of(p, squares) + p.epsilon));
}

// Squares of a row less its mean, in 16 lanes; what is behind its end counts as the mean.
PYSPEC_INLINE F16 centred_squares(const RmsNormParams& p, const float* hidden, F16 mean) {
  F16 squares = set1(0.0f);
  for (int64_t i = 0; i < p.size; i += 16) {
    int64_t count = p.size - i;
    float values[16];
    store(values, sub(load_up_to(hidden + i, count), mean));
    for (int64_t j = count < 16 ? count : 16; j < 16; ++j) values[j] = 0.0f;
    squares = fma(load(values), load(values), squares);
  }
  return squares;
}

// kLayerNorm: with what only layer norms have, a mean that is taken off and a bias; either may be missing.
template <class Out, bool kLayerNorm>
void normalise(const RmsNormParams& p, int64_t row) {
  float* hidden = p.hidden + row * p.hidden_stride;
  const float* weight = p.weight ? p.weight + row % p.groups * p.size : nullptr;
  const float* delta = p.delta ? p.delta + row * p.size : nullptr;
  Out* out = static_cast<Out*>(p.out) + row * p.size;
  F16 squares = set1(0.0f), sums = squares, delta_scale = squares;
  if (p.delta_weight) {
    for (int64_t i = 0; i < p.size; i += 16) {
      F16 value = load_up_to(delta + i, p.size - i);
      squares = fma(value, value, squares);
    }
    delta_scale = scale_of(p, squares), squares = set1(0.0f);
  }
  for (int64_t i = 0; i < p.size; i += 16) {
    int64_t count = p.size - i;
    F16 value = load_up_to(hidden + i, count);
    if (p.delta) {
      F16 change = load_up_to(delta + i, count);
      if (p.delta_weight) change = mul(mul(change, delta_scale), load_up_to(p.delta_weight + i, count));
      value = mul(add(value, change), set1(p.hidden_scale));
      float values[16];
      store(values, value);
      std::memcpy(hidden + i, values, (count < 16 ? count : 16) * sizeof(float));
    }
    squares = fma(value, value, squares);
    if constexpr (kLayerNorm) sums = add(sums, value);
  }
  F16 mean = set1(0.0f);
  if (kLayerNorm && p.centred) {
    mean = set1(mean_of(p, sums));
    squares = centred_squares(p, hidden, mean);
  }
  F16 scale = scale_of(p, squares);
  for (int64_t i = 0; i < p.size; i += 16) {
    int64_t count = p.size - i;
    F16 value = load_up_to(hidden + i, count);
    if constexpr (kLayerNorm) value = sub(value, mean);
    if (weight) value = mul(mul(value, scale), load_up_to(weight + i, count));
    if (kLayerNorm && p.bias) value = add(value, load_up_to(p.bias + i, count));
    if (count >= 16) {
      store_as(out + i, value);
      continue;
    }
    float lanes[16];
    store(lanes, value);
    for (int64_t j = 0; j < count; ++j) from_float(lanes[j], out + i + j);
  }
}

template <class Out>
void normalise(const RmsNormParams& p, int64_t row) {
  p.centred || p.bias ? normalise<Out, true>(p, row) : normalise<Out, false>(p, row);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_rms_norm)(const RmsNormParams& p) {
  auto row = [&](int64_t index) {
    if (p.out_element == pyspec::Element::kFloat32) normalise<float>(p, index);
    if (p.out_element == pyspec::Element::kFloat16) normalise<Float16>(p, index);
    if (p.out_element == pyspec::Element::kBFloat16) normalise<BFloat16>(p, index);
  };
  pyspec::parallel(p.parallel_for, p.rows, row);
}
