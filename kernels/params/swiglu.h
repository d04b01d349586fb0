// swiglu: activation(gate) * up.
#pragma once

#include "params/common.h"

namespace pyspec {

enum class Activation : int64_t { kSilu, kGeluTanh, kClamped, kSigmoid, kRelu, kNone, kGelu };

struct SwigluParams {
  const float* gate;  // [rows, size]
  const void* up;     // [rows, size]
  void* out;          // [rows, size], contiguous
  int64_t rows, size;
  int64_t gate_stride, up_stride;  // of rows, in elements
  Activation activation;
  Element up_element, out_element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
