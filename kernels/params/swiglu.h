// swiglu: activation(gate) * up.
#pragma once

#include "params/common.h"

namespace pyspec {

enum class Activation : int64_t { kSilu, kGeluTanh, kClamped };

struct SwigluParams {
  const float* gate;  // [rows, size]
  const float* up;    // [rows, size]
  void* out;          // [rows, size], contiguous
  int64_t rows, size;
  int64_t stride;  // of rows of gate and of up, in elements
  Activation activation;
  Element out_element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
