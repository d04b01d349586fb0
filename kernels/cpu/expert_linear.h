// expert_linear on the CPU: the loops around the tiles of linear and linear_codes where rows have experts.
//
// Rows are sorted by expert, in one item, which takes microseconds; they are prepared in that order. An item
// is then a panel of one of the experts that were chosen, times all rows that chose it: each expert's weight
// is read once, and only those of experts that have rows. The number of items doesn't depend on what was
// chosen, as threads that come late must find the same. A row's bits are those of linear, as its sums are.
#pragma once

#include <cstring>

#include "params/linear.h"

namespace {

// rows: of out.
inline void sort_rows(const pyspec::Experts& experts, int64_t rows, const pyspec::Sorted& sorted) {
  auto is_expert = [&](int32_t id) { return id >= 0 && id < experts.count; };
  std::memset(sorted.ends, 0, experts.count * 4);
  for (int64_t row = 0; row < rows; ++row) {
    if (is_expert(experts.ids[row])) ++sorted.ends[experts.ids[row]];
  }
  int32_t begin = 0;
  int64_t found = 0;
  for (int64_t expert = 0; expert < experts.count; ++expert) {
    int32_t size = sorted.ends[expert];
    if (size) sorted.chosen[found++] = static_cast<int32_t>(expert);
    sorted.ends[expert] = begin;  // until the rows are put there, one behind another
    begin += size;
  }
  for (; found < pyspec::most_chosen(experts, rows); ++found) sorted.chosen[found] = -1;
  for (int64_t row = 0; row < rows; ++row) {
    if (is_expert(experts.ids[row]))
      sorted.order[sorted.ends[experts.ids[row]]++] = static_cast<int32_t>(row);
  }
}

// prepare(row of x, place) puts a row at its place in the workspace; multiply(params, panel, first place,
// places, first output) is a tile whose params have the expert's bias and the order of its rows.
template <class Params, class Prepare, class Multiply>
void multiply_experts(const Params& p, int64_t row_bytes, int64_t panel_bytes, int64_t tile_rows,
                      Prepare prepare, Multiply multiply) {
  int32_t* behind = reinterpret_cast<int32_t*>(static_cast<char*>(p.workspace) + p.rows * row_bytes);
  const pyspec::Sorted sorted = {behind, behind + p.rows, behind + p.rows + p.experts.count};
  auto sort = [&](int64_t) { sort_rows(p.experts, p.rows, sorted); };
  pyspec::parallel(p.parallel_for, 1, sort);

  auto prepare_place = [&](int64_t place) {
    if (place < sorted.ends[p.experts.count - 1]) prepare(sorted.order[place] / p.experts.choices, place);
  };
  pyspec::parallel(p.parallel_for, p.rows, prepare_place);

  int64_t panels = pyspec::panels(p.outputs);
  auto panel = [&](int64_t index) {
    int64_t expert = sorted.chosen[index / panels], number = index % panels;
    if (expert < 0) return;
    Params own = p;
    own.order = sorted.order;
    if (own.bias) own.bias += expert * p.outputs;
    const char* data = static_cast<const char*>(p.weight) + (expert * panels + number) * panel_bytes;
    int64_t end = sorted.ends[expert];
    for (int64_t place = expert ? sorted.ends[expert - 1] : 0; place < end; place += tile_rows) {
      multiply(own, data, place, end - place < tile_rows ? end - place : tile_rows, number * pyspec::kPanel);
    }
  };
  pyspec::parallel(p.parallel_for, pyspec::most_chosen(p.experts, p.rows) * panels, panel);
}

}  // namespace
