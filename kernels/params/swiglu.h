// swiglu: activation(gate) * up.
#pragma once

#include "params/common.h"

namespace pyspec {

enum class Activation : int64_t { kSilu, kGeluTanh, kClamped };

struct SwigluParams {
  const float* gate_up;  // [rows, 2 * size], contiguous: gates, then ups
  void* out;             // [rows, size], contiguous
  int64_t rows, size;
  Activation activation;
  Element out_element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
