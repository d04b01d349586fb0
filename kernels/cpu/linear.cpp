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

#include "cpu/expert_linear.h"
#include "cpu/linear_rows.h"

namespace {

using pyspec::kGroup;
using pyspec::kPanel;
using pyspec::LinearParams;
using pyspec::WeightFormat;

// Inputs whose weights stay in the first cache while all rows pass over them. A multiple of kGroup.
constexpr int64_t kBlock = 128;
constexpr int64_t kTileRows = 64;

// How far ahead of its use one block of rows asks for the weights: far enough to cross the page that the
// processor's own prefetching stops at.
constexpr int64_t kPrefetchBytes = 4096;

// Weights that will be wanted: every step of the inner loop asks for two lines and goes on by `step` bytes.
struct Ahead {
  const char* next;
  int64_t step;
  PYSPEC_INLINE void prefetch() {
    __builtin_prefetch(next);
    __builtin_prefetch(next + 64);
    next += step;
  }
};

// The inputs of one block, out of all of them.
struct Range {
  int64_t first, last, inputs;
};

// ==== one struct per format: how a row is prepared, and a panel times kRows prepared rows ====

// fp32 and fp16: a step is one input.
template <class Storage>
struct FloatWeight {
  static constexpr int kMostRows = kVectorRegisters == 32 ? 12 : 2;
  static constexpr int64_t kStepBytes = kPanel * sizeof(Storage);
  static int64_t offset(int64_t input) { return input * kStepBytes; }

  static float value(const char* panel, int64_t lane, int64_t input) {
    float value;
    to_floats<Storage>(reinterpret_cast<const Storage*>(panel) + input * kPanel + lane, &value, 1);
    return value;
  }

  static void prepare(const LinearParams& p, const void* x, char* row) {
    to_floats(p.x_element, x, reinterpret_cast<float*>(row), p.inputs);
  }

  template <int kRows>
  PYSPEC_INLINE static void multiply(const char* panel, const char* x, int64_t x_bytes, Range range,
                                     Ahead ahead, F16 (&sum)[kRows][2]) {
    const Storage* w = reinterpret_cast<const Storage*>(panel + offset(range.first));
    x += range.first * 4;
    for (int64_t i = range.first; i < range.last; ++i, w += kPanel, x += 4) {
      ahead.prefetch();
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
  static constexpr int kMostRows = kVectorRegisters == 32 ? 12 : 2;
  static constexpr int64_t kStepBytes = kPanel * 4;
  static int64_t offset(int64_t input) { return (input + 1) / 2 * kStepBytes; }

  static float value(const char* panel, int64_t lane, int64_t input) {
    float value;
    int64_t place = (input / 2 * kPanel + lane) * 2 + input % 2;
    to_floats<BFloat16>(reinterpret_cast<const BFloat16*>(panel) + place, &value, 1);
    return value;
  }

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
  PYSPEC_INLINE static void multiply(const char* panel, const char* x, int64_t x_bytes, Range range,
                                     Ahead ahead, F16 (&sum)[kRows][2]) {
    const char* w = panel + offset(range.first);
    for (int64_t i = range.first; i < range.last; i += 2, w += kStepBytes) {
      ahead.prefetch();
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
  static constexpr int64_t kStepBytes = kGroupBytes / (kGroup / 4);
  static int64_t offset(int64_t input) { return pyspec::groups(input) * kGroupBytes; }

  static float value(const char* panel, int64_t lane, int64_t input) {
    const char* group = panel + input / kGroup * kGroupBytes;
    float scale;
    to_floats<Float16>(reinterpret_cast<const Float16*>(group) + lane, &scale, 1);
    int64_t place = input % kGroup / 4 * kPanel * 4 + lane * 4 + input % 4;
    return scale * static_cast<float>(static_cast<uint8_t>(group[kPanel * 2 + place]) - 128);
  }

  static void prepare(const LinearParams& p, const void* x, char* row) {
    int64_t groups = pyspec::groups(p.inputs);
    float* scales = reinterpret_cast<float*>(row);
    int32_t* sums = reinterpret_cast<int32_t*>(scales + groups);
    int8_t* integers = reinterpret_cast<int8_t*>(sums + groups);
    int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
    for (int64_t g = 0; g < groups; ++g) {
      float values[kGroup] = {};
      int64_t first = g * kGroup, count = p.inputs - first < kGroup ? p.inputs - first : kGroup;
      to_floats(p.x_element, static_cast<const char*>(x) + first * x_bytes, values, count);
      scales[g] = round_to_bytes(values, integers + first);
      int32_t sum = 0;
      for (int64_t i = 0; i < kGroup; ++i) sum += integers[first + i];
      sums[g] = sum;
    }
  }

  template <int kRows>
  PYSPEC_INLINE static void multiply(const char* panel, const char* x, int64_t x_bytes, Range range,
                                     Ahead ahead, F16 (&sum)[kRows][2]) {
    int64_t groups = pyspec::groups(range.inputs);
    panel += offset(range.first);
    for (int64_t g = range.first / kGroup; g * kGroup < range.last; ++g, panel += kGroupBytes) {
      I16 dots[kRows][2];
      for (int r = 0; r < kRows; ++r) {
        int32_t integers;
        std::memcpy(&integers, x + r * x_bytes + (groups + g) * 4, 4);
        dots[r][0] = dots[r][1] = start_dot(integers);
      }
      for (int64_t i = 0; i < kGroup / 4; ++i) {
        const char* w = panel + kPanel * (2 + i * 4);
        ahead.prefetch();
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

// One block of inputs for kRows rows: goes on with their sums, [kRows][kPanel].
template <class Weight, int kRows>
PYSPEC_INLINE void add_block(const char* panel, const char* x, int64_t x_bytes, Range range, Ahead ahead,
                             float* sums) {
  F16 sum[kRows][2];
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 2; ++j) sum[r][j] = load(sums + r * kPanel + 16 * j);
  }
  Weight::template multiply<kRows>(panel, x, x_bytes, range, ahead, sum);
  for (int r = 0; r < kRows; ++r) {
    for (int j = 0; j < 2; ++j) store(sums + r * kPanel + 16 * j, sum[r][j]);
  }
}

template <class Weight, int kMost>
PYSPEC_INLINE void add_block(int64_t rows, const char* panel, const char* x, int64_t x_bytes, Range range,
                             Ahead ahead, float* sums) {
  if constexpr (kMost > 1) {
    if (rows < kMost) return add_block<Weight, kMost - 1>(rows, panel, x, x_bytes, range, ahead, sums);
  }
  add_block<Weight, kMost>(panel, x, x_bytes, range, ahead, sums);
}

// A panel times up to kTileRows rows. Rows that need more than one pass take the panel block by block, and
// each pass over a block asks for its share of the next, so that memory and arithmetic never wait for each
// other.
template <class Weight>
void multiply_tile(const LinearParams& p, const char* panel, int64_t first_row, int64_t rows,
                   int64_t first_output) {
  alignas(64) float sums[kTileRows * kPanel];
  std::memset(sums, 0, rows * kPanel * sizeof(float));
  int64_t x_bytes = pyspec::prepared_row_bytes(p);
  const char* x = static_cast<const char*>(p.workspace) + first_row * x_bytes;
  int64_t passes = (rows + Weight::kMostRows - 1) / Weight::kMostRows;
  int64_t block = passes == 1 ? p.inputs : kBlock;
  for (int64_t first = 0; first < p.inputs; first += block) {
    int64_t last = first + block < p.inputs ? first + block : p.inputs;
    int64_t end = Weight::offset(last), share = (end - Weight::offset(first)) / passes;
    for (int64_t pass = 0; pass < passes; ++pass) {
      Ahead ahead = {panel + kPrefetchBytes, Weight::kStepBytes};
      if (passes > 1) ahead = {panel + end + pass * share, Weight::kStepBytes / passes};
      int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
      add_block<Weight, Weight::kMostRows>(count, panel, x + row * x_bytes, x_bytes, {first, last, p.inputs},
                                           ahead, sums + row * kPanel);
    }
  }
  store_rows(sums, p, first_row, rows, first_output);
}

template <class Weight>
void linear(const LinearParams& p) {
  int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
  int64_t row_bytes = pyspec::prepared_row_bytes(p), panel_bytes = pyspec::panel_bytes(p.format, p.inputs);
  auto prepare_at = [&](int64_t row, int64_t place) {
    Weight::prepare(p, static_cast<const char*>(p.x) + row * p.x_stride * x_bytes,
                    static_cast<char*>(p.workspace) + place * row_bytes);
  };
  if (p.experts.ids) {
    return multiply_experts(p, row_bytes, panel_bytes, kTileRows, prepare_at, multiply_tile<Weight>);
  }
  auto prepare = [&](int64_t row) { prepare_at(row, row); };
  pyspec::parallel(p.parallel_for, p.rows, prepare);

  auto panel = [&](int64_t index) {
    const char* data = static_cast<const char*>(p.weight) + index * panel_bytes;
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      multiply_tile<Weight>(p, data, row, p.rows - row < kTileRows ? p.rows - row : kTileRows,
                            index * kPanel);
    }
  };
  pyspec::parallel(p.parallel_for, pyspec::panels(p.outputs), panel);
}

template <class Weight>
void linear_rows(const pyspec::LinearRowsParams& p) {
  for (int64_t row = 0; row < p.rows; ++row) {
    const char* panel =
        static_cast<const char*>(p.weight) + p.index[row] / kPanel * pyspec::panel_bytes(p.format, p.inputs);
    for (int64_t i = 0; i < p.inputs; ++i) {
      p.out[row * p.inputs + i] = Weight::value(panel, p.index[row] % kPanel, i);
    }
  }
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_linear_rows)(const pyspec::LinearRowsParams& p) {
  switch (p.format) {
    case WeightFormat::kFloat32:
      return linear_rows<FloatWeight<float>>(p);
    case WeightFormat::kFloat16:
      return linear_rows<FloatWeight<Float16>>(p);
    case WeightFormat::kBFloat16:
      return linear_rows<BFloat16Weight>(p);
    case WeightFormat::kInt8:
      return linear_rows<Int8Weight>(p);
  }
}

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
