// The element type of a tensor, on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "params/common.h"

namespace pyspec {

inline Element element_of(const torch::stable::Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      return Element::kFloat32;
    case torch::headeronly::ScalarType::Half:
      return Element::kFloat16;
    case torch::headeronly::ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float16 or bfloat16");
  }
  return Element::kFloat32;
}

inline void copy_strides(const torch::stable::Tensor& tensor, int64_t* strides) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// The numbers of a tensor whose values decide where a kernel reads and writes.
// Scores of a key without a value, [heads] fp32.
inline const float* sinks_of(const torch::stable::Tensor& sinks, int64_t heads) {
  STD_TORCH_CHECK(sinks.scalar_type() == torch::headeronly::ScalarType::Float && sinks.dim() == 1 &&
                      sinks.size(0) == heads && sinks.is_contiguous(),
                  "sinks must be float32 [heads] and contiguous");
  return static_cast<const float*>(sinks.data_ptr());
}

inline const int32_t* int32s_of(const torch::stable::Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.dim() == dims &&
                      tensor.is_contiguous(),
                  name, " must be int32, contiguous and of ", dims, " dimensions");
  return static_cast<const int32_t*>(tensor.data_ptr());
}

}  // namespace pyspec
