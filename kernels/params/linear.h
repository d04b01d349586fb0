// linear: params and the layout of a weight that every instruction set reads.
//
// Format version 1. Outputs come in panels of kPanel; the last panel is filled up with zeros. A panel holds,
// one after another,
//   fp32, fp16   [inputs][kPanel]
//   bf16         [ceil(inputs / 2)][kPanel][2]: the two inputs that one instruction multiplies lie side by
//   side int8         [ceil(inputs / kGroup)] groups of a scale for each output, fp16 [kPanel], and
//                [kGroup / 4][kPanel][4] bytes of weight + 128
// so that a row of outputs is read as one stream, whatever reads it.
#pragma once

#include "params/expert_linear.h"

namespace pyspec {

enum class WeightFormat : int32_t { kFloat32, kFloat16, kBFloat16, kInt8 };

struct LinearParams {
  const void* x;       // [rows, inputs], the last dimension contiguous
  const void* weight;  // laid out
  const float* bias;   // [outputs] or null
  void* out;           // [rows, outputs], the last dimension contiguous
  void* workspace;     // workspace_bytes() of these params, 64-byte aligned

  int64_t rows, inputs, outputs;
  int64_t x_stride, out_stride;  // elements from row to row
  Element x_element, out_element;
  WeightFormat format;
  Experts experts;       // of expert_linear
  const int32_t* order;  // where rows of the workspace go in out; null where that is where they lie
  ParallelFor parallel_for;
};

// Some outputs' weights as they were before they were laid out, as an embedding reads them.
struct LinearRowsParams {
  const void* weight;    // laid out
  const int64_t* index;  // [rows], each in [0, outputs)
  float* out;            // [rows, inputs]
  int64_t rows, inputs;
  WeightFormat format;
};

namespace {  // compiled once per instruction set, so never shared between object files

constexpr int64_t kPanel = 32;
constexpr int64_t kGroup = 32;  // inputs that share a scale

inline int64_t panels(int64_t outputs) { return (outputs + kPanel - 1) / kPanel; }
inline int64_t groups(int64_t inputs) { return (inputs + kGroup - 1) / kGroup; }

inline int64_t panel_bytes(WeightFormat format, int64_t inputs) {
  switch (format) {
    case WeightFormat::kFloat32:
      return inputs * kPanel * 4;
    case WeightFormat::kFloat16:
      return inputs * kPanel * 2;
    case WeightFormat::kBFloat16:
      return (inputs + 1) / 2 * kPanel * 4;
    default:
      return groups(inputs) * kPanel * (2 + kGroup);
  }
}

// A row of x as the inner loop wants it. Floats need at most 4 bytes an input; int8 needs a scale, the sum of
// its integers and kGroup of them, of at most 16 bits, for each group.
inline int64_t prepared_row_bytes(const LinearParams& p) {
  int64_t bytes =
      p.format == WeightFormat::kInt8 ? groups(p.inputs) * (8 + 2 * kGroup) : (p.inputs + 1) / 2 * 8;
  return (bytes + 63) / 64 * 64;
}
inline int64_t workspace_bytes(const LinearParams& p) {
  return p.rows * prepared_row_bytes(p) + sorted_bytes(p.experts, p.rows);
}

}  // namespace
}  // namespace pyspec
