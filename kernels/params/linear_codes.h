// linear_codes: params and the layout of a weight in few bits that every instruction set reads.
//
// Format version 1. Outputs come in panels of kPanel, the last filled up with zeros; a panel is blocks of
// inputs one after another, and a block holds, one after another,
//   factors   [kPanel], fp16, or bf16 for mxfp4
//   floors    [kPanel], fp16, where the format has floors that are not its factors
//   scales    [groups / 2][kPanel][2] bytes: two groups that one instruction multiplies lie side by side
//   minimums  the same; of int4 [kPanel] bytes, as a block is one group; of q2_k they are the high four bits
//             of the scales' bytes
//   codes     a plane of the low 4 bits (2 for q2_k and q3_k, 8 for q8_0), then one of the bits above, if
//   there are any.
//             A plane of b bits is [block * b / 32][kPanel][4] bytes: inputs by fours, 8 / b fours in a byte,
//             the first in its low bits, so that a shift and a mask give the bytes that a product takes.
#pragma once

#include "params/linear.h"

namespace pyspec {

// In the order of FORMATS in pyspec/ops/weight_formats.py.
enum class CodeFormat : int32_t {
  kQ4_0,
  kQ4_1,
  kQ5_0,
  kQ5_1,
  kQ8_0,
  kQ2K,
  kQ3K,
  kQ4K,
  kQ5K,
  kQ6K,
  kIq4Nl,
  kIq4Xs,
  kMxfp4,
  kInt4By32,
  kInt4By64,
  kInt4By128,
  kCount,
};

struct LinearCodesParams {
  const void* x;       // [rows, inputs], the last dimension contiguous
  const void* weight;  // laid out
  const float* bias;   // [outputs] or null
  void* out;           // [rows, outputs], the last dimension contiguous
  void* workspace;     // workspace_bytes() of these params, 64-byte aligned

  int64_t rows, inputs, outputs;
  int64_t x_stride, out_stride;  // elements from row to row
  Element x_element, out_element;
  CodeFormat format;
  Experts experts;       // of expert_linear
  const int32_t* order;  // where rows of the workspace go in out; null where that is where they lie
  ParallelFor parallel_for;
};

// Some outputs' weights as they were before they were laid out, as an embedding reads them.
struct LinearCodesRowsParams {
  const void* weight;    // laid out
  const int64_t* index;  // [rows], each in [0, outputs)
  float* out;            // [rows, inputs]
  int64_t rows, inputs;
  CodeFormat format;
};

namespace {  // compiled once per instruction set, so never shared between object files

// What codes stand for: value = factor * scale * level - floor * minimum.
enum class Levels : int32_t { kAscending, kIq4, kFp4 };
enum class Floors : int32_t { kNone, kStored, kFactors };

struct CodeShape {
  int32_t bits, group, block;
  int32_t lowest;  // level of code 0; of a table, what is taken from its bytes
  Levels levels;
  Floors floors;
  bool has_scales, has_minimums;
};

constexpr CodeShape kCodeShapes[] = {
    {4, 32, 32, -8, Levels::kAscending, Floors::kNone, false, false},     // q4_0
    {4, 32, 32, 0, Levels::kAscending, Floors::kStored, false, false},    // q4_1
    {5, 32, 32, -16, Levels::kAscending, Floors::kNone, false, false},    // q5_0
    {5, 32, 32, 0, Levels::kAscending, Floors::kStored, false, false},    // q5_1
    {8, 32, 32, -128, Levels::kAscending, Floors::kNone, false, false},   // q8_0
    {2, 16, 256, 0, Levels::kAscending, Floors::kStored, true, true},     // q2_k
    {3, 16, 256, -4, Levels::kAscending, Floors::kNone, true, false},     // q3_k
    {4, 32, 256, 0, Levels::kAscending, Floors::kStored, true, true},     // q4_k
    {5, 32, 256, 0, Levels::kAscending, Floors::kStored, true, true},     // q5_k
    {6, 16, 256, -32, Levels::kAscending, Floors::kNone, true, false},    // q6_k
    {4, 32, 32, -128, Levels::kIq4, Floors::kNone, false, false},         // iq4_nl
    {4, 32, 256, -128, Levels::kIq4, Floors::kNone, true, false},         // iq4_xs
    {4, 32, 32, -12, Levels::kFp4, Floors::kNone, false, false},          // mxfp4
    {4, 32, 32, 0, Levels::kAscending, Floors::kFactors, false, true},    // int4_32
    {4, 64, 64, 0, Levels::kAscending, Floors::kFactors, false, true},    // int4_64
    {4, 128, 128, 0, Levels::kAscending, Floors::kFactors, false, true},  // int4_128
};

constexpr CodeShape shape_of(CodeFormat format) { return kCodeShapes[static_cast<int32_t>(format)]; }

constexpr int64_t low_bits(const CodeShape& shape) { return shape.bits < 4 ? 2 : shape.bits < 8 ? 4 : 8; }

// Where the parts of a block begin.
constexpr int64_t scales_at(const CodeShape& shape) {
  return kPanel * (shape.floors == Floors::kStored ? 4 : 2);
}
constexpr int64_t minimums_at(const CodeShape& shape) {
  bool shares_bytes = !shape.has_scales || shape.bits == 2;
  return scales_at(shape) + (shares_bytes ? 0 : kPanel * (shape.block / shape.group));
}
constexpr int64_t codes_at(const CodeShape& shape) {
  bool has_bytes = shape.has_scales || shape.has_minimums;
  int64_t first = shape.has_minimums ? minimums_at(shape) : scales_at(shape);
  return first + (has_bytes ? kPanel * (shape.block / shape.group) : 0);
}
constexpr int64_t high_bits_at(const CodeShape& shape) {
  return codes_at(shape) + kPanel * shape.block * low_bits(shape) / 8;
}
constexpr int64_t block_bytes(const CodeShape& shape) {
  return codes_at(shape) + kPanel * shape.block * shape.bits / 8;
}

inline int64_t blocks(const CodeShape& shape, int64_t inputs) {
  return (inputs + shape.block - 1) / shape.block;
}
inline int64_t panel_bytes(CodeFormat format, int64_t inputs) {
  return blocks(shape_of(format), inputs) * block_bytes(shape_of(format));
}

// A row of x as the inner loop wants it: a scale, fp32, for each block; the sum of the integers, int16, for
// each group and for one more; the integers, int8.
struct PreparedRow {
  int64_t sums, integers, bytes;
};
inline PreparedRow prepared_row(CodeFormat format, int64_t inputs) {
  CodeShape shape = shape_of(format);
  int64_t count = blocks(shape, inputs), groups = count * (shape.block / shape.group);
  PreparedRow row{};
  row.sums = count * 4;
  row.integers = row.sums + (groups + 2) / 2 * 4;
  row.bytes = (row.integers + count * shape.block + 63) / 64 * 64;
  return row;
}
inline int64_t workspace_bytes(const LinearCodesParams& p) {
  return p.rows * prepared_row(p.format, p.inputs).bytes + sorted_bytes(p.experts, p.rows);
}

}  // namespace
}  // namespace pyspec
