// linear on the CPU: out[row] = x[row] . weight^T, for the few rows of a tree, at the price of reading the
// weight.
//
// A panel of 32 outputs is two vectors of sums for each row; inputs are walked in order, one broadcast of x
// against one or both vectors of weights, up to kRows rows at a time. So every output is one chain of
// multiply-adds over the inputs, in the same order for any number of rows: the row rule holds by
// construction. One row is bound by the bytes of the weight; many rows by multiply-adds, with the panel in
// the first two caches.
// int8: x is rounded to 8 bits in groups of 32 inputs too, a group's products are summed as integers,
// exactly, and groups are added in order in fp32.
#include "params/linear.h"

#include "cpu/expert_linear.h"
#include "cpu/linear_blocks.h"
#include "cpu/linear_neon.h"
#include "cpu/linear_neon_bytes.h"
#include "cpu/linear_products.h"
#include "cpu/linear_rows.h"
#include "cpu/linear_tiles_bytes.h"
#include "cpu/linear_tiles_pairs.h"

namespace {

using pyspec::kGroup;
using pyspec::kPanel;
using pyspec::LinearParams;
using pyspec::WeightFormat;

// With 16 registers of eight floats a vector takes two, and multiply-adds of a latency of 4, two a cycle,
// need 8 sums: a pass over a block has half of the panel, 4 to 6 rows of it, and 2 registers of weights a
// step. One or two rows take the whole panel, as it comes from memory. docs/linear.md has the arithmetic.
constexpr bool kFewRegisters = kVectorRegisters == 16;
constexpr int kPassVectors = kFewRegisters ? 1 : 2;

// ==== one struct per format: how a row is prepared, and a panel times kRows prepared rows ====
//
// kStreamRows: of a pass over all inputs of both vectors. More rows take the panel block by block, in passes
// of at most kPassRows over kPassVectors. kBlock: inputs whose weights stay in the first cache while all rows
// pass over them, a multiple of kGroup.

// fp32 and fp16: a step is one input.
template <class Storage>
struct FloatWeight {
#if PYSPEC_HAS_NEON
  using Tile = FloatTile<Storage>;
#endif
  static constexpr int kStreamRows = kFewRegisters ? 3 : 12, kPassRows = kFewRegisters ? 6 : 12;
  static constexpr int64_t kBlock = 128;
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

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, F16 (&sum)[kRows][kVectors]) {
    const Storage* w = reinterpret_cast<const Storage*>(block) + lane;
    x += range.first * 4;
    for (int64_t i = range.first; i < range.last; ++i, w += kPanel, x += 4) {
      ahead.template prefetch<kVectors>();
      F16 weights[kVectors];
      for (int v = 0; v < kVectors; ++v) weights[v] = load_as_float(w + 16 * v);
      for (int r = 0; r < kRows; ++r) {
        F16 value = broadcast(x + r * x_bytes);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(weights[v], value, sum[r][v]);
      }
    }
  }
};

// bf16: a step is two inputs, multiplied together where there is an instruction for it.
struct BFloat16Weight {
#if PYSPEC_HAS_NEON
  using Tile = BFloat16Tile;
#endif
  static constexpr int kStreamRows = kFewRegisters ? 2 : 12, kPassRows = kFewRegisters ? 6 : 12;
  static constexpr int64_t kBlock = 128;
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
    std::memset(row + p.inputs * 2, 0, -p.inputs * 2 & 63);  // to the end of a step, of tiles too
#else
    to_floats(p.x_element, x, reinterpret_cast<float*>(row), p.inputs);
    std::memset(row + p.inputs * 4, 0, p.inputs % 2 * 4);
#endif
  }

  // One input of each pair. With few registers there is no room for the weights of both.
  template <bool kSecond, int kRows, int kVectors>
  PYSPEC_INLINE static void add_inputs(const char* w, const char* x, int64_t x_bytes,
                                       F16 (&sum)[kRows][kVectors]) {
    F16 weights[kVectors];
    for (int v = 0; v < kVectors; ++v) weights[v] = load_of_pairs<kSecond>(w + 64 * v);
    for (int r = 0; r < kRows; ++r) {
      F16 value = broadcast(x + r * x_bytes);
      for (int v = 0; v < kVectors; ++v) add_product(weights[v], value, sum[r][v]);
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, F16 (&sum)[kRows][kVectors]) {
    const char* w = block + lane * 4;
    for (int64_t i = range.first; i < range.last; i += 2, w += kStepBytes) {
      ahead.template prefetch<kVectors>();
#if PYSPEC_HAS_BF16_DOT
      F16 pairs[kVectors];
      for (int v = 0; v < kVectors; ++v) pairs[v] = load(w + 64 * v);
      for (int r = 0; r < kRows; ++r) {
        F16 values = broadcast(x + r * x_bytes + i * 2);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = pair_dot(pairs[v], values, sum[r][v]);
      }
#else
      add_inputs<false>(w, x + i * 4, x_bytes, sum);
      add_inputs<true>(w, x + i * 4 + 4, x_bytes, sum);
#endif
    }
  }
};

// int8: a step is four inputs. A prepared row: a scale and what its sums begin with for each group, then the
// integers; as halves, those of bytes 0 and 2 of all fours of a group come first.
struct Int8Weight {
#if PYSPEC_HAS_NEON
  using Tile = Int8Tile;
#endif
  static constexpr int kStreamRows = !kFewRegisters ? 4 : kHalves ? 2 : 1;
  static constexpr int kPassRows = kFewRegisters ? 6 : 4;
  static constexpr int64_t kBlock = 256;
  static constexpr int64_t kGroupBytes = kPanel * (2 + kGroup);
  static constexpr int64_t kStepBytes = kGroupBytes / (kGroup / 4);
  static constexpr int64_t kXBytes = kHalves ? 2 : 1;  // of an integer
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
    int32_t* starts = reinterpret_cast<int32_t*>(scales + groups);
    char* to = reinterpret_cast<char*>(starts + groups);
    int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
    for (int64_t g = 0; g < groups; ++g, to += kGroup * kXBytes) {
      float values[kGroup] = {};
      int8_t integers[kGroup];
      int64_t first = g * kGroup, count = p.inputs - first < kGroup ? p.inputs - first : kGroup;
      to_floats(p.x_element, static_cast<const char*>(x) + first * x_bytes, values, count);
      scales[g] = round_to_bytes(values, integers);
      int32_t sum = 0;
      for (int64_t i = 0; i < kGroup; ++i) sum += integers[i];
      starts[g] = kFloatStart + kProductStart * sum;
#if PYSPEC_HALVES
      split_signed_bytes(integers, to);
#else
      std::memcpy(to, integers, sizeof(integers));
#endif
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void add_four(const char* w, const char* x, int64_t x_bytes,
                                     I16 (&dots)[kRows][kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
#if PYSPEC_HALVES
      I16 even = load_bytes_of<false>(w + 64 * v);
      for (int r = 0; r < kRows; ++r) add_dot2(even, words_at(x + r * x_bytes), dots[r][v]);
      I16 odd = load_bytes_of<true>(w + 64 * v);
      for (int r = 0; r < kRows; ++r) add_dot2(odd, words_at(x + r * x_bytes + kGroup), dots[r][v]);
#else
      for (int r = 0; r < kRows; ++r) dots[r][v] = dot4(w + 64 * v, x + r * x_bytes, dots[r][v]);
#endif
    }
  }

  template <int kRows, int kVectors>
  PYSPEC_INLINE static void multiply(const char* block, int64_t lane, const char* x, int64_t x_bytes,
                                     Range range, Ahead ahead, F16 (&sum)[kRows][kVectors]) {
    int64_t groups = pyspec::groups(range.inputs);
    for (int64_t g = range.first / kGroup; g * kGroup < range.last; ++g, block += kGroupBytes) {
      I16 dots[kRows][kVectors];
      for (int r = 0; r < kRows; ++r) {
        I16 start = words_at(x + r * x_bytes + (groups + g) * 4);
        for (int v = 0; v < kVectors; ++v) dots[r][v] = start;
      }
      const char* values = x + groups * 8 + g * kGroup * kXBytes;
      for (int64_t i = 0; i < kGroup / 4; ++i, values += 4) {
        ahead.template prefetch<kVectors>();
        add_four<kRows, kVectors>(block + kPanel * (2 + i * 4) + lane * 4, values, x_bytes, dots);
      }
      const Float16* scales = reinterpret_cast<const Float16*>(block) + lane;
      F16 scale[kVectors], start[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        scale[v] = load_as_float(scales + 16 * v), start[v] = float_start(scale[v]);
      }
      for (int r = 0; r < kRows; ++r) {
        F16 x_scale = broadcast(x + r * x_bytes + g * 4);
        for (int v = 0; v < kVectors; ++v) {
          sum[r][v] = fma(times(dots[r][v], scale[v], start[v]), x_scale, sum[r][v]);
        }
      }
    }
  }
};

// ==== the loops ====

#if !PYSPEC_HAS_NEON  // which has them in linear_neon.h
// One block of inputs for kRows rows and kVectors vectors of the panel from lane on: goes on with their sums,
// [kRows][kPanel].
template <class Weight, int kVectors, int kMost>
PYSPEC_INLINE void add_block(int64_t rows, const char* block, int64_t lane, const char* x, int64_t x_bytes,
                             Range range, Ahead ahead, float* sums) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      return add_block<Weight, kVectors, kMost - 1>(rows, block, lane, x, x_bytes, range, ahead, sums);
    }
  }
  F16 sum[kMost][kVectors];
  for (int r = 0; r < kMost; ++r) {
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * kPanel + lane + 16 * v);
  }
  Weight::template multiply<kMost, kVectors>(block, lane, x, x_bytes, range, ahead, sum);
  for (int r = 0; r < kMost; ++r) {
    for (int v = 0; v < kVectors; ++v) store(sums + r * kPanel + lane + 16 * v, sum[r][v]);
  }
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
#if PYSPEC_HAS_AMX
  if constexpr (std::is_same_v<Weight, BFloat16Weight>) {
    TiledPairs::multiply(panel, p.inputs, x, x_bytes, rows, sums);
    return store_rows(sums, p, first_row, rows, first_output);
  }
  if constexpr (std::is_same_v<Weight, Int8Weight>) {
    if (rows >= TiledBytes::kLeastRows) {
      TiledBytes::multiply(panel, p.inputs, x, x_bytes, rows, sums);
      return store_rows(sums, p, first_row, rows, first_output);
    }
  }
#endif
  if (rows <= Weight::kStreamRows) {
    Ahead ahead = {panel + kPrefetchBytes, Weight::kStepBytes};
    add_block<Weight, 2, Weight::kStreamRows>(rows, panel, 0, x, x_bytes, {0, p.inputs, p.inputs}, ahead,
                                              sums);
    return store_rows(sums, p, first_row, rows, first_output);
  }
  int64_t passes = (rows + Weight::kPassRows - 1) / Weight::kPassRows, sweeps = passes * 2 / kPassVectors;
  for (int64_t first = 0; first < p.inputs; first += Weight::kBlock) {
    Range range = {first, first + Weight::kBlock < p.inputs ? first + Weight::kBlock : p.inputs, p.inputs};
    const char *block = panel + Weight::offset(first), *end = panel + Weight::offset(range.last);
    Ahead ahead = {end, Weight::kStepBytes / sweeps};
    for (int64_t pass = 0; pass < passes; ++pass) {
      int64_t row = rows * pass / passes, count = rows * (pass + 1) / passes - row;
      for (int64_t lane = 0; lane < kPanel; lane += 16 * kPassVectors) {
        add_block<Weight, kPassVectors, Weight::kPassRows>(count, block, lane, x + row * x_bytes, x_bytes,
                                                           range, ahead, sums + row * kPanel);
        ahead.next += (end - block) / sweeps;
      }
    }
  }
  store_rows(sums, p, first_row, rows, first_output);
}
#endif

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
