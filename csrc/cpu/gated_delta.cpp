#include "../gated_delta.h"

#include "rounds.h"
#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_gated_delta, pyspec::GatedDeltaParams);

Tensor gated_delta(Tensor state, Tensor record, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& decay, const Tensor& beta, const Tensor& a,
                   const std::optional<Tensor>& dt_bias, const Tensor& sequences, const Tensor& starts,
                   const Tensor& parents, const Tensor& paths, const Tensor& halves, const Tensor& advances,
                   double strength, bool tiled, torch::headeronly::ScalarType out_dtype) {
  auto p = pyspec::delta::params_of(state, record, q, k, v, decay, beta, a, dt_bias, strength, tiled);
  pyspec::RoundTensors round{sequences, starts, parents, paths, halves, advances};
  p.round = pyspec::round_of(round, v.size(0), p.sequences, p.record_nodes);
  Tensor out = pyspec::new_tensor({v.size(0), p.channels}, out_dtype);
  p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  pyspec::launch(pyspec_gated_delta_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("gated_delta", TORCH_BOX(&gated_delta)); }
