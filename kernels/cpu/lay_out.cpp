// lay_out on the CPU: rows of a file become lanes of panels, block by block, at the price of moving them
// once.
//
// A panel's 32 rows are taken a block of inputs at a time: each row's block is taken apart into bytes, or
// becomes fp32, in the first cache, and is written to its lane of the panel's block, which is there too. So
// the file is read in 32 streams side by side, the panels are written as one, and nothing is in memory
// twice. Lanes share no word, so rows that are neighbours in a panel can come in different calls.
#include "params/lay_out.h"

#include "cpu/lay_out_blocks.h"

namespace {

using pyspec::kPanel;
using pyspec::LayOutParams;

constexpr int64_t kChunk = 256;  // inputs, where the file has no blocks

void report(const LayOutParams& p, int32_t fault) {
  if (fault) __atomic_store_n(p.faults, fault, __ATOMIC_RELAXED);
}

// ==== numbers to panels ====

template <class Number>
bool is_finite(Number value) {
  return to_float(value) - to_float(value) == 0.0f;
}

// Values from input `start` on, to their lane of a panel [inputs][kPanel].
template <class Number>
int32_t write_numbers(const float* values, int64_t count, int64_t start, int64_t lane, uint8_t* panel) {
  Number* out = reinterpret_cast<Number*>(panel) + start * kPanel + lane;
  bool all_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    Number number;
    from_float(values[i], &number);
    all_finite &= is_finite(number);
    out[i * kPanel] = number;
  }
  return all_finite ? pyspec::kNone : pyspec::kNotFinite;
}

// The same for bf16, whose panels have two inputs side by side; start is even.
int32_t write_pairs(const float* values, int64_t count, int64_t start, int64_t lane, uint8_t* panel) {
  BFloat16* out = reinterpret_cast<BFloat16*>(panel) + start * kPanel + lane * 2;
  bool all_finite = true;
  for (int64_t i = 0; i < count; ++i) {
    BFloat16 number;
    from_float(values[i], &number);
    all_finite &= is_finite(number);
    out[i / 2 * kPanel * 2 + i % 2] = number;
  }
  return all_finite ? pyspec::kNone : pyspec::kNotFinite;
}

// ==== rows ====

// The fp32 values of a row from input `start` on: a block of the file, or kChunk inputs; returns how many.
int64_t read_values(const LayOutParams& p, const uint8_t* row, int64_t start, float* values) {
  if (p.kind < pyspec::kFloat32Rows) {
    const pyspec::CodeShape& shape = pyspec::kCodeShapes[p.kind];
    Block block;
    take_apart(p.kind, row + start / shape.block * pyspec::kSourceBytes[p.kind], &block);
    dequantise(p.kind, block, values);
    return shape.block;
  }
  int64_t count = p.inputs - start < kChunk ? p.inputs - start : kChunk;
  if (p.kind == pyspec::kFloat32Rows) {
    std::memcpy(values, row + start * 4, count * 4);
  } else {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, row + (start + i) * 2, 2);
      values[i] = p.kind == pyspec::kFloat16Rows ? to_float(Float16{bits}) : to_float(BFloat16{bits});
    }
  }
  return count;
}

// Rounds values to blocks of 8 or 4 bits from input `start` on.
int32_t write_rounded(const LayOutParams& p, float* values, int64_t count, int64_t start, int64_t lane,
                      uint8_t* panel) {
  const pyspec::CodeShape& shape = pyspec::kCodeShapes[p.format];
  int32_t fault = pyspec::kNone;
  for (int64_t i = count; i % kRounded; ++i) values[i] = 0.0f;
  for (int64_t i = 0; i < count; i += kRounded) {
    Block block{};
    uint8_t* place = panel + (start + i) / kRounded * pyspec::block_bytes(shape);
    if (shape.bits == 8) {
      if (int32_t found = round_to_8_bits(values + i, &block)) fault = found;
      write_block<pyspec::CodeFormat::kQ8_0>(block, place, lane);
    } else {
      if (int32_t found = round_to_4_bits(values + i, &block)) fault = found;
      write_block<pyspec::CodeFormat::kInt4By32>(block, place, lane);
    }
  }
  return fault;
}

int32_t write_values(const LayOutParams& p, float* values, int64_t count, int64_t start, int64_t lane,
                     uint8_t* panel) {
  if (p.format == pyspec::kFloat32Rows) return write_numbers<float>(values, count, start, lane, panel);
  if (p.format == pyspec::kFloat16Rows) return write_numbers<Float16>(values, count, start, lane, panel);
  if (p.format == pyspec::kBFloat16Rows) return write_pairs(values, count, start, lane, panel);
  return write_rounded(p, values, count, start, lane, panel);
}

// The rows of a panel, from lane to end; `row_of` gives the source of a lane.
template <class RowOf>
void convert_panel(const LayOutParams& p, int64_t lane, int64_t end, uint8_t* panel, const RowOf& row_of) {
  alignas(64) float values[kChunk];
  int32_t fault = pyspec::kNone;
  for (int64_t start = 0, count = 0; start < p.inputs; start += count) {
    for (int64_t i = lane; i < end; ++i) {
      count = read_values(p, row_of(i), start, values);
      if (int32_t found = write_values(p, values, count, start, i, panel)) fault = found;
    }
  }
  report(p, fault);
}

// The same where the panel keeps the bits of the file.
template <pyspec::CodeFormat kFormat, class RowOf>
void keep_panel(const LayOutParams& p, int64_t lane, int64_t end, uint8_t* panel, const RowOf& row_of) {
  constexpr pyspec::CodeShape kShape = pyspec::shape_of(kFormat);
  constexpr int64_t kBytes = pyspec::kSourceBytes[static_cast<int32_t>(kFormat)];
  bool all_finite = true;
  for (int64_t b = 0; b < p.inputs / kShape.block; ++b) {
    for (int64_t i = lane; i < end; ++i) {
      Block block;
      take_apart<kFormat>(row_of(i) + b * kBytes, &block);
      all_finite &= has_finite_factors<kFormat>(block);
      write_block<kFormat>(block, panel + b * pyspec::block_bytes(kShape), i);
    }
  }
  report(p, all_finite ? pyspec::kNone : pyspec::kNotFinite);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_lay_out)(const LayOutParams& p) {
  const int64_t first_panel = p.first / kPanel, last = p.first + p.rows;
  const int64_t source_row = pyspec::row_bytes(p.kind, p.inputs);
  const int64_t panel_bytes = pyspec::laid_out_bytes(p.format, p.inputs);
  auto body = [&](int64_t item) {
    const int64_t output = (first_panel + item) * kPanel;  // of lane 0
    const int64_t lane = output < p.first ? p.first - output : 0;
    const int64_t end = last - output < kPanel ? last - output : kPanel;
    uint8_t* panel = p.panels + (first_panel + item) * panel_bytes;
    auto row_of = [&](int64_t i) {
      int64_t row = output + i - p.first;
      return p.source + (p.order ? p.order[row] : row) * source_row;
    };
    if (p.kind != p.format || p.kind >= pyspec::kFloat32Rows) {
      return convert_panel(p, lane, end, panel, row_of);
    }
    with_file_format(p.format,
                     [&](auto format) { keep_panel<decltype(format)::value>(p, lane, end, panel, row_of); });
  };
  pyspec::parallel(p.parallel_for, p.rows > 0 ? (last - 1) / kPanel - first_panel + 1 : 0, body);
}
