#include "params/causal_conv.h"

#include "rounds.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_causal_conv, pyspec::CausalConvParams);

Tensor causal_conv(Tensor window, Tensor record, const Tensor& x, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Tensor& sequences, const Tensor& starts,
                   const Tensor& parents, const Tensor& paths, const Tensor& halves, const Tensor& advances,
                   torch::headeronly::ScalarType out_dtype) {
  auto float32 = torch::headeronly::ScalarType::Float;
  pyspec::CausalConvParams p{};
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == float32 && weight.is_contiguous(),
                  "weight must be float32 [taps, channels] and contiguous");
  p.taps = weight.size(0), p.channels = weight.size(1);
  STD_TORCH_CHECK(p.taps >= 1 && p.taps <= pyspec::kMostConvTaps && p.channels % pyspec::kConvLanes == 0,
                  "weight must have 1 to ", pyspec::kMostConvTaps, " taps and a multiple of ",
                  pyspec::kConvLanes, " channels, got ", p.taps, " and ", p.channels);
  STD_TORCH_CHECK(window.dim() == 3 && window.size(1) == p.taps - 1 && window.size(2) == p.channels &&
                      window.scalar_type() == float32 && window.is_contiguous(),
                  "window must be float32 [sequences, taps - 1, channels] and contiguous");
  p.sequences = window.size(0);
  STD_TORCH_CHECK(record.dim() == 4 && record.size(0) == 2 && record.size(1) == p.sequences &&
                      record.size(3) == p.channels && record.scalar_type() == float32 &&
                      record.is_contiguous(),
                  "record must be float32 [2, sequences, nodes, channels] and contiguous");
  p.record_nodes = record.size(2);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == p.channels && x.scalar_type() == float32 && x.stride(1) == 1,
                  "x must be float32 [rows, channels] with a contiguous last dimension");
  p.x_stride = x.stride(0);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == p.channels && bias->scalar_type() == float32 &&
                        bias->is_contiguous(),
                    "bias must be float32 [channels] and contiguous");
    p.bias = static_cast<const float*>(bias->data_ptr());
  }
  pyspec::RoundTensors round{sequences, starts, parents, paths, halves, advances};
  p.round = pyspec::round_of(round, x.size(0), p.sequences, p.record_nodes);
  Tensor out = torch::stable::new_empty(x, {x.size(0), p.channels}, out_dtype);
  p.out_element = pyspec::element_of(out, "out");
  p.window = static_cast<float*>(window.data_ptr()), p.record = static_cast<float*>(record.data_ptr());
  p.x = static_cast<const float*>(x.data_ptr()), p.weight = static_cast<const float*>(weight.data_ptr());
  p.out = out.data_ptr(), p.parallel_for = pyspec::parallel_for;
  pyspec_causal_conv_table[pyspec::instruction_set()](p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("causal_conv", TORCH_BOX(&causal_conv)); }
