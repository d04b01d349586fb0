#include "../causal_conv.h"

#include "rounds.h"
#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_causal_conv, pyspec::CausalConvParams);

Tensor causal_conv(Tensor window, Tensor record, const Tensor& x, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Tensor& sequences, const Tensor& starts,
                   const Tensor& parents, const Tensor& paths, const Tensor& halves, const Tensor& advances,
                   torch::headeronly::ScalarType out_dtype, bool is_linear) {
  auto p = pyspec::causal_conv_params_of(window, record, x, weight, bias);
  pyspec::RoundTensors round{sequences, starts, parents, paths, halves, advances};
  p.round = pyspec::round_of(round, x.size(0), p.sequences, p.record_nodes);
  Tensor out = pyspec::new_tensor({x.size(0), p.channels}, out_dtype);
  p.is_linear = is_linear, p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  pyspec::launch(pyspec_causal_conv_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("causal_conv", TORCH_BOX(&causal_conv)); }
