// selective_state: replays the accepted nodes of the last round, then verifies the nodes of this one.
//
// A state comes in panels of kStateLanes channels, [state_size][kStateLanes] each, so that a vector holds one
// state of neighbouring channels and an output is a sum of vectors.
#pragma once

#include "params/round.h"

namespace pyspec {

constexpr int64_t kStateLanes = 16;
constexpr int64_t kStateMultiple = 16;  // state_size is a multiple of it

struct SelectiveStateParams {
  float* state;          // [sequences, channels / 16, state_size, 16], contiguous
  float* record;         // [2, sequences, record_nodes, record_width()], contiguous: of each node x, dt after
                         // softplus, B
  const void* x;         // [rows, channels]
  const float* dt;       // [rows, heads]
  const float* a;        // [heads], or with a_per_state [channels / 16, state_size, 16] and heads == channels
  const void* b;         // [rows, groups, state_size]
  const void* c;         // like b
  const float* d;        // [channels] or null
  const float* dt_bias;  // [heads] or null
  const float* z;        // [rows, channels] or null
  void* out;             // [rows, channels], contiguous

  int64_t sequences, record_nodes, channels, heads, groups, state_size;
  int64_t x_stride, dt_stride, b_stride, c_stride, z_stride;  // elements from row to row
  bool a_per_state;
  Round round;
  Element x_element;  // of x, b and c
  Element out_element;
  ParallelFor parallel_for;
};

namespace {  // compiled once per instruction set, so never shared between object files

PYSPEC_HOST_DEVICE inline int64_t record_width(const SelectiveStateParams& p) {
  return p.channels + p.heads + p.groups * p.state_size;
}

}  // namespace
}  // namespace pyspec
