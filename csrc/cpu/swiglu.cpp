#include "params/swiglu.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_swiglu, pyspec::SwigluParams);

// A tensor whose rows are contiguous each.
Tensor in_rows(const Tensor& tensor, const char* name) {
  return tensor.dim() == 2 && tensor.stride(1) == 1 ? tensor : pyspec::contiguous(tensor, name);
}

Tensor swiglu(const Tensor& gate_up, torch::headeronly::ScalarType out_dtype, int64_t activation,
              const std::optional<Tensor>& up) {
  auto float32 = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.scalar_type() == float32 && (up || gate_up.size(1) % 2 == 0),
                  "gate_up must be float32 [rows, 2 * size], or [rows, size] beside up");
  STD_TORCH_CHECK(
      activation >= 0 && activation <= 6,
      "activation must be 0 (silu), 1 (gelu_tanh), 2 (clamped), 3 (sigmoid), 4 (relu), 5 (none) or 6 (gelu)");
  Tensor values = in_rows(gate_up, "gate_up");
  pyspec::SwigluParams p{};
  p.rows = values.size(0), p.size = up ? values.size(1) : values.size(1) / 2,
  p.gate_stride = p.up_stride = values.stride(0);
  p.gate = static_cast<const float*>(values.data_ptr()), p.up = p.gate + p.size;
  std::optional<Tensor> ups;
  if (up) {
    STD_TORCH_CHECK(up->dim() == 2 && up->size(0) == p.rows && up->size(1) == p.size,
                    "up must have the shape of gate_up");
    ups = in_rows(*up, "up");
    p.up = ups->data_ptr(), p.up_stride = ups->stride(0), p.up_element = pyspec::element_of(*ups, "up");
  }
  Tensor out = pyspec::new_tensor({p.rows, p.size}, out_dtype);
  p.activation = static_cast<pyspec::Activation>(activation);
  p.out_element = pyspec::element_of(out, "out");
  p.out = out.data_ptr();
  pyspec::launch(pyspec_swiglu_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }
