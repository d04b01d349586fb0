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

}  // namespace pyspec
