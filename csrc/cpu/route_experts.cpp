#include "params/route_experts.h"

#include "tape.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_route_experts, pyspec::RouteExpertsParams);
PYSPEC_KERNEL_TABLE(pyspec_mix_experts, pyspec::MixExpertsParams);

const float* floats_of(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() && tensor.dim() == 2 &&
                      tensor.size(0) == rows && tensor.size(1) == columns,
                  name, " must be float32 [", rows, ", ", columns, "] and contiguous");
  return static_cast<const float*>(tensor.data_ptr());
}

const float* floats_of_experts(const std::optional<Tensor>& tensor, const char* name, int64_t experts) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == ScalarType::Float && tensor->is_contiguous() &&
                      tensor->dim() == 1 && tensor->size(0) == experts,
                  name, " must be float32 [experts] and contiguous");
  return static_cast<const float*>(tensor->data_ptr());
}

std::tuple<Tensor, Tensor> route_experts(const Tensor& logits, const std::optional<Tensor>& bias,
                                         int64_t choices, bool sigmoid, bool renormalise, double scale,
                                         const std::optional<Tensor>& scales) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [rows, experts]");
  pyspec::RouteExpertsParams p{};
  p.rows = logits.size(0), p.experts = logits.size(1), p.choices = choices;
  p.logits = floats_of(logits, "logits", p.rows, p.experts);
  STD_TORCH_CHECK(p.experts <= pyspec::kMostExperts, "logits must be of at most ", pyspec::kMostExperts,
                  " experts, got ", p.experts);
  STD_TORCH_CHECK(choices > 0 && choices <= p.experts, "choices must be in [1, ", p.experts, "], got ",
                  choices);
  p.bias = floats_of_experts(bias, "bias", p.experts);
  p.scales = floats_of_experts(scales, "scales", p.experts);
  Tensor gates = pyspec::new_tensor({p.rows, choices}, ScalarType::Float);
  Tensor ids = pyspec::new_tensor({p.rows, choices}, ScalarType::Int);
  p.gates = static_cast<float*>(gates.data_ptr()), p.ids = static_cast<int32_t*>(ids.data_ptr());
  p.is_sigmoid = sigmoid, p.renormalises = renormalise, p.scale = static_cast<float>(scale);
  if (p.rows > 0) pyspec::launch(pyspec_route_experts_table, p);
  return {gates, ids};
}

Tensor mix_experts(const Tensor& values, const Tensor& gates, const std::optional<Tensor>& shared,
                   const std::optional<Tensor>& shared_gates) {
  STD_TORCH_CHECK(values.dim() == 2 && gates.dim() == 2, "values and gates must be matrices");
  pyspec::MixExpertsParams p{};
  p.rows = gates.size(0), p.choices = gates.size(1), p.size = values.size(1);
  p.values = floats_of(values, "values", p.rows * p.choices, p.size);
  p.gates = floats_of(gates, "gates", p.rows, p.choices);
  if (shared) p.shared = floats_of(*shared, "shared", p.rows, p.size);
  if (shared_gates) p.shared_gates = floats_of(*shared_gates, "shared_gates", p.rows, 1);
  Tensor out = pyspec::new_tensor({p.rows, p.size}, ScalarType::Float);
  p.out = static_cast<float*>(out.data_ptr());
  if (p.rows * p.size > 0) pyspec::launch(pyspec_mix_experts_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("route_experts", TORCH_BOX(&route_experts));
  m.impl("mix_experts", TORCH_BOX(&mix_experts));
}
