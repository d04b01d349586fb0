// rms_norm: the residual stream takes a layer's output in and is normalised.
#pragma once

#include "params/common.h"

namespace pyspec {

struct RmsNormParams {
  float* hidden;              // [rows, size], contiguous rows; delta is added in place
  const float* delta;         // [rows, size], contiguous, or null
  const float* delta_weight;  // [size]: delta is normalised and scaled before it is added; or null
  const float* weight;  // [groups, size]; row r is scaled by weight r % groups; null: out is the sum itself
  const float* bias;    // [size], added to what has been scaled; or null
  void* out;            // [rows, size], contiguous
  int64_t rows, size, groups;
  int64_t hidden_stride;        // of rows
  float epsilon, hidden_scale;  // hidden_scale: of the sum, which is kept so; only with a delta
  bool centred;                 // whether the mean of a row is taken off first, which makes it a layer norm
  Element out_element;
  ParallelFor parallel_for;
};

}  // namespace pyspec
