// swiglu: silu(gate) * up.
#pragma once

#include "params/common.h"

namespace pyspec {

struct SwigluParams {
  const float* gate_up;  // [rows, 2 * size], contiguous: gates, then ups
  void* out;             // [rows, size], contiguous
  int64_t rows, size;
  Element out_element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
