#include "params/rms_norm.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_rms_norm, pyspec::RmsNormParams);

Tensor rms_norm(Tensor hidden, const std::optional<Tensor>& delta, const std::optional<Tensor>& weight,
                double epsilon, torch::headeronly::ScalarType out_dtype,
                const std::optional<Tensor>& delta_weight, const std::optional<Tensor>& bias, bool centred,
                double hidden_scale) {
  auto float32 = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(
      hidden.dim() == 2 && hidden.scalar_type() == float32 && (hidden.stride(1) == 1 || hidden.size(1) <= 1),
      "hidden must be float32 [rows, size] with contiguous rows");
  pyspec::RmsNormParams p{};
  p.rows = hidden.size(0), p.size = hidden.size(1), p.hidden_stride = hidden.stride(0);
  p.groups = weight && weight->dim() == 2 ? weight->size(0) : 1;
  std::optional<Tensor> weights, deltas, delta_weights, biases;
  if (weight) {
    STD_TORCH_CHECK(weight->dim() >= 1 && weight->dim() <= 2 && weight->size(-1) == p.size && p.groups > 0 &&
                        p.rows % p.groups == 0 && weight->scalar_type() == float32,
                    "weight must be float32 [size], or [groups, size] for a multiple of groups rows");
    weights = pyspec::contiguous(*weight, "weight");
    p.weight = static_cast<const float*>(weights->data_ptr());
  }
  if (delta_weight) {
    STD_TORCH_CHECK(delta && delta_weight->dim() == 1 && delta_weight->size(0) == p.size &&
                        delta_weight->scalar_type() == float32,
                    "delta_weight must be float32 [size], for a delta");
    delta_weights = pyspec::contiguous(*delta_weight, "delta_weight");
    p.delta_weight = static_cast<const float*>(delta_weights->data_ptr());
  }
  if (bias) {
    STD_TORCH_CHECK(weight && bias->dim() == 1 && bias->size(0) == p.size && bias->scalar_type() == float32,
                    "bias must be float32 [size], beside a weight");
    biases = pyspec::contiguous(*bias, "bias");
    p.bias = static_cast<const float*>(biases->data_ptr());
  }
  STD_TORCH_CHECK(!centred || (weight && !delta_weight), "centred needs a weight, and no delta_weight");
  p.centred = centred;
  if (delta) {
    STD_TORCH_CHECK(delta->dim() == 2 && delta->size(0) == p.rows && delta->size(1) == p.size &&
                        delta->scalar_type() == float32,
                    "delta must be float32 and have the shape of hidden");
    deltas = pyspec::contiguous(*delta, "delta");
    p.delta = static_cast<const float*>(deltas->data_ptr());
  }
  STD_TORCH_CHECK(delta || hidden_scale == 1, "hidden_scale must be 1 where there is no delta");
  p.hidden_scale = static_cast<float>(hidden_scale);
  Tensor out = pyspec::new_tensor({p.rows, p.size}, out_dtype);
  p.out_element = pyspec::element_of(out, "out");
  p.hidden = static_cast<float*>(hidden.data_ptr()), p.out = out.data_ptr();
  p.epsilon = static_cast<float>(epsilon);
  pyspec::launch(pyspec_rms_norm_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }
