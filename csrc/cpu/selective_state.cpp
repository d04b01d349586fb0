#include "../selective_state.h"

#include "rounds.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_selective_state, pyspec::SelectiveStateParams);

Tensor selective_state(Tensor state, Tensor record, const Tensor& x, const Tensor& dt, const Tensor& a,
                       const Tensor& b, const Tensor& c, const std::optional<Tensor>& d,
                       const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& z,
                       const Tensor& sequences, const Tensor& starts, const Tensor& parents,
                       const Tensor& paths, const Tensor& halves, const Tensor& advances,
                       torch::headeronly::ScalarType out_dtype) {
  auto p = pyspec::selective::params_of(state, record, x, dt, a, b, c, d, dt_bias, z);
  int64_t rows = x.size(0);
  pyspec::RoundTensors round{sequences, starts, parents, paths, halves, advances};
  p.round = pyspec::round_of(round, rows, p.sequences, p.record_nodes);
  Tensor out = torch::stable::new_empty(x, {rows, p.channels}, out_dtype);
  p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  p.parallel_for = pyspec::parallel_for;
  pyspec_selective_state_table[pyspec::instruction_set()](p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("selective_state", TORCH_BOX(&selective_state)); }
