// lay_out: rows of a matrix as a file has them, and the panels of a laid out weight that they go to.
#pragma once

#include "params/linear_codes.h"

namespace pyspec {

// How rows lie in a file, and how a weight is laid out: a CodeFormat, or one of these behind them. q8_0 is
// the layout of int8 in linear.h.
constexpr int32_t kFloat32Rows = static_cast<int32_t>(CodeFormat::kCount);
constexpr int32_t kFloat16Rows = kFloat32Rows + 1, kBFloat16Rows = kFloat32Rows + 2;

struct LayOutParams {
  const uint8_t* source;  // [source rows, row_bytes(kind, inputs)]
  const int64_t* order;   // [rows]: the source row of each, or null
  uint8_t* panels;        // of the whole weight, zeros where nothing was written yet
  int32_t* faults;        // one of Fault, set where a value has it

  int64_t first, rows, inputs;  // rows become the outputs first to first + rows
  int32_t kind, format;         // of source, of panels
  ParallelFor parallel_for;
};

enum Fault : int32_t { kNone, kNotFinite, kTooLarge };

namespace {  // compiled once per instruction set, so never shared between object files

// Bytes of a block of a GGUF file, by CodeFormat; 0 for formats that no file has.
constexpr int64_t kSourceBytes[] = {18, 20, 22, 24, 34, 84, 110, 144, 176, 210, 18, 136, 17, 0, 0, 0};

inline int64_t row_bytes(int32_t kind, int64_t inputs) {
  if (kind >= kFloat32Rows) return inputs * (kind == kFloat32Rows ? 4 : 2);
  return inputs / kCodeShapes[kind].block * kSourceBytes[kind];
}

inline int64_t laid_out_bytes(int32_t format, int64_t inputs) {
  if (format == kFloat32Rows) return panel_bytes(WeightFormat::kFloat32, inputs);
  if (format == kFloat16Rows) return panel_bytes(WeightFormat::kFloat16, inputs);
  if (format == kBFloat16Rows) return panel_bytes(WeightFormat::kBFloat16, inputs);
  return panel_bytes(static_cast<CodeFormat>(format), inputs);
}

}  // namespace
}  // namespace pyspec
