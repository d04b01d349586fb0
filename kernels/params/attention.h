// What the attention ops share: the tile of keys, the block of lanes, and the floats of both.
#pragma once

#include "params/common.h"

namespace pyspec {
namespace {  // compiled once per instruction set, so never shared between object files

constexpr int64_t kTile = 64;   // keys
constexpr int64_t kLanes = 16;  // query rows, worked on together
constexpr int64_t kMaxHeadDim = 256;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Online softmax of one block: largest score, sum of weights, weighted values, lanes innermost.
inline int64_t state_floats(int64_t head_dim) { return (head_dim + 2) * kLanes; }
inline int64_t query_floats(int64_t head_dim) { return head_dim * kLanes; }

}  // namespace
}  // namespace pyspec
