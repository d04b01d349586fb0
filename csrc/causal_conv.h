// The tensors of causal_conv as params, but for the round and the result: shapes and dtypes are checked, on
// any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "element.h"
#include "params/causal_conv.h"

namespace pyspec {

inline CausalConvParams causal_conv_params_of(torch::stable::Tensor window, torch::stable::Tensor record,
                                              const torch::stable::Tensor& x,
                                              const torch::stable::Tensor& weight,
                                              const std::optional<torch::stable::Tensor>& bias) {
  auto float32 = torch::headeronly::ScalarType::Float;
  CausalConvParams p{};
  STD_TORCH_CHECK(weight.dim() == 2 && weight.scalar_type() == float32 && weight.is_contiguous(),
                  "weight must be float32 [taps, channels] and contiguous");
  p.taps = weight.size(0), p.channels = weight.size(1);
  STD_TORCH_CHECK(p.taps >= 1 && p.taps <= kMostConvTaps && p.channels % kConvLanes == 0,
                  "weight must have 1 to ", kMostConvTaps, " taps and a multiple of ", kConvLanes,
                  " channels, got ", p.taps, " and ", p.channels);
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
  p.window = static_cast<float*>(window.data_ptr()), p.record = static_cast<float*>(record.data_ptr());
  p.x = static_cast<const float*>(x.data_ptr()), p.weight = static_cast<const float*>(weight.data_ptr());
  return p;
}

}  // namespace pyspec
