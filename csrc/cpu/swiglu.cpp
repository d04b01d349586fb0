#include "params/swiglu.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_swiglu, pyspec::SwigluParams);

Tensor swiglu(const Tensor& gate_up, torch::headeronly::ScalarType out_dtype, int64_t activation) {
  STD_TORCH_CHECK(gate_up.dim() == 2 && gate_up.scalar_type() == torch::headeronly::ScalarType::Float &&
                      gate_up.size(1) % 2 == 0,
                  "gate_up must be float32 [rows, 2 * size]");
  STD_TORCH_CHECK(activation >= 0 && activation <= 2,
                  "activation must be 0 (silu), 1 (gelu_tanh) or 2 (clamped)");
  Tensor values = pyspec::contiguous(gate_up, "gate_up");
  pyspec::SwigluParams p{};
  p.rows = values.size(0), p.size = values.size(1) / 2;
  Tensor out = pyspec::new_tensor({p.rows, p.size}, out_dtype);
  p.activation = static_cast<pyspec::Activation>(activation);
  p.out_element = pyspec::element_of(out, "out");
  p.gate_up = static_cast<const float*>(values.data_ptr()), p.out = out.data_ptr();
  pyspec::launch(pyspec_swiglu_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("swiglu", TORCH_BOX(&swiglu)); }
