// linear_codes on the CPU: out[row] = x[row] . weight^T for weights in 2 to 8 bits, at the price of reading
// their bits.
//
// x is rounded to 8 bits in the format's own blocks. A panel of 32 outputs is taken a chunk of inputs at a
// time, in passes of up to kMostRows rows, with sums in registers and codes and x streamed past. Codes become
// bytes once for all rows: in registers, in the first pass, which leaves them in the first cache for those
// after it, as the room for a store is there anyway beside products. In a block all is integers,
// exactly: products of bytes, times the scales of their groups; a block is then added in fp32, blocks in
// order. So an output is one chain of multiply-adds over the blocks for any number of rows: the row rule
// holds by construction. One row is bound by the bits of the weight; many rows by the products of bytes.
#include "params/linear_codes.h"

#include "cpu/expert_linear.h"
#include "cpu/linear_codes_rows.h"
#include "cpu/linear_codes_tiles.h"
#include "cpu/linear_rows.h"

namespace {

using pyspec::CodeFormat;
using pyspec::Floors;
using pyspec::kPanel;
using pyspec::LinearCodesParams;

constexpr int64_t kTileRows = 64;
constexpr int64_t kVectors = kVectorRegisters == 32 ? 2 : 1;  // of 16 outputs, at a time
#if PYSPEC_HAS_X86_VECTORS || PYSPEC_HAS_NEON
constexpr bool kPlainLoops = false;
#else
constexpr bool kPlainLoops = true;
#endif
// Of a pass: their sums of a group stay in registers. Those of plain loops do not, and compilers take long
// over each.
template <class F>
constexpr int64_t kMostRows = kPlainLoops || (F::kIsSmall && sizeof(SmallSums) > sizeof(I16)) ? 2 : 4;
// How far ahead of its use the weight is asked for: across the page that the processor's own prefetching
// stops at.
constexpr int64_t kPrefetchBytes = 4096;

// ==== a chunk times rows ====

// Weights that will be wanted, asked for group by group: `bytes` each time.
struct Ahead {
  const char* next;
  int64_t bytes;
  PYSPEC_INLINE void prefetch() {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
    next += bytes;
  }
};

// Passes over a chunk: the first takes codes from the weight and leaves them as bytes, unless it is the only
// one; later ones take the bytes.
enum class Pass { kOnly, kFirst, kLater };

// Adds a group's products, times its scales, to totals: of kVectors times 16 outputs from lane on.
template <class F, int kRows, Pass kPass>
PYSPEC_INLINE void add_group(Chunk<F>& chunk, const char* block, int64_t b, int64_t g, int64_t lane,
                             const Rows& x, I16 (&totals)[kRows][kVectors]) {
  const int64_t group = b * F::kGroups + g;
  constexpr int64_t kFours = F::kGroup / 4;
  constexpr int64_t kRun =
      F::kIsSmall && small_dots(F::kMost) < kFours ? small_dots(F::kMost) / 2 * 2 : kFours;
  static_assert(kFours % kRun == 0);
  using Sums = std::conditional_t<F::kIsSmall, SmallSums, I16>;
  for (int64_t run = 0; run < kFours; run += kRun) {
    Sums sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      Sums start{};
      if constexpr (!F::kIsSmall) start = start_dot(sum_of(x.sums + r * x.stride + group * 2));
      for (int v = 0; v < kVectors; ++v) sums[r][v] = start;
    }
    PYSPEC_UNROLL
    for (int64_t i = 0; i < kRun; ++i) {
      I16 codes[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        void* bytes = chunk.bytes[group * kFours + run + i][lane + v * 16];
        codes[v] = kPass == Pass::kLater ? load_words(bytes) : codes_of<F>(block, lane + v * 16, g, run + i);
        if constexpr (kPass == Pass::kFirst) store_words(bytes, codes[v]);
      }
      for (int r = 0; r < kRows; ++r) {
        I16 values = set1_words(four_bytes(x.integers + r * x.stride + group * F::kGroup + (run + i) * 4));
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (F::kIsSmall) {
            sums[r][v] = add_small_dot(codes[v], values, sums[r][v]);
          } else {
            sums[r][v] = dot4(codes[v], values, sums[r][v]);
          }
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      I16 scale =
          F::kShape.has_scales ? load_words(chunk.scales[group] + lane + v * 16) : small_scale(set1_words(1));
      for (int r = 0; r < kRows; ++r) {
        if constexpr (F::kIsSmall) {
          totals[r][v] = add_scaled(sums[r][v], scale, totals[r][v]);
        } else {
          totals[r][v] = add(totals[r][v], F::kShape.has_scales ? mul(sums[r][v], scale) : sums[r][v]);
        }
      }
    }
  }
}

// Goes on with the rows' sums over the blocks of a chunk.
template <class F, int kRows, Pass kPass>
PYSPEC_INLINE void add_chunk(Chunk<F>& chunk, const char* block, int64_t blocks, int64_t lane, const Rows& x,
                             Ahead& ahead, F16 (&sum)[kRows][kVectors]) {
  for (int64_t b = 0; b < blocks; ++b, block += pyspec::block_bytes(F::kShape)) {
    I16 totals[kRows][kVectors], minimums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      int32_t start = 0;
      if constexpr (F::kIsSmall && F::kShape.lowest && !F::kShape.has_scales) {
        start = F::kShape.lowest * sum_of(x.sums + r * x.stride + b * 2);
      }
      for (int v = 0; v < kVectors; ++v) totals[r][v] = set1_words(start), minimums[r][v] = set1_words(0);
    }
    for (int64_t g = 0; g < F::kGroups; ++g) {
      ahead.prefetch();
      add_group<F, kRows, kPass>(chunk, block, b, g, lane, x, totals);
    }
    if constexpr (F::kHasSums) add_minimums<F>(chunk, b, lane, x, minimums);
    add_block<F, F::kHasSums>(chunk, b, lane, x, totals, minimums, sum);
  }
}

template <class F, int kMost, Pass kPass>
void add_rows(int64_t rows, Chunk<F>& chunk, const char* panel, int64_t blocks, const Rows& x, Ahead ahead,
              float* sums) {
  constexpr int kLeast = kPass == Pass::kOnly ? 1 : (kMostRows<F> + 1) / 2;  // passes share rows evenly
  if constexpr (kMost > kLeast) {
    if (rows < kMost) return add_rows<F, kMost - 1, kPass>(rows, chunk, panel, blocks, x, ahead, sums);
  }
  for (int64_t lane = 0; lane < kPanel; lane += 16 * kVectors) {
    F16 sum[kMost][kVectors];
    for (int r = 0; r < kMost; ++r) {
      for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * kPanel + lane + v * 16);
    }
    add_chunk<F, kMost, kPass>(chunk, panel, blocks, lane, x, ahead, sum);
    for (int r = 0; r < kMost; ++r) {
      for (int v = 0; v < kVectors; ++v) store(sums + r * kPanel + lane + v * 16, sum[r][v]);
    }
  }
}

// ==== the loops ====

template <CodeFormat kFormat>
void prepare(const LinearCodesParams& p, const char* x, char* row) {
  using F = Format<kFormat>;
  int64_t blocks = pyspec::blocks(F::kShape, p.inputs);
  pyspec::PreparedRow parts = pyspec::prepared_row(kFormat, p.inputs);
  float* scales = reinterpret_cast<float*>(row);
  int16_t* sums = reinterpret_cast<int16_t*>(row + parts.sums);
  int8_t* integers = reinterpret_cast<int8_t*>(row + parts.integers);
  int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
  for (int64_t b = 0; b < blocks; ++b) {
    float values[F::kBlock] = {};
    int64_t first = b * F::kBlock, count = p.inputs - first < F::kBlock ? p.inputs - first : F::kBlock;
    to_floats(p.x_element, x + first * x_bytes, values, count);
    scales[b] = round_to_bytes(values, integers + first);
  }
  for (int64_t g = 0; g < blocks * F::kGroups; ++g) {
    int32_t sum = 0;
    for (int64_t i = 0; i < F::kGroup; ++i) sum += integers[g * F::kGroup + i];
    sums[g] = static_cast<int16_t>(sum);
  }
  sums[blocks * F::kGroups] = 0;  // the other half of a pair
}

// A panel times up to kTileRows rows. Each pass over a chunk asks for its share of the weights ahead, so that
// memory and arithmetic never wait for each other.
template <CodeFormat kFormat>
void multiply_tile(const LinearCodesParams& p, const char* panel, int64_t first_row, int64_t rows,
                   int64_t first_output) {
  using F = Format<kFormat>;
  constexpr int64_t kBytes = pyspec::block_bytes(F::kShape), kBlocks = kChunk / F::kBlock;
  alignas(64) float sums[kTileRows * kPanel];
  std::memset(sums, 0, rows * kPanel * sizeof(float));
  pyspec::PreparedRow parts = pyspec::prepared_row(kFormat, p.inputs);
  const char* x = static_cast<const char*>(p.workspace) + first_row * parts.bytes;
  int64_t passes = (rows + kMostRows<F> - 1) / kMostRows<F>, blocks = pyspec::blocks(F::kShape, p.inputs);
#if PYSPEC_HAS_AMX
  if constexpr (TiledCodes<kFormat>::kHasTiles) {
    if (rows >= TiledCodes<kFormat>::kLeastRows) {
      Rows all = {x, x + parts.sums, x + parts.integers, parts.bytes};
      TiledCodes<kFormat>::multiply(panel, blocks, all, rows, sums);
      return store_rows(sums, p, first_row, rows, first_output);
    }
  }
#endif
  Chunk<F> chunk;
  for (int64_t first = 0; first < blocks; first += kBlocks, panel += kBlocks * kBytes) {
    int64_t count = blocks - first < kBlocks ? blocks - first : kBlocks;
    unpack_factors<kFormat>(panel, count, chunk);
    int64_t share = count * kBytes / passes;
    for (int64_t pass = 0; pass < passes; ++pass) {
      int64_t row = rows * pass / passes, end = rows * (pass + 1) / passes;
      Rows part = {x + row * parts.bytes + first * 4,
                   x + row * parts.bytes + parts.sums + first * F::kGroups * 2,
                   x + row * parts.bytes + parts.integers + first * F::kBlock, parts.bytes};
      Ahead ahead = {panel + count * kBytes + kPrefetchBytes + pass * share,
                     share / (count * F::kGroups * 2 / kVectors)};
      auto add = pass > 0     ? add_rows<F, kMostRows<F>, Pass::kLater>
                 : passes > 1 ? add_rows<F, kMostRows<F>, Pass::kFirst>
                              : add_rows<F, kMostRows<F>, Pass::kOnly>;
      add(end - row, chunk, panel, count, part, ahead, sums + row * kPanel);
    }
  }
  store_rows(sums, p, first_row, rows, first_output);
}

template <CodeFormat kFormat>
void linear_codes(const LinearCodesParams& p) {
  int64_t x_bytes = p.x_element == pyspec::Element::kFloat32 ? 4 : 2;
  int64_t row_bytes = pyspec::prepared_row(kFormat, p.inputs).bytes;
  int64_t panel_bytes = pyspec::panel_bytes(kFormat, p.inputs);
  auto prepare_at = [&](int64_t row, int64_t place) {
    prepare<kFormat>(p, static_cast<const char*>(p.x) + row * p.x_stride * x_bytes,
                     static_cast<char*>(p.workspace) + place * row_bytes);
  };
  if (p.experts.ids) {
    return multiply_experts(p, row_bytes, panel_bytes, kTileRows, prepare_at, multiply_tile<kFormat>);
  }
  auto prepare_row = [&](int64_t row) { prepare_at(row, row); };
  pyspec::parallel(p.parallel_for, p.rows, prepare_row);

  auto panel = [&](int64_t index) {
    const char* data = static_cast<const char*>(p.weight) + index * panel_bytes;
    for (int64_t row = 0; row < p.rows; row += kTileRows) {
      int64_t count = p.rows - row < kTileRows ? p.rows - row : kTileRows;
      multiply_tile<kFormat>(p, data, row, count, index * kPanel);
    }
  };
  pyspec::parallel(p.parallel_for, pyspec::panels(p.outputs), panel);
}

// Out of the chunks of the row's panel.
template <CodeFormat kFormat>
void linear_codes_rows(const pyspec::LinearCodesRowsParams& p) {
  using F = Format<kFormat>;
  constexpr int64_t kBytes = pyspec::block_bytes(F::kShape), kBlocks = kChunk / F::kBlock;
  constexpr bool kIsWord = F::kIsSmall && F::kShape.has_scales;
  int64_t blocks = pyspec::blocks(F::kShape, p.inputs);
  Chunk<F> chunk;
  for (int64_t row = 0; row < p.rows; ++row) {
    const char* panel = static_cast<const char*>(p.weight) + p.index[row] / kPanel * blocks * kBytes;
    int64_t lane = p.index[row] % kPanel;
    for (int64_t i = 0; i < p.inputs; ++i) {
      int64_t place = i % kChunk, b = place / F::kBlock, g = place / F::kGroup, pair = g % F::kGroups / 2;
      if (place == 0) {
        int64_t count = blocks - i / F::kBlock < kBlocks ? blocks - i / F::kBlock : kBlocks;
        unpack_factors<kFormat>(panel + i / F::kBlock * kBytes, count, chunk);
        unpack_codes(panel + i / F::kBlock * kBytes, count, chunk);
      }
      float scale = chunk.factors[b][lane];
      // of a small scale the low half, which is all of it
      if constexpr (F::kShape.has_scales) {
        scale *=
            static_cast<float>(kIsWord ? static_cast<int16_t>(chunk.scales[g][lane]) : chunk.scales[g][lane]);
      }
      float value = scale * static_cast<float>(chunk.bytes[place / 4][lane][place % 4] + F::kShape.lowest);
      if constexpr (F::kShape.floors != Floors::kNone) {
        float floor = F::kShape.floors == Floors::kStored ? chunk.floors[b][lane] : chunk.factors[b][lane];
        if constexpr (F::kShape.has_minimums) {
          floor *= static_cast<float>(chunk.pairs[b][pair][lane] >> 16 * (g % F::kGroups % 2) & 0xffff);
        }
        value -= floor;
      }
      p.out[row * p.inputs + i] = value;
    }
  }
}

template <template <CodeFormat> class Run, class Params>
void for_format(const Params& p) {
  switch (p.format) {
    case CodeFormat::kQ4_0:
      return Run<CodeFormat::kQ4_0>::run(p);
    case CodeFormat::kQ4_1:
      return Run<CodeFormat::kQ4_1>::run(p);
    case CodeFormat::kQ5_0:
      return Run<CodeFormat::kQ5_0>::run(p);
    case CodeFormat::kQ5_1:
      return Run<CodeFormat::kQ5_1>::run(p);
    case CodeFormat::kQ8_0:
      return Run<CodeFormat::kQ8_0>::run(p);
    case CodeFormat::kQ2K:
      return Run<CodeFormat::kQ2K>::run(p);
    case CodeFormat::kQ3K:
      return Run<CodeFormat::kQ3K>::run(p);
    case CodeFormat::kQ4K:
      return Run<CodeFormat::kQ4K>::run(p);
    case CodeFormat::kQ5K:
      return Run<CodeFormat::kQ5K>::run(p);
    case CodeFormat::kQ6K:
      return Run<CodeFormat::kQ6K>::run(p);
    case CodeFormat::kIq4Nl:
      return Run<CodeFormat::kIq4Nl>::run(p);
    case CodeFormat::kIq4Xs:
      return Run<CodeFormat::kIq4Xs>::run(p);
    case CodeFormat::kMxfp4:
      return Run<CodeFormat::kMxfp4>::run(p);
    case CodeFormat::kInt4By32:
      return Run<CodeFormat::kInt4By32>::run(p);
    case CodeFormat::kInt4By64:
      return Run<CodeFormat::kInt4By64>::run(p);
    case CodeFormat::kInt4By128:
      return Run<CodeFormat::kInt4By128>::run(p);
    default:  // the binding lets no other through
      return;
  }
}

template <CodeFormat kFormat>
struct Product {
  static void run(const LinearCodesParams& p) { linear_codes<kFormat>(p); }
};
template <CodeFormat kFormat>
struct SomeRows {
  static void run(const pyspec::LinearCodesRowsParams& p) { linear_codes_rows<kFormat>(p); }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_linear_codes)(const LinearCodesParams& p) { for_format<Product>(p); }

extern "C" void PYSPEC_ENTRY(pyspec_linear_codes_rows)(const pyspec::LinearCodesRowsParams& p) {
  for_format<SomeRows>(p);
}
