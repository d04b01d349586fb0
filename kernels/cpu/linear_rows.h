// Rows of linear and linear_codes on their way in and out: x to fp32 and to 8 bits, sums to out.
#pragma once

#include "cpu/simd.h"
#include "params/linear.h"

namespace {

template <class Storage>
PYSPEC_INLINE void to_floats(const void* x, float* out, int64_t n) {
  convert_row(static_cast<const Storage*>(x), out, n);
}

PYSPEC_INLINE void to_floats(pyspec::Element element, const void* x, float* out, int64_t n) {
  if (element == pyspec::Element::kFloat32) return to_floats<float>(x, out, n);
  if (element == pyspec::Element::kFloat16) return to_floats<Float16>(x, out, n);
  to_floats<BFloat16>(x, out, n);
}

// Values as integers from -127 to 127 times a scale, which is returned. The scale of values that are not
// finite is NaN; values too small for a scale with a reciprocal count as 0.
template <int64_t kCount>
PYSPEC_INLINE float round_to_bytes(const float (&values)[kCount], int8_t* integers) {
  uint32_t bits[kCount], largest_bits = 0;  // sizes are ordered as their bits are, with NaN above all
  std::memcpy(bits, values, sizeof(bits));
  for (uint32_t signed_bits : bits) {
    uint32_t size = signed_bits & 0x7fffffffu;
    largest_bits = size > largest_bits ? size : largest_bits;
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  float factor = largest > 0 ? 127.0f / largest : 0.0f;
  if (largest < kInfinity && factor < kInfinity) {
    for (int64_t i = 0; i < kCount; ++i) {
      integers[i] = static_cast<int8_t>(static_cast<int32_t>(__builtin_rintf(values[i] * factor)));
    }
  } else {
    std::memset(integers, 0, kCount);
  }
  return largest < kInfinity ? largest / 127.0f : __builtin_nanf("");
}

template <class Out, class Params>
PYSPEC_INLINE void store_row(const float* sums, const Params& p, int64_t row, int64_t first) {
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + first;
  int64_t count = p.outputs - first < pyspec::kPanel ? p.outputs - first : pyspec::kPanel;
  if (count == pyspec::kPanel) {
    for (int64_t i = 0; i < pyspec::kPanel; i += 16) {
      F16 sum = load(sums + i);
      store_as(out + i, p.bias ? add(sum, load(p.bias + first + i)) : sum);
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) from_float(p.bias ? sums[i] + p.bias[first + i] : sums[i], out + i);
}

// Sums [rows][kPanel], with the bias, as out's rows from first_row on, or those that p.order names.
template <class Params>
PYSPEC_INLINE void store_rows(const float* sums, const Params& p, int64_t first_row, int64_t rows,
                              int64_t first_output) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = sums + r * pyspec::kPanel;
    int64_t place = p.order ? p.order[first_row + r] : first_row + r;
    if (p.out_element == pyspec::Element::kFloat32) store_row<float>(row, p, place, first_output);
    if (p.out_element == pyspec::Element::kFloat16) store_row<Float16>(row, p, place, first_output);
    if (p.out_element == pyspec::Element::kBFloat16) store_row<BFloat16>(row, p, place, first_output);
  }
}

}  // namespace
