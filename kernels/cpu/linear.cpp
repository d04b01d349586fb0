// linear on the CPU: out[row] = x[row] . weight^T, for the few rows of a tree, at the price of reading the
// weight.
//
// A panel of 32 outputs is two vectors of sums for each row; inputs are walked in order, one broadcast of x
// against two vectors of weights, up to kRows rows at a time. So every output is one chain of multiply-adds
// over the inputs, in the same order for any number of rows: the row rule holds by construction. One row is
// bound by the bytes of the weight; many rows by multiply-adds, with the panel in the first two caches.
// int8: x is rounded to 8 bits in groups of 32 inputs too, a group's products are summed as integers,
// exactly, and groups are added in order in fp32.
#include "params/linear.h"

#include "cpu/simd.h"

namespace {

using pyspec::kGroup;
using pyspec::kPanel;
using pyspec::LinearParams;
using pyspec::WeightFormat;

// How far ahead of its use a panel is asked for: far enough to cross the page that the processor's own
// prefetching stops at.
constexpr int64_t kPrefetchBytes = 4096;

PYSPEC_INLINE void prefetch(const char* p) {
  __builtin_prefetch(p + kPrefetchBytes);
  __builtin_prefetch(p + kPrefetchBytes + 64);
}

template <class Storage>
PYSPEC_INLINE void to_floats(const void* x, float* out, int64_t n) {
  convert_row(static_cast<const Storage*>(x), out, n);
}

PYSPEC_INLINE void to_floats(pyspec::Element element, const void* x, float* out, int64_t n) {
  if (element == pyspec::Element::kFloat32) return to_floats<float>(x, out, n);
  if (element == pyspec::Element::kFloat16) return to_floats<Float16>(x, out, n);
  to_floats<BFloat16>(x, out, n);
}

// ==== one struct per format: how a row is prepared, and a panel times kRows prepared rows ====

// fp32 and fp16: a step is one input.
template <class Storage>
struct FloatWeight {
  static constexpr int kMostRows = kVectorRegisters == 32 ? 8 : 2;

  static void prepare(const LinearParams& p, const void* x, char* row) {
    to_floats(p.x_element, x, reinterpret_cast<float*>(row), p.inputs);
  }

  template <int kRows>
  PYSPEC_INLINE static void multiply(const char* panel, const char* x, int64_t x_bytes, int64_t inputs,
                                     F16 (&sum)[kRows][2]) {
    const Storage* w = reinterpret_cast<const Storage*>(panel);
    for (int64_t i = 0; i < inputs; ++i, w += kPanel, x += 4) {
      prefetch(reinterpret_cast<const char*>(w));
      F16 first = load_as_float(w), second = load_as_float(w + 16);
      for (int r = 0; r < kRows; ++r) {
        F16 value = broadcast(x + r * x_bytes);
        sum[r][0] = fma(first, value, sum[r][0]);
        sum[r][1] = fma(second, value, sum[r][1]);
      }
    }
  }
};

// bf16: a step is two inputs, multiplied together where there is an instruction for it.
struct BFloat16Weight {
  static constexpr int kMostRows = kVectorRegisters == 32 ? 8 : 2;

  static void prepare(const LinearParams& p, const void* x, char* row) {
#if PYSPEC_HAS_BF16_DOT
    std::memcpy(row, x, p.inputs * 2);
    std::memset(row + p.inputs * 2, 0, p.inputs % 2 * 2);
#else
    to_floats(p.x_element, x, reinterpret_cast<float*>(row), p.inputs);
    std::memset(row + p.inputs * 4, 0, p.inputs % 2 * 4);
#endif
  }

  template <int kRows>
  PYSPEC_INLINE static void multiply(const char* w, const char* x, int64_t x_bytes, int64_t inputs,
                                     F16 (&sum)[kRows][2]) {
    for (int64_t i = 0; i < inputs; i += 2, w += kPanel * 4) {
      prefetch(w);
#if PYSPEC_HAS_BF16_DOT
      F16 first = load(w), second = load(w + 64);
      for (int r = 0; r < kRows; ++r) {
        F16 values = broadcast(x + r * x_bytes + i * 2);
        sum[r][0] = pair_dot(first, values, sum[r][0]);
        sum[r][1] = pair_dot(second, values, sum[r][1]);
      }
#else
      F16 even[2], odd[2];
      load_pairs(w, even[0], odd[0]), load_pairs(w + 64, even[1], odd[1]);
      for (int r = 0; r < kRows; ++r) {
        F16 value = broadcast(x + r * x_bytes + i * 4);
        sum[r][0] = fma(even[0], value, sum[r][0]);
        sum[r][1] = fma(even[1], value, sum[r][1]);
      }
      for (int r = 0; r < kRows; ++r) {
        F16 value = broadcast(x + r * x_bytes + i * 4 + 4);
        sum[r][0] = fma(odd[0], value, sum[r][0]);
        sum[r][1] = fma(odd[1], value, sum[r][1]);
      }
#endif
    }
  }
};

// int8. A prepared row: a scale and the sum of the integers for each group, then the integers.
struct Int8Weight {
  static constexpr int kMostRows = kVectorRegisters == 32 ? 4 : 1;
  static constexpr int64_t kGroupBytes = kPanel * (2 + kGroup);

  static void prepare(const LinearParams& p, const void* x, char* row) {
    int64_t groups = pyspec::groups(p.inputs);
    float* scales = reinterpret_cast<float*>(row);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + groups);
    int8_t* integers = reinterpret_cast<int8_t*>(sums + groups);
    int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
    for (int64_t g = 0; g < groups; ++g) {
      float values[kGroup] = {}, largest = 0;
      int64_t first = g * kGroup, count = p.inputs - first < kGroup ? p.inputs - first : kGroup;
      to_floats(p.x_element, static_cast<const char*>(x) + first * x_bytes, values, count);
      for (float value : values) {
        float size = __builtin_fabsf(value);
        largest = size > largest || size != size ? size : largest;  // NaN stays
      }
      float scale = largest / 127.0f, factor = largest > 0 ? 127.0f / largest : 0.0f;
      bool finite = largest < kInfinity && factor < kInfinity;
      int32_t sum = 0;
      for (int64_t i = 0; i < kGroup; ++i) {
        int32_t integer = finite ? static_cast<int32_t>(__builtin_rintf(values[i] * factor)) : 0;
        integers[first + i] = static_cast<int8_t>(integer);
        sum += integer;
      }
      scales[g] = largest < kInfinity ? scale : __builtin_nanf("");
      sums[g] = sum;
    }
  }

  template <int kRows>
  PYSPEC_INLINE static void multiply(const char* panel, const char* x, int64_t x_bytes, int64_t inputs,
                                     F16 (&sum)[kRows][2]) {
    int64_t groups = pyspec::groups(inputs);
    for (int64_t g = 0; g < groups; ++g, panel += kGroupBytes) {
      I16 dots[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        int32_t integers;
        std::memcpy(&integers, x + r * x_bytes + (groups + g) * 4, 4);
        dots[r][0] = dots[r][1] = start_dot(integers);
      }
      for (int64_t i = 0; i < kGroup / 4; ++i) {
        const char* w = panel + kPanel * (2 + i * 4);
        prefetch(w);
        for (int r = 0; r < kRows; ++r) {
          const char* values = x + r * x_bytes + groups * 8 + g * kGroup + i * 4;
          dots[r][0] = dot4(w, values, dots[r][0]);
          dots[r][1] = dot4(w + 64, values, dots[r][1]);
        }
      }
      const Float16* scales = reinterpret_cast<const Float16*>(panel);
      F16 scale[2] = {load_as_float(scales), load_as_float(scales + 16)};
      for (int r = 0; r < kRows; ++r) {
        F16 x_scale = broadcast(x + r * x_bytes + g * 4);
        for (int j = 0; j < 2; ++j) {
          sum[r][j] = fma(mul(to_float(dots[r][j]), scale[j]), x_scale, sum[r][j]);
        }
      }
    }
  }
};

// ==== the loops ====

template <class Out>
PYSPEC_INLINE void store_row(const F16 (&sum)[2], const LinearParams& p, int64_t row, int64_t first) {
  Out* out = static_cast<Out*>(p.out) + row * p.out_stride + first;
  int64_t count = p.outputs - first < kPanel ? p.outputs - first : kPanel;
  F16 biased[2] = {sum[0], sum[1]};
  if (p.bias && count == kPanel) {
    for (int j = 0; j < 2; ++j) biased[j] = add(sum[j], load(p.bias + first + 16 * j));
  }
  if (count == kPanel) {
    store_as(out, biased[0]), store_as(out + 16, biased[1]);
    return;
  }
  float values[kPanel];
  store(values, biased[0]), store(values + 16, biased[1]);
  for (int64_t i = 0; i < count; ++i) from_float(p.bias ? values[i] + p.bias[first + i] : values[i], out + i);
}

template <class Weight, int kRows>
PYSPEC_INLINE void rows_of_panel(const LinearParams& p, const char* panel, int64_t first_row, int64_t first) {
  int64_t x_bytes = pyspec::prepared_row_bytes(p);
  const char* x = static_cast<const char*>(p.workspace) + first_row * x_bytes;
  F16 sum[kRows][2];
  for (auto& row : sum) row[0] = row[1] = set1(0.0f);
  Weight::template multiply<kRows>(panel, x, x_bytes, p.inputs, sum);
  for (int r = 0; r < kRows; ++r) {
    if (p.out_element == pyspec::Element::kFloat32) store_row<float>(sum[r], p, first_row + r, first);
    if (p.out_element == pyspec::Element::kFloat16) store_row<Float16>(sum[r], p, first_row + r, first);
    if (p.out_element == pyspec::Element::kBFloat16) store_row<BFloat16>(sum[r], p, first_row + r, first);
  }
}

// The last rows, fewer than kMostRows, in a block of their own size.
template <class Weight, int kRows>
PYSPEC_INLINE void last_rows(const LinearParams& p, const char* panel, int64_t row, int64_t first) {
  if constexpr (kRows > 0) {
    if (p.rows - row == kRows) return rows_of_panel<Weight, kRows>(p, panel, row, first);
    last_rows<Weight, kRows - 1>(p, panel, row, first);
  }
}

template <class Weight>
void linear(const LinearParams& p) {
  int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
  auto prepare = [&](int64_t row) {
    Weight::prepare(p, static_cast<const char*>(p.x) + row * p.x_stride * x_bytes,
                    static_cast<char*>(p.workspace) + row * pyspec::prepared_row_bytes(p));
  };
  pyspec::parallel(p.parallel_for, p.rows, prepare);

  int64_t panel_bytes = pyspec::panel_bytes(p.format, p.inputs);
  auto panel = [&](int64_t index) {
    const char* data = static_cast<const char*>(p.weight) + index * panel_bytes;
    constexpr int kMost = Weight::kMostRows;
    int64_t row = 0;
    for (; row + kMost <= p.rows; row += kMost) rows_of_panel<Weight, kMost>(p, data, row, index * kPanel);
    last_rows<Weight, kMost - 1>(p, data, row, index * kPanel);
  };
  pyspec::parallel(p.parallel_for, pyspec::panels(p.outputs), panel);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_linear)(const LinearParams& p) {
  switch (p.format) {
    case WeightFormat::kFloat32:
      return linear<FloatWeight<float>>(p);
    case WeightFormat::kFloat16:
      return linear<FloatWeight<Float16>>(p);
    case WeightFormat::kBFloat16:
      return linear<BFloat16Weight>(p);
    case WeightFormat::kInt8:
      return linear<Int8Weight>(p);
  }
}
