// expert_linear: linear and linear_codes where each row of out has the weight of an expert of its own.
//
// Experts' weights lie one after another, each laid out by itself, and so do their biases. What a launch
// works out before the products lies behind the rows in the workspace: `Sorted`.
#pragma once

#include "params/common.h"

namespace pyspec {

struct Experts {
  const int32_t* ids;  // [rows of out]: the expert of each; null where all rows have one weight
  int64_t count;
  int64_t choices;  // rows of out for each row of x
};

namespace {  // compiled once per instruction set, so never shared between object files

// The experts that rows may choose at most, all different.
inline int64_t most_chosen(const Experts& experts, int64_t rows) {
  return rows < experts.count ? rows : experts.count;
}

// Rows of out by expert, and in their own order for one expert.
struct Sorted {
  int32_t* order;   // [rows]: rows of out; those whose expert there is not are left out
  int32_t* ends;    // [count]: where the rows of each expert end in order
  int32_t* chosen;  // [most_chosen]: experts with rows, ascending, then -1
};
inline int64_t sorted_bytes(const Experts& experts, int64_t rows) {
  return experts.ids ? (rows + experts.count + most_chosen(experts, rows)) * 4 : 0;
}

}  // namespace
}  // namespace pyspec
