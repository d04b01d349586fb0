// route_experts: which experts a row goes to, and mix_experts: the sum of what they gave.
#pragma once

#include "params/common.h"

namespace pyspec {

constexpr int64_t kMostExperts = 1024;

struct RouteExpertsParams {
  const float* logits;  // [rows, experts], contiguous
  const float* bias;    // [experts] or null: added to scores where experts are chosen, and nowhere else
  const float* scales;  // [experts] or null: of an expert's gate, after all else
  float* gates;         // [rows, choices]
  int32_t* ids;         // [rows, choices], the best first
  int64_t rows, experts, choices;
  bool is_sigmoid;    // scores are sigmoids, else a softmax
  bool renormalises;  // gates are divided by their sum
  float scale;        // of gates
  ParallelFor parallel_for;
};

struct MixExpertsParams {
  const float* values;        // [rows * choices, size], contiguous
  const float* gates;         // [rows, choices], contiguous
  const float* shared;        // [rows, size], contiguous, or null: added last
  const float* shared_gates;  // [rows], contiguous, or null for 1
  float* out;                 // [rows, size]
  int64_t rows, choices, size;
  ParallelFor parallel_for;
};

}  // namespace pyspec
