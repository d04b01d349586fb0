// causal_conv: a short convolution over each node's ancestors, behind a window of committed inputs.
#pragma once

#include "params/round.h"

namespace pyspec {

constexpr int64_t kMostConvTaps = 8;
constexpr int64_t kConvLanes = 16;  // channels come in multiples of it

struct CausalConvParams {
  float* window;        // [sequences, taps - 1, channels], contiguous: the last committed inputs, newest last
  float* record;        // [2, sequences, record_nodes, channels], contiguous
  const float* x;       // [rows, channels], the last dimension contiguous
  const float* weight;  // [taps, channels], contiguous; the last tap is the node's own
  const float* bias;    // [channels] or null
  void* out;            // [rows, channels], contiguous

  int64_t sequences, record_nodes, channels, taps;
  int64_t x_stride;  // elements from row to row
  Round round;
  Element out_element;
  bool is_linear;  // whether silu is left out
  ParallelFor parallel_for;
};

}  // namespace pyspec
